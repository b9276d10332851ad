"""Number words written in digits, so that one reader sees all numbers: English, Chinese and Japanese, some Korean.

Of five other languages, an answer that is one number word is read, and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

_UNITS = {
    word: number
    for number, word in enumerate(
        (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen"
        ).split()
    )
}
_TENS = {
    word: 10 * number
    for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_SCALES = {
    "hundred": 100,
    "dozen": 12,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_PLURALS = {
    "tens": 10,
    "hundreds": 100,
    "dozens": 12,
    "thousands": 10**3,
    "millions": 10**6,
    "billions": 10**9,
}
_PARTS = {
    word: number
    for number, word in enumerate("half third quarter fifth sixth seventh eighth ninth tenth".split(), 2)
} | {
    "fourth": 4,
    "eleventh": 11,
    "twelfth": 12,
    "twentieth": 20,
    "thirtieth": 30,
    "hundredth": 100,
    "thousandth": 1000,
}
_ORDINALS = {
    word: number
    for number, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), 1
    )
}
_WORD = "|".join(sorted([*_UNITS, "fourty", *_TENS, *_SCALES], key=len, reverse=True))
_RUN = re.compile(
    rf"\b(?:an?[ -]+(?=(?:{'|'.join(_SCALES)})\b))?(?:{_WORD})(?:[ -]+(?:and[ -]+)?(?:{_WORD}))*\b", re.I
)
_PART = "|".join([*_PARTS, "halve"])
_NOT_A_NUMBER_ONE = re.compile(
    r"\b(?:the|this|that|which|each|every|any|no|some|other|another)[ -]+one\b", re.I
)
_COUNTING = (
    "is are was were only just exactly equals be answer total count at least most and or about plus minus has have see"
).split()
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_ELSEWHERE = {
    word: number
    for words in (
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
        "siebzehn achtzehn neunzehn zwanzig",
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
        "dix-huit dix-neuf vingt",
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
        "diecisiete dieciocho diecinueve veinte",
        "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici "
        "sedici diciassette diciotto diciannove venti",
        "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis dezessete "
        "dezoito dezenove vinte",
    )
    for number, word in enumerate(words.split())
}
_MEASURES = (
    "个個只隻张張条條本件位名头頭匹辆輛把支枝片块塊颗顆朵棵根双雙对對座间間层層元米厘"
    "公克升秒分小岁歲次つ人枚台天日月年种種"
)
_HAN = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_HAN_SCALES = {"十": 10, "百": 100, "千": 1000}
_HAN_GROUPS = {"万": 10**4, "萬": 10**4, "만": 10**4, "亿": 10**8, "億": 10**8, "억": 10**8}
_HAN_RUN = re.compile(f"[{''.join([*_HAN, *_HAN_SCALES, *_HAN_GROUPS])}]+")
_KOREAN = {
    word: number
    for words in ("하나 둘 셋 넷 다섯 여섯 일곱 여덟 아홉 열", "한 두 세 네")
    for number, word in enumerate(words.split(), 1)
}
_KOREAN_RUN = re.compile(
    rf"(?<![가-힣])({'|'.join(_KOREAN)})\s*(?=개|명|마리|대|권|번|살|장|잔|송이|그루|입니다|이다|\W|$)"
)
_ROMAN = re.compile(r"M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_ROMAN_DIGITS = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}


def in_digits(text: str) -> str:
    """The text with its number words in digits.

    Example:
        >>> from interp.questions.grading.numerals import in_digits
        >>> in_digits("twenty-one cats"), in_digits("two and three quarters"), in_digits("minus 1.5 million")
        ('21 cats', '2 3/4', '-1500000')
        >>> in_digits("一共十二个"), in_digits("三分之二"), in_digits("the red one and that one")
        ('一共12个', '2/3', 'the red one and that one')
    """
    if (whole := _whole(text.strip(" .!?\"'()"))) is not None:
        return whole
    text = re.sub(r"(?<=[^\W\d_])!", ".", text)  # no factorial of a word
    return _operations(_english(_asian(text)))


def _whole(text: str) -> str | None:
    """What is a number word only where nothing stands beside it."""
    low = text.casefold().removeprefix("the ")
    if low in _ORDINALS:
        return f"{_ORDINALS[low]}"
    if low in _ELSEWHERE and low not in _UNITS:
        return f"{_ELSEWHERE[low]}"
    if low in ("none", "nil", "nought", "naught"):
        return "0"
    if len(text) > 1 and _ROMAN.fullmatch(text):
        values = [_ROMAN_DIGITS[c] for c in text]
        return str(sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True)))
    return None


def _english(text: str) -> str:
    text = _scaled_digits(text)
    keep = [match.end() - 3 for match in _NOT_A_NUMBER_ONE.finditer(text)]
    text = _scaled_digits(
        _RUN.sub(lambda m: m[0] if m.start() in keep or _pronoun(m, text) else _in_words(m[0]), text)
    )
    text = re.sub(
        r"(?i)\b(\d+) point ((?:\d+ ?)+)\b", lambda m: f"{m[1]}.{m[2].replace(' ', '')} ".rstrip(), text
    )
    text = re.sub(rf"(?i)\b(\d+)[ -]+({_PART})s\b", lambda m: f"{m[1]}/{_part(m[2])}", text)
    text = re.sub(
        rf"(?i)\b(?:an?|1)[ -]+({_PART})\b(?![ -]+(?:place|time))", lambda m: f"1/{_part(m[1])}", text
    )
    text = re.sub(r"(?i)\bhalf (?:of )?(?:an? )?(\d[\d,]*)\b", lambda m: _decimal(_fraction(m[1]) / 2), text)
    text = re.sub(
        r"(?i)\bhalf an? (hundred|thousand|million|billion|dozen)\b",
        lambda m: str(_SCALES[m[1].lower()] // 2),
        text,
    )
    text = re.sub(r"(?i)(?:(?<=^)|(?<=is )|(?<=are )|(?<=about ))half(?![ -]?\w*way)\b", "1/2", text)
    return re.sub(r"(?i)\b(\d+)[ -]+and[ -]+(\d+/\d+)", r"\1 \2", text)


def _scaled_digits(text: str) -> str:
    """ "3 million", "2 hundred thousand", "5 tens"."""
    sizes = _SCALES | _PLURALS
    names = "|".join(sorted(sizes, key=len, reverse=True))
    return re.sub(
        rf"(?i)\b({_NUMBER})[ -]+({names})(?:[ -]+({names}))?\b",
        lambda m: _decimal(_fraction(m[1]) * sizes[m[2].lower()] * sizes.get((m[3] or "").lower(), 1)),
        text,
    )


def _pronoun(match: re.Match[str], text: str) -> bool:
    """ "the red one": nothing is counted."""
    if match[0].casefold() != "one":
        return False
    before = re.findall(r"[\w']+", text[: match.start()])
    ends = re.match(
        r"\W*$|\W*[.!?,;]|\s+(?:with|on|in|at|that|which|who|to|from|and|or)\b", text[match.end() :]
    )
    return bool(before and ends and before[-1].casefold() not in _COUNTING)


def _in_words(run: str) -> str:
    """A run of number words as one number, or as several where they make no single one."""
    return " ".join(_numbers(re.split(r"[ -]+", run.casefold())))


def _numbers(words: list[str]) -> Iterator[str]:
    total, current, pending = 0, None, False
    for word in words:
        if word in ("a", "an"):
            continue
        if word == "and":
            pending = True
            continue
        value = _UNITS.get(word, _TENS.get(word, 40 if word == "fourty" else None))
        if word in _SCALES and (current is not None or not total):
            current, total = _scaled(word, current, total)
        elif value is not None and _fits(value, current, total):
            current = (current or 0) + value
        else:
            yield str(total + (current or 0))
            yield from ["and"] if pending else []
            total, current = 0, value
            if value is None:
                current, total = _scaled(word, None, 0)
        pending = False
    yield str(total + (current or 0))


def _scaled(word: str, current: int | None, total: int) -> tuple[int | None, int]:
    if word in ("hundred", "dozen"):
        return (1 if current is None else current) * _SCALES[word], total
    return None, total + (1 if current is None else current) * _SCALES[word]


def _fits(value: int, current: int | None, total: int) -> bool:
    if current is None:
        return True
    room = current % 100 if current else 0
    if current and room == 0:
        return True
    return bool(room) and room >= 20 and room % 10 == 0 and 0 < value < 10


def _part(word: str) -> int:
    return 2 if word.casefold() in ("half", "halve") else _PARTS[word.casefold()]


def _operations(text: str) -> str:
    """Signs that are said in words."""
    for pattern, said in (
        (r"(?i)(?<=\d)\s+(?:minus|less)\s+(?=[\d(])", " - "),
        (r"(?i)\b(?:minus|negative)[ -]+(?=[\d($€£.])", "-"),
        (r"(?:负|負|减|マイナス)\s*(?=\d)", "-"),
        (r"(?i)(?<=\d)\s+plus\s+(?=[\d(])", " + "),
        (r"(?i)(?<=\d)\s+times\s+(?=[\d(])", " * "),
        (r"(?i)(?<=\d)\s+divided by\s+(?=[\d(])", " / "),
        (r"(?i)(?<=\d)\s+(?:out of|over)\s+(?=\d)", "/"),
        (r"(?i)(?<=\d)\s+squared\b", "^2"),
        (r"(?i)(?<=\d)\s+cubed\b", "^3"),
    ):
        text = re.sub(pattern, said, text)
    return text


def _asian(text: str) -> str:
    text = text.replace("百分之", "％")
    text = _HAN_RUN.sub(lambda m: _han(m, text), text)
    text = re.sub(r"％\s*(\d+(?:\.\d+)?)", r"\1%", text).replace("％", "百分之")
    text = re.sub(r"(\d+)\s*分之\s*(\d+)", r"\2/\1", text)
    text = re.sub(r"(?<=\d)[点點](?=\d)", ".", text)
    text = re.sub(r"(\d+)\s*[个個]半", r"\1 1/2", text)
    text = re.sub(r"(?:1|一)半", "1/2", text)
    groups = "".join(_HAN_GROUPS)
    text = re.sub(
        rf"(?<!\d)(?<!\d,)({_NUMBER})\s*([{groups}千百])",
        lambda m: _decimal(_fraction(m[1]) * (_HAN_GROUPS | _HAN_SCALES)[m[2]]),
        text,
    )
    return _KOREAN_RUN.sub(lambda m: f"{_KOREAN[m[1]]}", text)


def _han(match: re.Match[str], text: str) -> str:
    run, before, after = match[0], text[: match.start()], text[match.end() :]
    if run in _HAN_GROUPS or before[-1:].isdigit():
        return run  # a scale behind digits
    partial = before.endswith(("分之", "％", "点", "點")) or after.startswith(("分之", "半", "点", "點"))
    if len(run) == 1 and not partial and re.match(rf"(?!\s*$)(?![{_MEASURES}])[^\W\d_]", after):
        return run  # part of another word: 一共, 三角形
    total = group = 0
    digit: int | None = None
    for c in run:
        if c in _HAN:
            if digit:
                return run  # 二三: two or three
            digit = _HAN[c]
        elif c in _HAN_SCALES:
            group, digit = group + (1 if digit is None else digit) * _HAN_SCALES[c], None
        else:
            total, group, digit = total + (group + (digit or 0)) * _HAN_GROUPS[c], 0, None
    return str(total + group + (digit or 0))


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _decimal(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else str(float(value))
