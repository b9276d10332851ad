"""Mathematical expressions, compared by math-verify."""

from __future__ import annotations

import re
import threading
from typing import Any

from hooks.errors import FrankenlensError
from hooks.extras import require_installed
from interp.questions.grading.extract import extract
from interp.questions.grading.grade import Grade

TIMEOUT = 5  # seconds, whole ones: math-verify's alarm counts no others
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def judge_math(answer: str, reference: str, timeout: int = TIMEOUT) -> Grade:
    r"""Whether math-verify finds answer and reference equal; both may be LaTeX, with or without `$`.

    math-verify's rules, not ours: six decimals count, 50, 50% and 0.5 are taken for 50%, `x = 5` for 5, and the base
    of a numeral (52_8) is dropped. A comparison that times out or fails is ungraded.

    Raises:
        FrankenlensError: math-verify is not installed, or this is not the main thread, where alone its alarm rings.
    """
    require_installed('the grader "math"', "math_verify")
    if threading.current_thread() is not threading.main_thread():
        raise FrankenlensError(
            "math-verify grades in the main thread only; grade there, or name another grader"
        )
    read, stated = extract(answer)
    wanted = _parsed(_expression(reference, True), timeout)
    if isinstance(wanted, str) or not wanted:
        return Grade(None, why=f"the reference {reference!r} cannot be read as mathematics{_because(wanted)}")
    if _bare(read) == _bare(reference):
        return Grade(True, read)
    found = _parsed(_expression(read, stated), timeout)
    if isinstance(found, str):
        return Grade(None, read, f"the answer cannot be read as mathematics{_because(found)}")
    if not found:
        return Grade(False, read, "the answer cannot be read as mathematics")
    return _compared(wanted, found, read, timeout)


def _compared(wanted: list[Any], found: list[Any], read: str, timeout: int) -> Grade:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        return Grade(verify(wanted, found, timeout_seconds=timeout, raise_on_error=True), read)
    except TimeoutException:
        return Grade(None, read, f"the comparison was not done within {timeout} s")
    except Exception as error:  # whatever sympy raises on an expression it cannot handle
        return Grade(None, read, f"the comparison failed: {type(error).__name__}: {error}")


def _parsed(text: str, timeout: int) -> list[Any] | str:
    """Expressions, or why there are none."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    try:
        return parse(text, parsing_timeout=timeout, raise_on_error=True)
    except TimeoutException:
        return f"not done within {timeout} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _expression(text: str, stated: bool) -> str:
    r"""The text as math-verify looks for mathematics: between `$`, unless it is prose or has delimiters already."""
    text = re.sub(r"(?<=\d)\\[,!;:](?=\d{3}(?!\d))", "", text)  # 10\,080: math-verify takes it for 10 + 80
    if re.search(r"\$.+\$|\\\(|\\\[|\\boxed", text, re.DOTALL) or (not stated and _PROSE.search(text)):
        return text
    percent = re.sub(r"(?<!\\)%", r"\\%", text.replace("$", ""))
    return f"${percent}$"


def _bare(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}|[\s$]", r"\1", text)


def _because(why: Any) -> str:
    return f": {why}" if isinstance(why, str) else ""
