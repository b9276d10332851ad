r"""What no computer works out: towers of powers, factorials of large numbers. Told from the text, before it is tried.

Python raises an integer to a power in one step that no alarm interrupts, so a time limit alone does not hold.
"""

from __future__ import annotations

import re

from interp.questions.grading.arithmetic import NotArithmetic, value_of
from interp.questions.grading.normal import plain

DIGITS = 300
"""Of a number that is worked with."""
EXPONENT = 10_000
"""Of a number; and the product of all that stand over brackets, one of which may lie within the next."""
FACTORIAL = 5000
_BIG = re.compile(rf"\d{{{DIGITS + 1},}}")
_CLOSES = {"{": "}", "(": ")", "[": "]"}
_NUMERIC_POWER = re.compile(r"[\d)\]}]\s*\}?\s*\^")


def too_large(text: str) -> str:
    r"""Why a mathematical text is not worked out; "" where it may be.

    Example:
        >>> from interp.questions.grading.magnitude import too_large
        >>> too_large("9^{9^{9^9}}"), too_large("100000!"), too_large(r"2^{10} + e^{x^2}")
        ('a power of a power', 'a factorial of a large number', '')
    """
    if _BIG.search(text):
        return f"a number of more than {DIGITS} digits"
    over_brackets = 1.0
    for caret in re.finditer(r"\^", text):
        exponent = _group(text, caret.end())
        size = _size(exponent)
        if size > EXPONENT:
            return "a power of a power" if "^" in exponent else "a power with a large exponent"
        if text[: caret.start()].rstrip()[-1:] in (")", "}", "]"):
            over_brackets *= max(size, 1.0)
    if over_brackets > EXPONENT * 10:
        return "a power of a power"
    if re.search(r"!\s*[)}\]]*\s*!", text):
        return "a factorial of a factorial"
    for sign in re.finditer(r"!", text):
        before = text[: sign.start()].rstrip()
        digits = re.search(r"(\d+)$", before)
        if digits and int(digits[1]) > FACTORIAL:
            return "a factorial of a large number"
        if before[-1:] in (")", "}") and re.search(r"\^|\d{4}", before):
            return "a factorial of a large number"
    if re.search(r"\\(?:binom|prod|sum)|[CP]\s*\(", text) and re.search(r"\d{6}|\^", text) and _is_long(text):
        return "a sum, product or binomial of large numbers"
    return ""


def _is_long(text: str) -> bool:
    numbers = [int(one) for one in re.findall(r"\d+", text)]
    return max(numbers, default=0) > EXPONENT


def _group(text: str, at: int) -> str:
    """What stands over a caret: a group in brackets, a signed number, or one character."""
    at += len(text[at:]) - len(text[at:].lstrip())
    if text[at : at + 1] not in _CLOSES:
        found = re.compile(r"[-+]?(?:\d+|\\[A-Za-z]+|.)", re.DOTALL).match(text, at)
        end = found.end() if found else at
        while text[end : end + 1] == "^":  # 9^9^9
            inner = _group(text, end + 1)
            end += 1 + len(inner)
        return text[at:end]
    opened, depth = text[at], 0
    for place in range(at, len(text)):
        depth += (text[place] == opened) - (text[place] == _CLOSES[opened])
        if depth == 0:
            return text[at : place + 1]
    return text[at:]


def _size(exponent: str) -> float:
    """The absolute value of an exponent; infinite where it is a number that is not worked out, 1 of what is none."""
    inside = plain(exponent).strip()
    while inside[:1] in _CLOSES and inside.endswith(_CLOSES[inside[0]]) and _group(inside, 0) == inside:
        inside = inside[1:-1].strip()
    if not re.search(r"\d", inside):
        return 1.0
    if re.search(
        r"[A-Za-z]", re.sub(r"sqrt|cbrt|pi", "", inside)
    ):  # beside letters, the largest number in it
        if _NUMERIC_POWER.search(inside):
            return float("inf")
        return float(max(int(one[:10]) for one in re.findall(r"\d+", inside)))
    try:
        return abs(float(value_of(inside)))
    except (NotArithmetic, OverflowError, RecursionError):
        tower = "^" in inside or "!" in inside
        return float("inf") if tower else float(max(int(one[:10]) for one in re.findall(r"\d+", inside)))
