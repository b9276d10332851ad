"""Which tower sees the image, what hands it on, and that one stream is one tower, held against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from hooks import FrankenlensError, HookedVLM
from tests.architectures import ARCHITECTURES, build
from tests.hooks.reference import tolerance

SEES = {
    "t5gemma2": ("model.encoder.vision_tower", "model.encoder.text_model"),
    "diffusion_gemma": ("model.encoder.vision_tower", "model.encoder.language_model"),
    "florence2": ("model.vision_tower.blocks", "model.language_model.encoder"),
    "udop": ("", "encoder"),  # patches and words in one stream
    "evolla": ("", "model.protein_encoder"),
    "mllama": ("model.vision_model.transformer", "model.vision_model.global_transformer"),
}
"""The vision tower, and the last of the others."""
NO_PROJECTOR = {
    "ovis2": "runs more than once",
    "blip": "no row of its decoder's input",
    "udop": "no row of its decoder's input",
    "pix2struct": "no row of its decoder's input",
    "pp_formulanet": "no row of its decoder's input",
    "vision-encoder-decoder": "no row of its decoder's input",
}
DEFAULT = (
    "t5gemma2",
    "udop",
    "ovis2",
    "pix2struct",
    "llava",
    "qwen3_vl",
    "mllama",
    "granite4_vision",
    "idefics",
)


def some(names: Any) -> list[Any]:
    return [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(SEES))
def test_the_vision_tower_is_the_one_that_sees_the_image(name: str) -> None:
    given = build(name)
    anatomy = HookedVLM(given.model, inputs=given.inputs, check=False).anatomy
    vision, other = SEES[name]
    assert anatomy.vision.path == vision
    assert anatomy.others[-1].path == other


@pytest.mark.parametrize("name", some(NO_PROJECTOR))
def test_a_projector_that_is_none_is_absent_with_the_reason(name: str) -> None:
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs, check=False)
    assert NO_PROJECTOR[name] in vlm.anatomy.absent["projector"]
    with pytest.raises(FrankenlensError, match="projector"):
        vlm.require("projector", "a patch of the image")


@pytest.mark.parametrize("name", some(ARCHITECTURES))
@torch.no_grad()
def test_what_the_projector_gives_out_is_the_image(name: str) -> None:
    """Other pixels, other rows; it runs once; and no row of the decoder's input that follows the pixels is missing."""
    given = build(name)
    model, inputs = given.model, given.inputs
    vlm = HookedVLM(model, inputs=inputs, check=False)
    if not vlm.anatomy.projector:
        return
    noise = torch.Generator().manual_seed(9)
    others = {
        key: torch.where(value == value.round(), value, value + torch.randn(value.shape, generator=noise))
        for key, value in inputs.items()
        if "pixel" in key and value.is_floating_point()
    }
    own, changed = (_seen(vlm, values) for values in (inputs, {**inputs, **others}))
    assert len(own["projector"]) == 1
    (rows,), (moved,) = own["projector"], changed["projector"]
    assert (rows - moved).abs().max() > 1e-2 * rows.abs().max()
    first, second = own["handed"][0], changed["handed"][0]
    follows = (first != second).any(-1)
    if not bool(follows.any()):  # it is read across
        return
    made = {tuple(row.tolist()) for row in rows.reshape(-1, rows.shape[-1])}
    words = own["embed"][0]
    lost = [row for row in first[follows] if tuple(row.tolist()) not in made]
    if lost:  # they were added to the embeddings of the placeholders
        assert torch.equal(words[follows] + rows.reshape(-1, rows.shape[-1]), first[follows])


