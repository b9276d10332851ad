"""Units of measure and money: which are the same quantity, and how many of one are one of the other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

_PREFIXES = {
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "c": Fraction(1, 100),
    "d": Fraction(1, 10),
    "m": Fraction(1, 1000),
}
_PREFIXES |= {"μ": Fraction(1, 10**6), "µ": Fraction(1, 10**6), "n": Fraction(1, 10**9)}
_PREFIX_WORDS = {"kilo": 10**3, "mega": 10**6, "centi": Fraction(1, 100), "deci": Fraction(1, 10)}
_PREFIX_WORDS |= {"milli": Fraction(1, 1000), "micro": Fraction(1, 10**6), "nano": Fraction(1, 10**9)}
_METRIC = {  # dimension: (symbol, words)
    "length": ("m", "meter metre"),
    "mass": ("g", "gram gramme"),
    "volume": ("L", "liter litre"),
    "time": ("s", "second"),
    "energy": ("J", "joule"),
    "power": ("W", "watt"),
    "force": ("N", "newton"),
    "pressure": ("Pa", "pascal"),
    "frequency": ("Hz", "hertz"),
    "voltage": ("V", "volt"),
    "current": ("A", "ampere amp"),
    "resistance": ("Ω", "ohm"),
}
_OTHERS = {  # spellings: (dimension, factor)
    "inch inches in": ("length", Fraction(254, 10**4)),
    "foot feet ft": ("length", Fraction(3048, 10**4)),
    "yard yards yd": ("length", Fraction(9144, 10**4)),
    "mile miles mi": ("length", Fraction(1609344, 1000)),
    "米 公尺 メートル": ("length", Fraction(1)),
    "厘米 公分 センチ": ("length", Fraction(1, 100)),
    "毫米": ("length", Fraction(1, 1000)),
    "公里 千米": ("length", Fraction(1000)),
    "l": ("volume", Fraction(1)),
    "ml": ("volume", Fraction(1, 1000)),
    "升": ("volume", Fraction(1)),
    "毫升": ("volume", Fraction(1, 1000)),
    "克": ("mass", Fraction(1)),
    "千克 公斤": ("mass", Fraction(1000)),
    "ton tons tonne tonnes 吨": ("mass", Fraction(10**6)),
    "pound pounds lb lbs": ("mass", Fraction(45359237, 10**5)),
    "ounce ounces oz": ("mass", Fraction(45359237, 16 * 10**5)),
    "sec secs 秒": ("time", Fraction(1)),
    "min mins minute minutes 分钟 分": ("time", Fraction(60)),
    "h hr hrs hour hours 小时 时": ("time", Fraction(3600)),
    "day days 天": ("time", Fraction(86400)),
    "week weeks 周": ("time", Fraction(7 * 86400)),
    "month months": ("months", Fraction(1)),
    "year years yr yrs 年": ("months", Fraction(12)),
    "° degree degrees deg 度": ("angle", Fraction(1)),
    "rad radian radians": ("radians", Fraction(1)),
    "°C": ("celsius", Fraction(1)),
    "°F": ("fahrenheit", Fraction(1)),
    "K kelvin": ("kelvin", Fraction(1)),
    "$ USD dollar dollars bucks 美元": ("dollars", Fraction(1)),
    "¢ cent cents": ("dollars", Fraction(1, 100)),
    "€ EUR euro euros 欧元": ("euros", Fraction(1)),
    "£ GBP": ("sterling", Fraction(1)),
    "¥ CNY RMB yuan 元": ("yuan", Fraction(1)),
    "₹ INR Rs rupee rupees": ("rupees", Fraction(1)),
    "₩ won 원": ("won", Fraction(1)),
    "JPY yen": ("yen", Fraction(1)),
    "px pixel pixels": ("pixels", Fraction(1)),
}
MONEY = "$€£¥₹₩"
_SHORT = {
    "kph": "km/h",
    "kmh": "km/h",
    "mph": "mi/h",
    "fps": "ft/s",
    "sqm": "m^2",
    "sqft": "ft^2",
    "cc": "cm^3",
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_PART = re.compile(r"(?P<name>[^\W\d_]+\.?|°[CF]?|[$€£¥₹₩¢])\^?(?P<power>-?\d)?")


@dataclass(frozen=True)
class Unit:
    """A unit that is known: how it is built of dimensions, and its size in the first unit of them."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


def unit_of(text: str) -> Unit | None:
    """The unit that a text is, whole; None where it is none that is known ("apples").

    Example:
        >>> from interp.questions.grading.units import unit_of
        >>> unit_of("km/h").factor, unit_of("square centimeters") == unit_of("cm^2"), unit_of("apples")
        (Fraction(5, 18), True, None)
    """
    text = re.sub(r"\s+per\s+", "/", _SHORT.get(text.strip(), text.strip()))
    dimensions: dict[str, int] = {}
    factor = Fraction(1)
    for place, side in enumerate(re.split(r"\s*/\s*", text)):
        sign = -1 if place else 1
        power = 1
        for word in re.split(r"[\s*·]+", _spaced(side)):
            if word.lower() in _POWERS:
                power = _POWERS[word.lower()]
                continue
            match = _PART.fullmatch(word)
            known = _single(match["name"].rstrip(".")) if match else None
            if match is None or known is None:
                return None
            power = sign * power * int(match["power"] or 1)
            dimensions[known[0]] = dimensions.get(known[0], 0) + power
            factor *= known[1] ** power
            power = 1
    if dimensions.get("length", 0) and set(dimensions) == {"length"} and dimensions["length"] == 3:
        dimensions, factor = {"volume": 1}, factor * 1000
    return Unit(tuple(sorted((name, power) for name, power in dimensions.items() if power)), factor)


def _spaced(text: str) -> str:
    return re.sub(r"(平方|立方)", r"\1 ", text)


@cache
def _single(name: str) -> tuple[str, Fraction] | None:
    for spellings, known in _OTHERS.items():
        if name in (words := spellings.split()) or (len(name) > 2 and name.lower() in words):
            return known
    for dimension, (symbol, words) in _METRIC.items():
        if name == symbol:
            return dimension, Fraction(1)
        if name.endswith(symbol) and name[: -len(symbol)] in _PREFIXES:
            return dimension, Fraction(_PREFIXES[name[: -len(symbol)]])
        for word in words.split():
            start = name.lower().removesuffix("s").removesuffix(word)
            if start != name.lower().removesuffix("s") and (not start or start in _PREFIX_WORDS):
                return dimension, Fraction(_PREFIX_WORDS.get(start, 1))
    return None
