r"""The answer in free text: the last statement of one, whole.

A statement is `\boxed{...}`, `<answer>...</answer>`, `#### ...`, "the answer is ...", "I choose ...", "... is
correct", and what these are in other languages; without any, it is all of the text. What is taken back ("3. No wait,
4") gives way to what follows; reasoning that was never closed states nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from interp.questions.grading.grade import Unread
from interp.questions.grading.normal import tidy, without_runs

READ = 4000
"""Characters that are read at once: the end of a text, or an earlier part of one whose end states nothing."""
OVERLAP = 1000
"""Characters that two parts share, so that what begins in the one is whole in it."""
EARLIER = 12
"""Earlier parts with a mark or a word of an answer that are read."""
DEEPEST = 6
"""Statements within statements that are followed."""


@dataclass(frozen=True)
class Statement:
    """What a text says its answer is.

    Attributes:
        text: all of it, never a part.
        stated: the text says that this is the answer.
        retracted: something was said before, and taken back.
        exclaimed: its sentence ends in "!", which the text lacks: it may be a factorial.
    """

    text: str
    stated: bool
    retracted: bool = False
    exclaimed: bool = False


_CHAIN = r"(?:think|thinking|thought|reasoning|reason|analysis)"
_CLOSED = re.compile(rf"[<◁]\s*/\s*{_CHAIN}\s*[>▷]", re.I)
_OPENED = re.compile(rf"[<◁]\s*{_CHAIN}\s*[>▷]", re.I)
_TAGGED = re.compile(r"<\s*(answer|ans|final_answer|final)\s*>(.*?)<\s*/\s*\1\s*>", re.DOTALL | re.I)
_BOX_TOKENS = re.compile(r"<\|begin_of_box\|>(?P<answer>.*?)<\|end_of_box\|>", re.DOTALL)
_ANSWER_TAG = re.compile(r"<\s*/?\s*answer\s*>", re.I)
_OPEN_TAG = re.compile(r"<\s*(?:answer|ans|final_answer)\s*>(?P<answer>.+)\Z", re.DOTALL | re.I)
_HASHES = re.compile(r"####\s*(?P<answer>[^\n]+)")
_JOINED = re.compile(r"[\s$,;.()\\]*(?:and|or|和|或|及)?[\s$,;()\\]*")

_IS = (
    r"(?:\s*(?:is|was|are|be|equals|:|=|->|=>|→)|\s+(?:would|should|must|will|has to|can only) be"
    r"|\s+-(?=\s)|\s+comes (?:out )?to)"
)
_ELSEWHERE_IS = r"(?:\s+(?:ist|lautet|wäre|est|es|è|é|to|är|er|is)(?![^\W\d_])|\s*[:=-])"
_SAID = (
    re.compile(
        rf"\b(?:answer|ans|(?:correct|right|best|final|chosen|my)\s+(?:option|choice|letter|result|solution|one|"
        rf"total|value))s?\b"
        rf"(?:\s+(?:to|for|of)\s+[^\n.:=]{{1,60}}?)?{_IS}[\s:*_]*(?=(?P<answer>[^\n]+)?)",
        re.I,
    ),
    re.compile(
        r"\bI(?:'d| would|'ll| will|'m)?(?: have to| am)? ?(?:choose|chose|pick|picked|select|selected|go with|"
        r"going with|vote for|"
        r"opt for|say)\s+(?=(?P<answer>[^\n]+))",
        re.I,
    ),
    re.compile(
        r"(?:^|\n)\W{0,20}(?:the |my )?(?:final |correct )?(?<!/)answer\W{0,20}\n\s{0,20}(?=(?P<answer>[^\n]+))",
        re.I,
    ),
    re.compile(
        r"(?:(?:最终|正确)?(?:答案|选项|選項)|(?:最终)?结果|结论|答え|正解|解答|回答|故选|应选|應選)\s*(?:应该|应当|"
        r"应|就|只能)?\s*(?:是|为|為|选|選|は|:|=)\s*(?=(?P<answer>[^\n]+))"
    ),
    re.compile(
        r"(?<!不)(?<!不能)(?:选择|選擇|选|選)\s*(?:答案|选项)?\s*(?=(?P<answer>[(\[]?[A-Z](?![A-Za-z])[^\n]*))"
    ),
    re.compile(r"(?:정답|답변|답)\s*(?:은|는|:)\s*(?=(?P<answer>[^\n]+))"),
    re.compile(
        r"\b(?:antwort|lösung|ergebnis|réponse|respuesta|solución|risposta|resposta|odpowiedź|ответ|відповідь|"
        r"antwoord|svar|"
        rf"cevap|đáp án)\b[^\n:=.]{{0,30}}?{_ELSEWHERE_IS}\s*(?=(?P<answer>[^\n]+))",
        re.I,
    ),
    re.compile(r"(?:الجواب|الإجابة|उत्तर)[^\n:]{0,20}?(?:\s(?:هو|هي|है)\s|:)\s*(?=(?P<answer>[^\n]+))"),
)
_CORRECT = re.compile(
    r"(?:^|[\n.,;:!?]|\b(?:so|thus|hence|therefore|that|then)\b)\s*(?P<answer>(?!it\b|this\b|that\b|which\b|what\b|"
    r"he\b|so\b)"
    r"[^\n.,;:!?]{1,60}?)\s+(?:is|must be|should be)\s+(?:(?:the|my)\s+(?:final\s+|best\s+|correct\s+|right\s+)?"
    r"(?:answer|choice|option|one)\b|(?:the\s+)?(?:correct|right)\b)(?!\s+(?:that|to|if|angle|side|hand))",
    re.I,
)
_TAKEN_BACK = re.compile(
    r"(?:\b(?:no|oh|oops|ah)\b[\s,.]*)?\b(?:wait|actually|correction|scratch that|on second thoughts?|i mean|"
    r"make that|let me "
    r"(?:re\w+|correct|check|count)(?! mark)|my mistake|i was wrong|that(?:'s| is) (?:wrong|not right|incorrect)|"
    r"oops|sorry|hmm+)\b(?:[\s,.:;!-]+(?:no|actually|rather)\b)?[\s,.:;!-]*"
    r"|(?:不对|不對|等等|更正|抱歉|其实)[\s,.!:]*",
    re.I,
)
_NOTES = re.compile(
    r"\n\s{0,20}(?:explanation|reason|reasoning|rationale|justification|confidence|note|because|解释|解析|理由|原因|"
    r"说明)s?\s*(?::|\n)(?!.*\banswer\b)",
    re.I | re.DOTALL,
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|dr|mr|mrs|ms|prof|st|mt|ft|jr|sr|ca|cf|vs|etc|no|nr|fig|eq|"
    r"approx|"
    r"inc|ltd|co|corp|gen|col|sgt|capt|rev|hon|sen|rep|gov|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tue|"
    r"wed|thu|"
    r"fri|sat|sun|ave|blvd|rd|dept|est|e\.g|i\.e|a\.m|p\.m)\Z",
    re.I,
)
_END = re.compile(r"[.!?](?=[\s\"')\]]*(?:\s|$))")


def extract(text: str) -> tuple[str, bool]:
    """The last statement of an answer, whole, and whether there was one; without one, the text itself.

    Nothing inside the statement is searched: "3.5" stays "3.5", "1:3" stays "1:3".

    Example:
        >>> fl.grading.extract("2 + 1 = 3, so the answer is 3.")
        ('3', True)
        >>> fl.grading.extract("The answer is Dr. Smith. No wait, the answer is St. Louis.")
        ('St. Louis', True)
    """
    try:
        found = statement_of(text)
    except Unread:
        return text[-READ:].strip(), False
    return found.text, found.stated


def statement_of(text: str) -> Statement:
    """The last statement of an answer in a text, and how it stands.

    The end of a long text is read; where it states nothing, the parts before it are, from the last to the first.

    Raises:
        Unread: what an earlier part states is longer than is read, or may be taken back behind it; or too many
            statements lie within one another.
    """
    whole = _behind_the_chain(without_runs(text)).strip()
    found = _in_text(tidy(_end_of(whole)).strip())
    return found if found.stated else _earlier(whole) or found


def _end_of(text: str) -> str:
    """A long text answers at its end; no word is cut."""
    start = _start(text, len(text) - READ)
    if start > 0 and not text[start - 1].isspace():
        _, _, behind = text[start:].partition(" ")
        return behind or text[start:]
    return text[start:]


def _start(text: str, place: int) -> int:
    """Where to begin, at a place or before it, so that no statement is cut."""
    opening = None if place <= 0 else _STATES.search(text, max(0, place - OVERLAP), place)
    return max(0, place) if opening is None else opening.start()


_STATES = re.compile(
    r"\\(?:boxed|fbox)|<\s*(?:final_?)?ans|####|_of_box|(?<![/\w])answers?\b|答案|答え|正解|回答|정답|답",
    re.I,
)


def _earlier(whole: str) -> Statement | None:
    """The last statement before the end of a text.

    Raises:
        Unread: it does not end where what is read of it ends, or may be taken back behind that.
    """
    tried = 0
    for end in range(len(whole) - READ + OVERLAP, OVERLAP, OVERLAP - READ):
        part = whole[_start(whole, end - READ) : end]
        if not _STATES.search(part):
            continue
        tried += 1
        if tried > EARLIER:
            return None
        tidied = tidy(part).strip()
        found = _in_text(tidied)
        if not found.stated:
            continue
        if tidied.endswith(found.text) or _TAKEN_BACK.search(whole, end):
            behind = len(whole) - end
            raise Unread(f"{behind:,} characters and more stand behind the answer, and may change it")
        return found
    return None


def _in_text(text: str, depth: int = 0) -> Statement:
    if depth > DEEPEST:
        raise Unread(f"more than {DEEPEST} statements lie within one another")
    text = _without_notes(text)
    marked = _marked(text)
    if marked is not None:
        inside, end = marked
        found = _corrected(text[end:], depth)
        within = (
            _in_text(inside.strip(), depth + 1) if inside.strip() != text else Statement(inside.strip(), True)
        )
        return found or replace(within, stated=True)
    said = _said(text)
    if said is None:
        before, _, behind = _split_where_taken_back(text)
        if before.strip(" ,.;:-\n") and behind.strip():
            return replace(_in_text(behind.strip(), depth + 1), retracted=True)
        return Statement(text, False)
    start, answer = said
    found = _corrected(text[start:], depth)
    exclaimed = re.search(r"\d!\Z", answer) is not None
    return found or Statement(answer.removesuffix("!"), True, exclaimed=exclaimed)


def _without_notes(text: str) -> str:
    """A text up to the explanation that follows its answer."""
    notes = _NOTES.search(text)
    return text[: notes.start()] if notes and re.search(r"\w", text[: notes.start()]) else text


def _behind_the_chain(text: str) -> str:
    """What stands behind the last chain of thought; of a chain that is never closed, only an answer in tags."""
    closings = list(_CLOSED.finditer(text))
    text = text[closings[-1].end() :] if closings else text
    opening = _OPENED.search(text)
    if opening is None:
        return text
    end = text[max(opening.end(), len(text) - READ) :]
    tagged = _TAGGED.search(end) or _open_tag(end)
    return text[: opening.start()] if tagged is None else end[tagged.start() :]


def _marked(text: str) -> tuple[str, int] | None:
    r"""What the last mark holds (`\boxed{}`, tags, `####`), and where it ends."""
    marks = [(end, start, inside) for start, end, inside in _boxes(text)]
    marks += [(m.end(), m.start(), m[2]) for m in _TAGGED.finditer(text)]
    for pattern in (_BOX_TOKENS, _HASHES):
        marks += [(m.end(), m.start(), m["answer"]) for m in pattern.finditer(text)]
    if opened := _open_tag(text):
        marks += [(opened.end(), opened.start(), opened["answer"])]
    if not marks:
        return None
    end, _, inside = max(marks, key=lambda mark: (mark[0], -mark[1]))
    return inside, end


def _open_tag(text: str) -> re.Match[str] | None:
    """The first tag that is opened and never closed, behind all those that are."""
    closed = [m.end() for m in _ANSWER_TAG.finditer(text)]
    start = closed[-1] if closed else 0
    found = _OPEN_TAG.search(text, start)
    if found is None and closed:  # the last of them opens
        last = [m.start() for m in _ANSWER_TAG.finditer(text)][-1]
        found = _OPEN_TAG.match(text, last)
    return found


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every complete `\boxed{...}` (or `\fbox{...}`), braces balanced; those that stand in one list joined."""
    found: list[tuple[int, int, str]] = []
    closings = _closings(text)
    for opening in re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}\\$]+))", text):
        if opening["bare"]:
            one = (opening.start(), opening.end(), opening["bare"])
        elif (end := closings.get(opening.end())) is not None:
            one = (opening.start(), end + 1, text[opening.end() : end])
        else:
            continue
        joined = found and "\n" not in (gap := text[found[-1][1] : one[0]]) and _JOINED.fullmatch(gap)
        if joined and one[2].strip() != found[-1][2].strip():
            one = (found[-1][0], one[1], f"{found[-1][2]}, {one[2]}")
            found.pop()
        found.append(one)
    return found


