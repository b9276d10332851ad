"""What counts as a changed answer: by our graders, as the text of 2602.12395 has it, or as its released code does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hooks.errors import FrankenlensError
from interp.localization.outcomes import OUTCOMES, Grader, same_answer
from interp.questions.examples import Example
from interp.questions.grading import Ungraded, grade, judge

RULES = ("graded", "text", "code")
"""Ways to tell a changed answer.

- graded: it is no longer the model's own, as far as the example's grader can tell (`interp.localization.outcomes`).
- text: the paper's text. OCR: the text differs from the model's own; counting: the number differs; grounding: the box
  overlaps the *source's* by an IoU above 0.5; recognition: the answer is No. Elsewhere: the answer differs.
- code: the released code. The two texts differ, in lower case, without spaces around and punctuation behind them; where
  one of them has 20 characters or more, neither holds the other.
"""
_SHORT = 20


def with_changes(
    found: xr.Dataset,
    pairs: Sequence[tuple[Example, Example]],
    rule: str,
    grader: Grader = grade,
) -> xr.Dataset:
    """What `vision_swap` returns, with `changed` [swap example]: 1, 0, or NaN where a pair does not count.

    Args:
        found: of `vision_swap`.
        pairs: the same that it was given.
        rule: of `RULES`.
        grader: as given to `vision_swap`.

    Raises:
        FrankenlensError: another rule.
    """
    if rule not in RULES:
        raise FrankenlensError(f"{rule!r} is no rule for a changed answer; choose of {', '.join(RULES)}.")
    counted = found["outcome"].transpose("swap", "example").to_numpy()
    changed = np.where(np.isnan(counted), np.nan, counted != OUTCOMES.index("unchanged"))
    if rule != "graded":
        text = found["text"].transpose("swap", "example").to_numpy()
        clean = found["clean"].sel(side="target").to_numpy()
        for swap, row in np.argwhere(~np.isnan(counted)):
            own, now = str(clean[row]), str(text[swap, row])
            if rule == "code":
                differs = differs_in_code(own, now)
            else:
                differs = changed_in_text(now, own, pairs[row], grader)
            changed[swap, row] = float(differs)
    return found.assign(changed=(("swap", "example"), changed)).assign_attrs(change=rule)


def changed_in_text(now: str, own: str, pair: tuple[Example, Example], grader: Grader = grade) -> bool:
    """The rule of the paper's text; which one follows from the grader that the pair names.

    Args:
        now: the answer under the swap; "" where there is none.
        own: the model's own, without it.
        pair: target and source.
        grader: tells whether two answers are the same.
    """
    target, source = pair
    kind = target.meta.get("grader")
    if kind == "box":
        return judge(now, source).right is True
    if kind == "choice" and set(target.meta.get("choices", ())) == {"Yes", "No"}:
        no = Example(target.id, (), target.question, "No", meta=target.meta)
        return judge(now, no).right is True
    try:
        return not same_answer(now, own, target, grader)
    except Ungraded:
        return True  # what cannot be read as the same is not


def differs_in_code(own: str, now: str) -> bool:
    """The rule of the released code, on two texts."""
    one, other = (text.lower().strip().rstrip(".,!?;:") for text in (own, now))
    if len(one) < _SHORT and len(other) < _SHORT:
        return one != other
    return not (one in other or other in one)
