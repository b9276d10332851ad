"""Expressions, equations, sets and relations as sympy objects: read by math-verify, compared at points and by it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from interp.questions.grading.magnitude import too_large

POINTS = (0.7310585786300049, -1.3862943611198906, 2.2360679774997896, 5.436563656918091)
"""Values that variables take, in turn, where two expressions are compared."""
DIGITS = 40


class Unparsed(ValueError):
    """A text that cannot be read whole, or a comparison that was not done; says why."""


def equal_expressions(found: Sequence[str], wanted: Sequence[str], timeout: int) -> bool | None:
    """Whether two texts are the same expression, equation, set or relation; None where they may be, rounded.

    Args:
        found, wanted: one text each, or several relations of which one holds ("x < 1 or x > 2").
        timeout: whole seconds.

    Raises:
        Unparsed: one of them cannot be read whole, or it took longer than `timeout` seconds.
    """
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout as within

    a = [_parsed(text, timeout, "the answer") for text in found]
    b = [_parsed(text, timeout, "the reference") for text in wanted]
    places = [max(map(_places, texts)) for texts in (found, wanted)]

    @within(timeout)
    def compare() -> bool | None:
        return _equal(_joined(a), _joined(b), max(places) if 0 in places else 0, timeout)

    try:
        return compare()
    except TimeoutException as error:
        raise Unparsed(f"the comparison was not done within {timeout} s") from error
    except Exception as error:  # whatever sympy raises on an expression it cannot handle
        raise Unparsed(f"the comparison failed: {type(error).__name__}: {error}") from error


def _joined(objects: Sequence[Any]) -> Any:
    import sympy

    if len(objects) == 1:
        return objects[0]
    return sympy.Union(*(one if isinstance(one, sympy.Set) else one.as_set() for one in objects))


def within_places(x: Any, y: Any, places: int) -> bool | None:
    """Whether a decimal with so many places is a value that has more: told from six places on."""
    if not places or abs(x - y) > (10 ** -Fraction(places) if isinstance(x - y, Fraction) else 10.0**-places):
        return False
    return True if places >= 6 else None if places >= 2 else False


def _parsed(text: str, timeout: int, whose: str) -> Any:
    from math_verify import LatexExtractionConfig, parse
    from math_verify.errors import TimeoutException

    if why := too_large(text):
        raise Unparsed(f"{whose} {text!r} is not worked out: it holds {why}")
    if re.search(r"\\ldots|\\forall|\\exists|\d\s*_|\\overline", text):
        raise Unparsed(f"{whose} {text!r} cannot be read as mathematics: it holds more than an expression")
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*°", r"(\\frac{\1\\pi}{180})", text)
    said = re.sub(r"(?<!\\)%", r"\\%", text).replace("°", r"^{\circ}")
    try:
        found = parse(f"${said}$", [LatexExtractionConfig()], parsing_timeout=timeout, raise_on_error=True)
    except TimeoutException as error:
        raise Unparsed(f"{whose} {text!r} was not read within {timeout} s") from error
    except Exception as error:
        raise Unparsed(
            f"{whose} {text!r} cannot be read as mathematics: {type(error).__name__}: {error}"
        ) from error
    if not found or isinstance(found[0], str):
        raise Unparsed(f"{whose} {text!r} cannot be read as mathematics")
    return found[0]


def _equal(a: Any, b: Any, places: int, timeout: int) -> bool | None:
    import sympy
    from math_verify import verify

    if _are(sympy.MatrixBase, a, b):
        if a.shape != b.shape:
            return False
        entries = [_equal(x, y, places, timeout) for x, y in zip(a, b, strict=True)]
        return False if False in entries else None if None in entries else True
    if (
        _are(sympy.Equality, a, b)
        and _is_plain(a.lhs, a.rhs, b.lhs, b.rhs)
        and _proportional(a.lhs - a.rhs, b.lhs - b.rhs)
    ):
        return True
    if _is_plain(a, b):
        return _equal_at_points(a, b, places)
    settings: dict[str, Any] = {
        "float_rounding": 12,
        "numeric_precision": DIGITS,
        "allow_set_relation_comp": True,
        "timeout_seconds": timeout,
        "raise_on_error": True,
    }
    return bool(verify(b, a, **settings) or (_are(sympy.Set, a) and verify(a, b, **settings)))


def _are(kind: type, *objects: Any) -> bool:
    return all(isinstance(one, kind) for one in objects)


def _is_plain(*objects: Any) -> bool:
    import sympy

    return all(
        isinstance(one, sympy.Expr)
        and not one.has(sympy.zoo, sympy.nan)
        and not isinstance(one, sympy.MatrixExpr)
        for one in objects
    )


def _equal_at_points(a: Any, b: Any, places: int) -> bool | None:
    verdicts = {_close(x, y, places) for x, y in _values(a, b)}
    return False if False in verdicts else None if None in verdicts else True


def _proportional(a: Any, b: Any) -> bool:
    """Whether two expressions that are set to 0 differ by a factor."""
    ratios = [x / y for x, y in _values(a, b) if abs(y) > 1e-20]
    return len(ratios) > 1 and abs(ratios[0]) > 0 and all(_close(one, ratios[0], 0) for one in ratios)


def _values(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Both expressions where their variables have several values; i is the imaginary unit."""
    import sympy

    a, b = (
        _exact(one).subs({name: sympy.I for name in one.free_symbols if str(name) == "i"}) for one in (a, b)
    )
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    functions = sorted(
        a.atoms(sympy.core.function.AppliedUndef) | b.atoms(sympy.core.function.AppliedUndef), key=str
    )
    points = [sympy.Rational(str(point)) for point in POINTS]
    for turn in range(len(points) if names or functions else 1):
        at = {
            name: points[(turn + 3 * k) % len(points)] + k // 3 + turn
            for k, name in enumerate([*functions, *names])
        }
        x, y = (sympy.N(one.subs(at), DIGITS) for one in (a, b))
        if not (x.is_number and y.is_number):
            raise ValueError(f"{a} and {b} have no values to compare")
        yield x, y


def _exact(one: Any) -> Any:
    """An expression whose decimals are fractions."""
    import sympy

    return one.xreplace({number: sympy.Rational(str(number)) for number in one.atoms(sympy.Float)})


def _close(x: Any, y: Any, places: int) -> bool | None:
    """Equal to many digits; with decimals on one side, to as many as are written (None where those are under six)."""
    if x == y:
        return True
    if not (x.is_finite and y.is_finite):
        return False
    size = max(abs(x), abs(y))
    if abs(x - y) <= size * 10 ** (5 - DIGITS):
        return True
    return within_places(x, y, places) if size > 10.0**-places else False


def _places(text: str) -> int:
    return max((len(digits) for digits in re.findall(r"\d*\.(\d+)", text)), default=0)
