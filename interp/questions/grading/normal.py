r"""One spelling for what can be spelled in several ways: characters, Markdown, LaTeX. All graders read through it.

Three steps, each on top of the one before: `tidy` (characters and Markdown), `normal` (LaTeX without its typography;
what is left is mathematics, as math-verify reads it), `plain` (no LaTeX at all: `\frac{1}{2}` is 1/2).
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

RUN = 8
"""Blanks, lines and signs of one kind in a row that mean no more than so many."""
_REPEATED = re.compile(r"([^\w()\[\]{}\\])\1{8,}")
_CHARACTERS = {
    **dict.fromkeys("−–‐‑‒﹣", "-"),
    **dict.fromkeys("“”„«»「」『』〝〞", '"'),
    **dict.fromkeys("‘’‚", "'"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **dict.fromkeys("【〔", "["),
    **dict.fromkeys("】〕", "]"),
    "。": ". ",
    "、": ", ",
    "—": " - ",
    "…": "...",
    "º": "°",
    "˚": "°",
    "٫": ".",
    "٬": ",",
    "٪": "%",
}
_SYMBOLS = {
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "∕": "/",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∞": r"\infty ",
    "π": r"\pi ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "∠": r"\angle ",
}
_MARKDOWN = (
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"(?<![\w}\])])_(?=[^\s_])([^_\n]*?[^\s_\\])_(?![\w{])", r"\1"),
    (r"\*\*|__(?=\w)|(?<=\w)__|`+|~~", ""),
    (r"(?<![\w*)])\*(?=\S)([^*\n]*?\S)\*(?![\w*(])", r"\1"),
    (r"(?m)^[ \t]*#{1,6}[ \t]+(?!\d)", ""),
    (r"(?m)^[ \t]*[•][ \t]+", ""),
    (r"(?i)<sup>([^<>]*)</sup>", r"^{\1}"),
    (r"(?i)<sub>([^<>]*)</sub>", r"_{\1}"),
    (r"(?is)<(b|i|u|em|strong|code|p)>(.*?)</\1>", r"\2"),
    (r"(?i)<br\s*/?>", "\n"),
)
_FONTS = (
    r"\\(?:text|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|textbf|textit|textrm|textsf|texttt|textnormal|"
    r"operatorname|"
    r"mbox|hbox|bm|boldsymbol|emph|underline|mathop|ensuremath|displaylines)\*?\s*\{([^{}]*)\}"
)
_LATEX = (
    (r"\\(?:textdollar|\$)", "＄"),  # money, not the edge of mathematics
    (r"\\(?:degrees?|textdegree)\b", "°"),
    (r"(?<!\\)\\([%#&_])", r"\1"),
    (r"\^?\s*\{?\s*\\circ\b\s*\}?", "°"),
    (r"\^\s*\{\s*°\s*\}|\^\s*°", "°"),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
    (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|sf|tt|centering|noindent|strut)(?![a-zA-Z])", ""),
    (
        r"(?<=\d),?(?:(?<!\\)\\[,!;: ]|\{,\}|~|\{\s\})\s*(?=\d{3}(?!\d))",
        "",
    ),  # 10\,080, 10{,}080 and 10,\! 080
    (
        r"(?<!\\)\\[,!;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:h|v)space\*?\{[^{}]*\}|\\newline|\\phantom\{[^{}]*\}",
        " ",
    ),
    (r"\{\s*,\s*\}", ","),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s+([a-zA-Z])\s*([a-zA-Z])(?![a-zA-Z])", r"\\frac{\1}{\2}"),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"\\frac\s*\{", r"\\frac{"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√\s*(\d+(?:\.\d+)?|\w)", r"\\sqrt{\1}"),
    (r"\\(?:leq?|leqslant|leqq)(?![a-zA-Z])", r"\\le "),
    (r"\\(?:geq?|geqslant|geqq)(?![a-zA-Z])", r"\\ge "),
    (r"\\neq?(?![a-zA-Z])", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\colon(?![a-zA-Z])", ":"),
    (r"\\(?:[cld]?dots[bcmo]?|hdots)(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
    (r"\\(?:lbrace|lbrack)(?![a-zA-Z])", r"\\{"),
    (r"\\(?:rbrace|rbrack)(?![a-zA-Z])", r"\\}"),
    (r"\\(?:infin|infty)(?![a-zA-Z])", r"\\infty "),
    (r"\\(?:therefore|because|implies|Rightarrow|Longrightarrow)(?![a-zA-Z])|[∴⇒⟹]", " "),
    (r"∛\s*\(?(\w+)\)?", r"\\sqrt[3]{\1}"),
    (r"\\div(?![a-zA-Z])", "/"),
)
_EDGES_OF_MATHEMATICS = (
    (r"\$\$(.+?)\$\$", r" \1 "),
    (r"\$(?=\S)([^$\n]*?\S)\$(?!\d)", r"\1"),
    (r"(?<!\\)\\[()\[\]]", " "),
)
_OPERATORS = (
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    (r"\^\(([-+]?\w+)\)", r"^\1"),
    (r"_\s*\{(\w*)\}", r"_\1"),
    (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*"),
    (r"\\le(?![a-zA-Z])", "<="),
    (r"\\ge(?![a-zA-Z])", ">="),
    (r"\\ne(?![a-zA-Z])", "!="),
    (r"\\pm(?![a-zA-Z])", "±"),
    (r"\\(?:approx|sim)(?![a-zA-Z])", "~"),
    (r"\\ldots(?![a-zA-Z])", "..."),
)
_REST = ((r"\\([{}])", r"\1"), (r"\\([a-zA-Z]+)", r"\1"))


def tidy(text: str) -> str:
    r"""Characters and Markdown in one spelling: full-width letters, digits of any script, dashes, spaces, bold face.

    What looks like a power, an index or a fraction stays one: "2³" is 2^{3}, "½" is \frac{1}{2}.

    Example:
        >>> from interp.questions.grading.normal import tidy
        >>> tidy("**答案**：Ｂ"), tidy("–5"), tidy("3㎡")
        ('答案:B', '-5', '3m^{2}')
    """
    text = "".join(_character(c) for c in unicodedata.normalize("NFC", without_runs(text)))
    text = without_runs(text)
    text = re.sub(
        r"\^\{([^{}]*)\}(?:\^\{([^{}]*)\})+", lambda m: "^{" + re.sub(r"[\^{}]", "", m[0]) + "}", text
    )
    text = re.sub(r"_\{([^{}]*)\}(?:_\{([^{}]*)\})+", lambda m: "_{" + re.sub(r"[_{}]", "", m[0]) + "}", text)
    for pattern, said in _MARKDOWN:
        text = re.sub(pattern, said, text)
    return text


def without_runs(text: str) -> str:
    """A text in which no blank and no sign, but those that open and close, stands more than `RUN` times in a row."""
    return _REPEATED.sub(lambda m: m[0][:RUN], text)


def normal(text: str) -> str:
    r"""`tidy`, and LaTeX without fonts, spacing, sized brackets and the `$` around it.

    Example:
        >>> from interp.questions.grading.normal import normal
        >>> normal(r"$\dfrac12$"), normal(r"145^{\circ}"), normal(r"\text{B}"), normal(r"\$18.90")
        ('\\frac{1}{2}', '145°', 'B', '$18.90')
    """
    text = tidy(text)
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    while (unwrapped := re.sub(_FONTS, r"\1", text)) != text:
        text = unwrapped
    for pattern, said in _LATEX:
        text = re.sub(pattern, said, text)
    for pattern, said in _EDGES_OF_MATHEMATICS:
        text = re.sub(pattern, said, text, flags=re.DOTALL)
    return re.sub(r"[ \t]+", " ", text.replace("＄", "$")).strip()


def plain(text: str) -> str:
    r"""`normal`, and what is left of LaTeX as one would type it.

    Example:
        >>> from interp.questions.grading.normal import plain
        >>> plain(r"2\frac{1}{2} \text{ cm}"), plain(r"3\sqrt{2}"), plain(r"1.5 \cdot 10^{-3}")
        ('2 1/2 cm', '3sqrt(2)', '1.5 * 10^-3')
    """
    text = normal(text)
    for pattern, said in _OPERATORS:
        text = re.sub(pattern, said, text)
    while (flat := _flattened(text)) != text:
        text = flat
    for pattern, said in (*_OPERATORS[:3], *_REST):
        text = re.sub(pattern, said, text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _flattened(text: str) -> str:
    text = re.sub(r"\\sqrt\s*\[3\]\s*\{([^{}]*)\}", r"cbrt(\1)", text)
    text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)", text)
    return re.sub(r"(\d\s*)?(-?)\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", _fraction, text)


def _fraction(match: re.Match[str]) -> str:
    above, below = (
        part if re.fullmatch(r"\s*[\w.]+\s*", part) else f"({part})" for part in match.groups()[2:]
    )
    before = f"{match[1].strip()} " if match[1] else ""
    return f"{before}{match[2]}{above.strip()}/{below.strip()}"


@cache
def _character(c: str) -> str:
    if c in _CHARACTERS:
        return _CHARACTERS[c]
    if c.isascii():
        return c
    if c.isspace() or unicodedata.category(c) == "Zs":
        return " "
    if (digit := unicodedata.decimal(c, None)) is not None:
        return str(digit)
    kind, *points = unicodedata.decomposition(c).split() or [""]
    if not kind.startswith("<"):
        return c
    said = "".join(_character(chr(int(point, 16))) for point in points)
    if (kind == "<super>" and said[:1].isalnum()) or (said in ("+", "-") and kind == "<super>"):
        return f"^{{{said}}}"
    if kind == "<sub>":
        return f"_{{{said}}}"
    if kind == "<fraction>":
        above, _, below = said.partition("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    return said
