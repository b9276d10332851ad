"""What lockstep generation refuses before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from interp.lockstep.moved import Moved, require_roles, sites
from interp.prompts import Prompt


def require_sound(
    donor: HookedVLM,
    recipient: HookedVLM,
    prompts: Sequence[Prompt],
    moved: Sequence[Moved],
    max_new_tokens: int,
) -> None:
    """Refuse what lockstep cannot do; see `interp.lockstep.lockstep`.

    Raises:
        FrankenlensError: names the thing, and the row where there is one.
    """
    sizes = [_vocabulary(vlm) for vlm in (donor, recipient)]
    if sizes[0] != sizes[1]:
        raise FrankenlensError(
            f"the donor's next-token distribution has {sizes[0]} entries and the recipient's {sizes[1]}: the two do "
            "not read the same tokens. Lockstep takes two models of one vocabulary, such as IN and RL of a Pair"
        )
    shapes = [(vlm.n_layers, vlm.n_heads, vlm.d_model) for vlm in (donor, recipient)]
    if moved and shapes[0] != shapes[1]:
        raise FrankenlensError(
            f"donor and recipient differ in (layers, heads, d_model): {shapes[0]} and {shapes[1]}"
        )
    for vlm in (donor, recipient):
        vlm.require("attention", "generation in lockstep")
        require_fits(vlm, prompts, max_new_tokens)
        sites(vlm, moved)
    require_roles(moved, prompts)


def require_fits(vlm: HookedVLM, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Refuse a prompt that, with all that may be written after it, is longer than the model's context.

    Raises:
        FrankenlensError: names the row.
    """
    if max_new_tokens < 1:
        raise FrankenlensError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    context = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if context is not None and len(prompt) + max_new_tokens > context:
            room = max(context - len(prompt), 0)
            raise FrankenlensError(
                f"row {row} ({prompt.example.id}): {len(prompt)} tokens and {max_new_tokens} to be written are longer "
                f"than the context of {type(vlm.model).__name__}, {context} tokens; give max_new_tokens of at most "
                f"{room}, or leave the row out"
            )


def _vocabulary(vlm: HookedVLM) -> int:
    weight: Tensor = vlm.model.get_parameter(f"{vlm.anatomy.unembed}.weight")
    return weight.shape[0]