def _seen(vlm: HookedVLM, inputs: Any) -> dict[str, list[Tensor]]:
    """What the projector gives out, what the decoder (or the encoder of words) is handed, and the words' embeddings."""
    seen: dict[str, list[Tensor]] = {"projector": [], "handed": [], "embed": []}
    anatomy = vlm.anatomy
    encoders = [t for t in anatomy.others if t.blocks and t.path.startswith("model.encoder")]
    entry = encoders[-1].path if encoders else anatomy.entry

    def made(module: nn.Module, args: tuple, output: Any) -> None:
        value = getattr(output, anatomy.projector_key) if anatomy.projector_key else output
        seen["projector"].append((value[0] if isinstance(value, tuple | list) else value).clone())

    def handed(module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [kwargs.get("inputs_embeds"), *args, *kwargs.values()]
        floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 3]
        seen["handed"].extend(v.clone() for v in floats[:1])

    if anatomy.entry_key == "" and not encoders:  # what the embeddings give out
        seen["handed"] = seen["embed"]
    handles = [
        vlm.module(anatomy.projector).register_forward_hook(made),
        vlm.module(entry).register_forward_pre_hook(handed, with_kwargs=True),
        vlm.module(anatomy.embed).register_forward_hook(lambda m, a, out: seen["embed"].append(out.clone())),
    ]
    vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", some(ARCHITECTURES))
@torch.no_grad()
def test_a_stream_that_changes_between_blocks_is_told(name: str) -> None:
    given = build(name)
    vlm = HookedVLM(given.model, inputs=given.inputs, check=False)
    ends = [
        (f"blocks.{i}.hook_resid_post", f"blocks.{i + 1}.hook_resid_pre") for i in range(vlm.n_layers - 1)
    ]
    if not ends:
        return
    _, cache = vlm.run_with_cache(given.inputs, [name for pair in ends for name in pair])
    changed = [
        str(layer)
        for layer, (post, pre) in enumerate(ends)
        if cache[post].shape != cache[pre].shape or (cache[post] - cache[pre]).abs().max() > 1e-3
    ]
    untold = [layer for layer in changed if int(layer) not in vlm.anatomy.deepstack]
    assert bool(untold) == ("sum" in vlm.anatomy.absent)
    if untold:
        assert f"behind blocks {', '.join(untold)}" in vlm.anatomy.absent["sum"]
        with pytest.raises(FrankenlensError, match="sum of known writers"):
            vlm.require("additive blocks", "direct logit attribution")


@torch.no_grad()
def test_lists_of_one_stream_are_one_tower() -> None:
    """A Llama whose layers are in two lists: one decoder of four blocks, each read and written where it runs."""
    given = build("llama")
    model: Any = given.model
    inner = model.model
    layers = list(inner.layers)
    inner.dense_layers, inner.layers = nn.ModuleList(layers[:1]), nn.ModuleList(layers[1:])

    def forward(input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        hidden = inner.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        rotary = inner.rotary_emb(hidden, position_ids=places)
        for layer in (*inner.dense_layers, *inner.layers):
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        return BaseModelOutputWithPast(last_hidden_state=inner.norm(hidden))

    inner.forward = forward
    ids = {"input_ids": given.inputs["input_ids"]}
    bare = model(**ids).logits
    vlm = HookedVLM(model, inputs=ids)
    assert vlm.n_layers == len(layers)
    assert not vlm.anatomy.others and not vlm.anatomy.vision.blocks
    assert [vlm.module(block.path) for block in vlm.anatomy.text.blocks] == layers

    handle = layers[0].register_forward_hook(lambda module, args, output: output * 2)
    plain = model(**ids).logits
    handle.remove()
    ours = vlm.run_with_hooks(ids, [("blocks.0.hook_resid_post", lambda a, hook: a * 2)]).logits
    assert (ours - plain).abs().max() <= tolerance(plain)
    assert (ours - bare).abs().max() > 100 * tolerance(plain)


@torch.no_grad()
def test_layers_that_look_at_images_stand_where_they_run() -> None:
    """Idefics keeps them in a list of their own; they run before layers 0 and 2 of the language model."""
    given = build("idefics")
    vlm = HookedVLM(given.model, inputs=given.inputs, check=False)
    crossing = [i for i, block in enumerate(vlm.anatomy.text.blocks) if block.writer("cross_attn")]
    assert crossing == [0, 3] and vlm.n_layers == 6
