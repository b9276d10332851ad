"""How fast a machine computes: a rate that is stated, or that of a short matrix product on this one."""

from __future__ import annotations

import re
import time

import torch

from hooks.errors import FrankenlensError, shown

_RATE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s{0,4}([kKMGTPE]?)FLOPS?(?:/s)?", re.IGNORECASE)
_STEPS = "KMGTPE"


def parse_rate(text: str) -> float:
    """FLOPs a second of "50TFLOP/s".

    Raises:
        FrankenlensError: it is no rate.
    """
    match = _RATE.fullmatch(text.strip())
    number, letter = match.groups() if match else ("0", "")
    rate = float(number) * 1000.0 ** (_STEPS.index(letter.upper()) + 1 if letter else 0)
    if rate <= 0:
        raise FrankenlensError(f'{shown(text)} is no rate; give such as "50TFLOP/s"')
    return rate


def measured_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.3, side: int = 1024) -> float:
    """FLOPs a second of a square matrix product, in the type of the weights, as often as fits in some seconds."""
    one = torch.randn(side, side, device=device).to(dtype)
    _product(one)
    begun, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - begun < seconds:
        _product(one)
        n += 1
    return 2 * side**3 * n / (time.perf_counter() - begun)


def _product(one: torch.Tensor) -> None:
    """A product that is over when this returns, on any device."""
    (one @ one)[0, 0].item()


def amount(n: int | float, unit: str, base: int = 1000) -> str:
    """A number with the unit that suits it: 3.2 GiB, 41 TFLOP."""
    letters = ["", *_STEPS]
    step = 0
    while abs(n) >= base and step < len(letters) - 1:
        n, step = n / base, step + 1
    letter = letters[step] + ("i" if base == 1024 and step else "")
    digits = f"{n:.0f}" if n >= 100 or step == 0 else f"{n:.3g}"
    return f"{digits} {letter}{unit}"


def duration(seconds: int | float) -> str:
    """Seconds, minutes, hours or days, whichever says it shortest."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