def _closings(text: str) -> dict[int, int]:
    """Where each brace that is opened is closed again, by the place behind the opening one."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.end())
        elif match[0] == "}" and opened:
            found[opened.pop()] = match.start()
    return found


def _said(text: str) -> tuple[int, str] | None:
    """What the last sentence that names an answer says it is, and where it says so."""
    found = [(m.start("answer"), m) for pattern in _SAID for m in pattern.finditer(text) if m["answer"]]
    found += [(m.start("answer"), m) for m in _CORRECT.finditer(text)]
    for headed in _SAID[0].finditer(text):  # "Answer:" on a line of its own
        if headed["answer"] is None and (
            line := re.compile(r"\s*(?P<answer>[^\n]+)").match(text, headed.end())
        ):
            found.append((line.start("answer"), line))
    if not found:
        return None
    start, last = max(found, key=lambda one: one[0])
    return start, _until_the_sentence_ends(last["answer"])


def _corrected(tail: str, depth: int) -> Statement | None:
    """What is said instead, where a tail takes back what was said before it."""
    _, cue, behind = _split_where_taken_back(tail)
    if not cue or not behind.strip(" .!?"):
        return Statement("", True, retracted=True) if cue and _DOUBT.search(cue) else None
    return replace(_in_text(behind.strip(), depth + 1), stated=True, retracted=True)


_DOUBT = re.compile(r"wait|let me|wrong|mistake|not right|incorrect|scratch", re.I)


def _split_where_taken_back(text: str) -> tuple[str, str, str]:
    cues = list(_TAKEN_BACK.finditer(text))
    if not cues:
        return text, "", ""
    return text[: cues[0].start()], cues[-1][0], text[cues[-1].end() :]


def last_sentence(text: str) -> str:
    """The last sentence of a text; a point within a number or behind an abbreviation ends none."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if not lines:
        return ""
    line, starts = lines[-1].strip(), [0]
    starts += [end for end in _sentence_ends(line) if line[end:].strip()]
    return line[starts[-1] :].strip()


def _sentence_ends(text: str) -> list[int]:
    end = len(text.rstrip())
    return [
        m.end()
        for m in _END.finditer(text)
        if m[0] != "."
        or not (_ABBREVIATION.search(text, max(m.start() - 40, 0), m.start()) and m.end() < end)
    ]


def _until_the_sentence_ends(text: str) -> str:
    ends = _sentence_ends(text)
    said = text[: ends[0]] if ends else text
    said = said.strip()
    said = said[:-1] if said.endswith(".") and not _initials(said) else said
    return said.strip().strip("*_").strip()


def _initials(text: str) -> bool:
    return re.search(r"(?:^|\s)(?:[A-Za-z]\.){2,}\Z", text) is not None
