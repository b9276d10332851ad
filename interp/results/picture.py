"""A figure that says what it draws, and the one way in which layers stand along an axis."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LAYER = "layer (from 0)"
"""What stands beside every axis of layers: the first block is layer 0, as in the address `blocks.0`."""
_TICKS = 13


class Picture(Figure):
    """A matplotlib figure with its caption, laid out so that an account fits below it.

    Arguments:
        caption: what is drawn: what a mark, a line, a band and a colour stand for. It is printed on the file and stands
            below the figure on the page.
        settings: as of `matplotlib.figure.Figure`.

    Attributes:
        sentence: why nothing is drawn; "" where something is.
    """

    def __init__(self, caption: str, **settings: Any) -> None:
        super().__init__(**{"layout": "constrained", **settings})
        self.caption = caption
        self.sentence = ""


def nothing(sentence: str) -> Picture:
    """A picture of a sentence, where there is nothing to draw."""
    picture = Picture(sentence, figsize=(8, 0.5 + 0.22 * len(textwrap.wrap(sentence, 100))))
    axes = picture.add_subplot()  # notebooks show no figure that is without axes
    axes.set_axis_off()
    axes.text(0, 0.5, "\n".join(textwrap.wrap(sentence, 100)), fontsize=10, va="center")
    picture.sentence = sentence
    return picture


def caption_of(figure: Figure) -> str:
    """The caption of a figure; "" of one that is no `Picture`, or that says all it has to in a sentence."""
    return figure.caption if isinstance(figure, Picture) and not figure.sentence else ""


def along_layers(axes: Axes, layers: Iterable[Any], label: str = LAYER) -> None:
    """Whole numbers from 0 to the last layer along the x axis, whichever layers are drawn."""
    last = max((int(layer) for layer in layers), default=0)
    axes.set_xticks(range(0, last + 1, -(-(last + 1) // _TICKS)))
    axes.set_xlim(-0.6, last + 0.6)
    axes.set_xlabel(label, fontsize=8)
