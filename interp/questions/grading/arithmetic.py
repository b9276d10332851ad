"""The value of closed arithmetic: numbers, + - * / ^ !, brackets, roots, pi. Exact as long as it is rational."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

LARGEST = 10**4
"""Beyond this many digits no power and no factorial is worked out."""

LONGEST = 300
"""Characters of arithmetic that is worked out."""

Value = Fraction | float
"""A float stands for an irrational value."""

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3})?|\.\d+|sqrt|cbrt|pi|[-+*/^!()])")
_ROOTS = {"sqrt": 2, "cbrt": 3}


class NotArithmetic(ValueError):
    """The text is no closed arithmetic, or its value is not worked out."""


def value_of(text: str) -> Value:
    """The value of a text, all of it.

    Raises:
        NotArithmetic: something in it cannot be read, it divides by 0, or it is too large.

    Example:
        >>> from interp.questions.grading.arithmetic import value_of
        >>> value_of("2 1/2"), value_of("3!"), value_of("sqrt(16)"), value_of("1.5 * 10^-3")
        (Fraction(5, 2), Fraction(6, 1), Fraction(4, 1), Fraction(3, 2000))
    """
    reader = _Reader(_tokens(text))
    found = reader.sum()
    if reader.left:
        raise NotArithmetic(f"{text!r} goes on behind {reader.at} signs")
    return found


def _tokens(text: str) -> list[str]:
    if len(text) > LONGEST:
        raise NotArithmetic(f"{len(text)} characters of arithmetic are not worked out")
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotArithmetic(f"{text!r} holds {text[at:].strip()[:1]!r}")
        found.append(match[1])
        at = match.end()
    return found


@dataclass
class _Reader:
    """Recursive descent, one method per level of precedence."""

    tokens: list[str]
    at: int = 0

    @property
    def left(self) -> bool:
        return self.at < len(self.tokens)

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.left else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def sum(self) -> Value:
        total = self.product()
        while self.next in ("+", "-"):
            total = total + self.product() if self.take() == "+" else total - self.product()
        return total

    def product(self) -> Value:
        total = self.signed()
        while self.next in ("*", "/") or self.next in ("(", "pi", *_ROOTS):
            sign = self.take() if self.next in ("*", "/") else "*"
            factor = self.signed()
            if sign == "/" and factor == 0:
                raise NotArithmetic("it divides by 0")
            total = total * factor if sign == "*" else total / factor
        return total

    def signed(self) -> Value:
        if self.next in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> Value:
        base = self.factorial()
        if self.next != "^":
            return base
        self.take()
        return _power(base, self.signed())

    def factorial(self) -> Value:
        found = self.atom()
        while self.next == "!":
            self.take()
            if not isinstance(found, Fraction) or found.denominator != 1 or not 0 <= found <= 1000:
                raise NotArithmetic(f"the factorial of {found} is not worked out")
            found = Fraction(math.factorial(int(found)))
        return found

    def atom(self) -> Value:
        token = self.take()
        if token == "pi":
            return math.pi
        if token in _ROOTS:
            return _power(self.bracket(), Fraction(1, _ROOTS[token]))
        if token == "(":
            self.at -= 1
            return self.bracket()
        if not token[:1].isdigit() and token[:1] != ".":
            raise NotArithmetic(f"there is {token or 'nothing'!r} where a number should be")
        whole = Fraction(token)
        mixed = self.tokens[self.at : self.at + 3]  # 2 1/2
        if (
            len(mixed) == 3
            and mixed[1] == "/"
            and mixed[0].isdigit()
            and mixed[2].isdigit()
            and token.isdigit()
        ):
            self.at += 3
            if int(mixed[2]) == 0:
                raise NotArithmetic("it divides by 0")
            return whole + Fraction(int(mixed[0]), int(mixed[2]))
        return whole

    def bracket(self) -> Value:
        if self.take() != "(":
            raise NotArithmetic("a root of nothing in brackets")
        found = self.sum()
        if self.take() != ")":
            raise NotArithmetic("a bracket is not closed")
        return found


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if base == 0 and exponent < 0:
            raise NotArithmetic("it divides by 0")
        digits = max(len(str(base.numerator)), len(str(base.denominator))) * abs(exponent)
        if digits > LARGEST or exponent.denominator > 10:
            raise NotArithmetic(f"{base}^{exponent} is not worked out")
        if (exact := _root(base, exponent.denominator)) is not None:
            return exact**exponent.numerator
    try:
        found = float(base) ** float(exponent)
    except (OverflowError, ZeroDivisionError) as error:
        raise NotArithmetic(f"{base}^{exponent} is not worked out") from error
    if isinstance(found, complex):
        raise NotArithmetic(f"{base}^{exponent} is no real number")
    return found


def _root(base: Fraction, degree: int) -> Fraction | None:
    """The root of a fraction where it is rational."""
    if degree == 1:
        return base
    if base < 0:
        return None
    above, below = (_whole_root(part, degree) for part in (base.numerator, base.denominator))
    return None if above is None or below is None else Fraction(above, below)


def _whole_root(number: int, degree: int) -> int | None:
    if number.bit_length() > 3000:
        return None
    guess = math.isqrt(number) if degree == 2 else round(number ** (1 / degree))
    return guess if guess**degree == number else None
