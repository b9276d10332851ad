"""Every architecture: taken up behind any block under other weights, its logits are those of a whole run, bit for bit;
or it is known not to, and runs whole."""

from __future__ import annotations

import pytest
import torch

from hooks import HookedVLM
from interp.transfer.grafts import Graft, grafted
from interp.transfer.prefixes import BLOCKS, Step
from interp.transfer.replays import Replays, _logits, proved
from tests.architectures import ARCHITECTURES, build

WHOLE = {
    "glm5_next": "not one stream",
    "gemma3n": "not one stream",
    "inkling2": "other logits",
    "mistral_large4": "give out more than the stream",
    "gemma4+shared_keys": "KeyError",  # later blocks read keys that earlier ones hand on
    "diffusion_gemma": "GenerationConfig",
    "pi0": "generation_config",
    "blip": "no cache of layers",
    "idefics": "no cache of layers",
    **dict.fromkeys(
        ("t5gemma2", "florence2", "udop", "pix2struct", "pp_formulanet", "vision-encoder-decoder"),
        "has an encoder",
    ),
}
"""What does not share, and a piece of the reason."""
FEW = ("mllama", "qwen3_5", "llava+gemma2", "gemma4+shared_keys")


@torch.no_grad()
def _check(name: str) -> None:
    own, other = build(name), build(name, seed=1)
    vlm = HookedVLM(own.model, inputs=own.inputs, check=False)
    donor = HookedVLM(other.model, inputs=own.inputs, check=False)
    levels, front = range(1, vlm.n_layers), bool(vlm.anatomy.vision.blocks)
    reason = proved(vlm, vlm.opening, range(1, vlm.n_layers + 1), front)
    assert (WHOLE[name] in reason) if name in WHOLE else (reason == ""), reason
    if reason:
        return
    kept = Replays(vlm)
    with kept.running(Step("whole", 0, front, tuple(levels))):
        whole = _logits(vlm, vlm.opening)
    for level in reversed(levels):
        with grafted(vlm, donor, Graft((f"blocks.{level}-{vlm.n_layers - 1}",)), rounded=True):
            plain = _logits(vlm, vlm.opening)
            with kept.running(Step("again", BLOCKS + level, False, ())):
                again = _logits(vlm, vlm.opening)
        assert kept.start == level
        assert all(map(torch.equal, plain, again)), level
        assert not torch.equal(plain[0], whole[0])


@pytest.mark.parametrize("name", FEW)
def test_a_few_are_the_same_taken_up_behind_any_block(name: str) -> None:
    _check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FEW])
def test_every_architecture_is_the_same_taken_up_behind_any_block(name: str) -> None:
    _check(name)
