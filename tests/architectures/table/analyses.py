"""Lens, attribution, paths, knockout and grafts, each against the same worked out with plain PyTorch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hooks import weight_slices
from interp.attention.shift import attention_mass
from interp.knockout import Knockout, knockout_effects
from interp.lens import direct_logit_attribution, logit_lens
from interp.map import attribute_within
from interp.paths import path_effects
from interp.transfer.grafts import Graft, everything, grafted
from tests.architectures.table import plain
from tests.architectures.table.bench import Bench, largest, worst
from tests.architectures.table.cells import ABSENT, FAILS, YES, Cell, finite, within
from tests.architectures.table.sweeping import verdict


def _streams(bench: Bench) -> list[Tensor]:
    """What every decoder block reads, and what the last one leaves, by plain hooks."""
    blocks = bench.vlm.anatomy.text.blocks
    seen = plain.look(bench.vlm.model, bench.inputs, {block.path for block in blocks})
    last = plain.first(seen.outs[blocks[-1].path])
    return [*(plain.given(seen, block.path, block.key) for block in blocks), last]


def _read_out(bench: Bench, stream: Tensor) -> Tensor:
    """Logits of a stream, by the model's final norm and unembedding, scaled and capped as its last layer is."""
    anatomy = bench.vlm.anatomy
    raw = bench.vlm.module(anatomy.unembed)(bench.vlm.module(anatomy.final_norm)(stream))
    logits = raw * anatomy.scale
    return logits if anatomy.softcap is None else torch.tanh(logits / anatomy.softcap) * anatomy.softcap


@torch.no_grad()
def lens_cell(bench: Bench) -> Cell:
    """Log-probabilities of a word at every layer and token."""
    word = int(bench.metric.a[0])
    found = logit_lens(bench.vlm, bench.prompts, where="all", top_k=1, targets=[word, word], progress=False)
    streams = _streams(bench)
    off = {"the model's own output": largest(_read_out(bench, streams[-1]), bench.clean)}
    for layer, stream in enumerate(streams):
        logp = _read_out(bench, stream).double().log_softmax(-1)[..., word].flatten().numpy()
        ours = found["target_logp"].sel(layer=layer).to_numpy()
        off[f"layer {layer}"] = within(torch.tensor(ours), torch.tensor(logp))
    name, number = worst(off)
    if not number <= 1.0:
        return Cell(FAILS, f"{name} is {number:.1e} times what is allowed off")
    return Cell(YES, "", number, found["target_logp"].size)


@torch.no_grad()
def attribution_cell(bench: Bench) -> Cell:
    """Direct logit attribution adds up to the logit, head by head and writer by writer."""
    word, anatomy = int(bench.metric.a[0]), bench.vlm.anatomy
    found = direct_logit_attribution(
        bench.vlm, bench.prompts, tokens=[word, word], where="all", progress=False
    )
    last = _streams(bench)[-1]
    raw = bench.vlm.module(anatomy.unembed)(bench.vlm.module(anatomy.final_norm)(last)) * anatomy.scale
    off = {
        "the sum": within(
            torch.tensor(found["contribution"].sum("component").to_numpy()), raw[..., word].flatten()
        )
    }
    rounding = np.abs(found["contribution"].sel(component="rounding").to_numpy()).max()
    size = np.abs(found["contribution"].to_numpy()).max()
    off["what is left unexplained"] = float(rounding / (1e-5 * max(1.0, size)))
    name, number = worst(off)
    if not number <= 10.0:
        return Cell(FAILS, f"{name} is {number:.1e} times what is allowed off")
    return Cell(YES, "", number, found["contribution"].size)


def patching_cell(bench: Bench) -> Cell:
    """Attribution patching of the stream: a plain gradient times the difference of the two prompts."""
    clean, corrupt = bench.prompts[:1], bench.prompts[1:]
    found = attribute_within(
        bench.vlm, clean, corrupt, bench.metric.select([1]), roles=["all"], progress=False
    )
    vlm, off, effects = bench.vlm, {}, []
    largest_logit = max(1.0, bench.clean[finite(bench.clean)].abs().max().item())
    for layer, block in enumerate(vlm.anatomy.text.blocks):
        name = f"blocks.{layer}.hook_resid_pre"
        if name not in found["component"].to_numpy():
            continue
        theirs = _gradient_times_change(bench, block)
        ours = found["effect"].sel(component=name, role="all").to_numpy().ravel()
        off[name] = float(np.abs(ours - theirs).max() / (1e-5 * max(largest_logit, np.abs(theirs).max())))
        effects.append(float(np.abs(theirs).max()))
    cell = verdict(off, effects, bench, [])
    return cell if cell.state != YES else Cell(YES, "", cell.number, len(found["component"]))


def _gradient_times_change(bench: Bench, block: Any) -> float:
    model, module = bench.vlm.model, bench.vlm.module(block.path)
    one, other = (dict(prompt.inputs) for prompt in bench.prompts)
    seen: list[Tensor] = []

    def keep(m: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        key = block.key if block.key in kwargs else None
        value = kwargs[key] if key else args[0]
        value = value.detach().clone().requires_grad_()
        seen.append(value)
        return ((value, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: value})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**one, use_cache=False)
        with torch.enable_grad():
            last = model(**other, use_cache=False).logits[0, -1]
            metric = last[int(bench.metric.a[0])] - last[int(bench.metric.b[0])]
            (gradient,) = torch.autograd.grad(metric, seen[1])
    finally:
        handle.remove()
    return float((gradient.double() * (seen[0] - seen[1]).double()).sum())


@torch.no_grad()
def paths_cell(bench: Bench) -> Cell:
    """Direct paths to the logits: the donor's write less one's own, added to the last stream, and read out."""
    vlm, last = bench.vlm, bench.vlm.n_layers - 1
    senders = ["blocks.0.attn.head.1", "blocks.0.attn", "blocks.0.mlp"]
    paths = [f"{s} -> logits" for s in senders] + [f"blocks.0.attn.head.1 -> blocks.{last}.mlp"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = path_effects(
            vlm, bench.prompts, bench.metric, paths, donor=bench.donor, control=False, progress=False
        )
    stream, clean = _streams(bench)[-1], bench.measured(bench.clean)
    off, effects = {}, []
    for sender in senders:
        head = sender.endswith("head.1")
        hook = "blocks.0.attn.hook_result" if head else f"blocks.0.hook_{sender.split('.')[2]}_out"
        values = [
            opened.run_with_cache(bench.inputs, hook, use_cache=False)[1][hook]
            for opened in (bench.donor, vlm)
        ]
        change = (values[0] - values[1])[:, :, 1] if head else values[0] - values[1]
        theirs = bench.measured(_read_out(bench, stream + change)) - clean
        ours = found["direct"].sel(path=f"{sender} -> logits").to_numpy()
        off[sender] = bench.off(ours, theirs)
        effects.append(float(np.abs(theirs).max()))
    return verdict(off, effects, bench, caught)


def _cut_pattern(bench: Bench, paths: set[str], keys: Tensor, queries: Tensor) -> np.ndarray:
    """The metric where these edges are gone from Hugging Face's own patterns of some modules, the rest made up to 1."""
    names = {module: path for path, module in bench.vlm.model.named_modules()}

    def act(module: nn.Module, call: plain.Attending) -> Tensor:
        if names[module] not in paths or call.pattern is None:
            return call.out
        edges = queries[:, None] & keys[None, :]
        pattern = call.pattern.double()
        sunk = 1 - pattern.sum(-1, keepdim=True)
        sunk = torch.where(sunk < 1e-5, torch.zeros_like(sunk), sunk)
        left = pattern.masked_fill(edges, 0.0)
        new = torch.where(edges.any(-1, keepdim=True), left / (left.sum(-1, keepdim=True) + sunk), pattern)
        groups = call.query.shape[1] // call.key.shape[1]
        out = new.to(call.value.dtype) @ call.value.repeat_interleave(groups, dim=1)
        return out.transpose(1, 2).contiguous().reshape(call.out.shape)

    with plain.attention_wrapped(act):
        return bench.measured(plain.logits_of(bench.vlm.model, bench.inputs))


def knockout_cell(bench: Bench) -> Cell:
    """Attention edges cut in one layer and in all that attend."""
    blocks = bench.vlm.anatomy.text.blocks
    layers = [layer for layer, block in enumerate(blocks) if block.site is not None]
    if not layers:
        return Cell(ABSENT, "no block calls the attention interface of transformers")
    source = "image" if bench.where("image").any() else "template"
    every = None if len(layers) == len(blocks) else set(layers)
    cuts = [Knockout(source, "question", layers=layers[0]), Knockout("template", "decision", layers=every)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = knockout_effects(bench.vlm, bench.prompts, cuts, bench.metric, progress=False)
    clean, off, effects = bench.measured(bench.clean), {}, []
    for cut, ours in zip(cuts, found["value"].to_numpy(), strict=True):
        cut_in = layers[:1] if cut is cuts[0] else layers
        paths = {site.module for layer in cut_in if (site := blocks[layer].site) is not None}
        theirs = _cut_pattern(bench, paths, bench.where(str(cut.source)), bench.where(str(cut.target)))
        off[cut.name] = bench.off(ours, theirs)
        effects.append(float(np.abs(theirs - clean).max()))
    cell = verdict(off, effects, bench, caught)
    some = "" if every is None else f"blocks {', '.join(map(str, layers))} attend"
    why = "; ".join(filter(None, (some, cell.why)))
    return cell if cell.state != YES else Cell(YES, why, cell.number, cell.n)


@torch.no_grad()
def mass_cell(bench: Bench) -> Cell:
    """Attention from the question to the image (or the words before it), head by head."""
    source = "image" if bench.where("image").any() else "template"
    found = attention_mass(bench.vlm, bench.prompts, "question", source)
    blocks = bench.vlm.anatomy.text.blocks
    seen = plain.look(bench.vlm.model, bench.inputs, set())
    off = {}
    for layer, block in enumerate(blocks):
        if block.site is None:
            continue
        (call, *_) = seen.attended[block.site.module]
        if call.pattern is None:
            return Cell(FAILS, "Hugging Face's own pattern cannot be had")
        pattern = call.pattern[:, :, bench.where("question")][..., bench.where(source)]
        theirs = pattern.sum(-1).mean(-1).T
        off[f"layer {layer}"] = within(torch.tensor(found[layer][: len(theirs)]), theirs)
    name, number = worst(off)
    if not number <= 1.0:
        return Cell(FAILS, f"{name} is {number:.1e} times what is allowed off")
    return Cell(YES, "", number, found.size)


@torch.no_grad()
def graft_cell(bench: Bench) -> Cell:
    """Parts of the donor's weights, part by part, against parameters copied by hand; all of them make the donor."""
    vlm, off, effects = bench.vlm, {}, []
    inputs = bench.inputs
    with grafted(vlm, bench.donor, Graft(everything(vlm))):
        off["everything"] = largest(
            vlm(inputs, use_cache=False).logits, bench.donor(inputs, use_cache=False).logits
        )
    refusals = []
    for address, paths in _parts(bench):
        names = [name for name in vlm.model.state_dict() if _under(name, paths)]
        theirs = _copied(bench, names)
        with grafted(vlm, bench.donor, Graft((address,))):
            ours = vlm(inputs, use_cache=False).logits
        off[address] = largest(ours, theirs)
        effects.append(largest(theirs, bench.clean))
    for address in _units(bench):
        pieces = weight_slices(vlm.model, vlm.anatomy, address)
        theirs = _moved_by_hand(bench, address)
        if theirs is not None:
            with grafted(vlm, bench.donor, Graft((address,))):
                off[address] = largest(vlm(inputs, use_cache=False).logits, theirs)
        assert pieces
    off["afterwards"] = 2.0 * (not torch.equal(plain.logits_of(vlm.model, inputs), bench.clean))
    name, number = worst(off)
    if not number <= 1.0:
        wrong = sum(not n <= 1.0 for n in off.values())
        return Cell(FAILS, f"{name} is {number:.1e} times what is allowed off ({wrong} of {len(off)})")
    if not min(effects) >= 100:
        return Cell(FAILS, "a graft moves the logits too little to tell")
    return Cell(YES, "; ".join(refusals), number, len(off))


def _under(name: str, paths: list[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _parts(bench: Bench) -> list[tuple[str, list[str]]]:
    """Addresses and the modules that they are, as the anatomy has them."""
    anatomy = bench.vlm.anatomy
    found = []
    kinds: dict[tuple, int] = {}
    for layer, block in enumerate(anatomy.text.blocks):
        kinds.setdefault(tuple(writer.role for writer in block.writers), layer)
    for layer in kinds.values():
        block = anatomy.text.blocks[layer]
        found.append((f"blocks.{layer}", [block.path]))
        for role in dict.fromkeys("mlp" if w.role == "moe" else w.role for w in block.writers):
            own = next(w for w in block.writers if w.role == role or (role, w.role) == ("mlp", "moe"))
            made = own.parts or (own.body,)
            behind = [] if own.rest or own.module in made else [own.module]
            if any(True for path in made for _ in bench.vlm.module(path).parameters()):
                found.append((f"blocks.{layer}.{role}", [*made, *behind]))
    found += [("ln_final", [anatomy.final_norm])] if anatomy.final_norm else []
    return found


def _copied(bench: Bench, names: list[str]) -> Tensor:
    """Logits with these parameters taken from the donor, in a copy of the model."""
    model = copy.deepcopy(bench.vlm.model)
    own, theirs = model.state_dict(), bench.donor.model.state_dict()
    for name in names:
        own[name].data.copy_(theirs[name].data)
    return plain.logits_of(model, bench.inputs)


def _units(bench: Bench) -> list[str]:
    """A head, a key/value head and a neuron of the first block that has such."""
    found = []
    for layer, block in enumerate(bench.vlm.anatomy.text.blocks):
        site = block.site
        if site and site.out and site.q and not any("head" in one for one in found):
            found.append(f"blocks.{layer}.attn.head.1")
        if site and site.k and site.v and not any("kv_head" in one for one in found):
            found.append(f"blocks.{layer}.attn.kv_head.1")
        if block.writer("moe") and not any("expert" in one for one in found):
            found.append(f"blocks.{layer}.mlp.expert.1")
    return found


def _moved_by_hand(bench: Bench, address: str) -> Tensor | None:
    """Logits with the rows of W_Q (or W_K and W_V) and columns of W_O of one head copied, by counting them here."""
    _, layer, _, unit, index = address.split(".")
    site = bench.vlm.anatomy.text.blocks[int(layer)].site
    if unit == "expert" or site is None:
        return None
    model = copy.deepcopy(bench.vlm.model)
    rows = [site.q] if unit == "head" else [site.k, site.v]
    for split in rows:
        assert split is not None
        own, theirs = (m.get_submodule(split.module) for m in (model, bench.donor.model))
        _copy(own, theirs, split, int(index))
    if unit == "head":
        own, theirs = (m.get_submodule(site.out) for m in (model, bench.donor.model))  # type: ignore[arg-type]
        first = int(index) * site.d_value
        part = slice(first, first + site.d_value)
        at = part if hasattr(own, "nf") else (slice(None), part)
        own.weight.data[at] = theirs.weight.data[at]  # type: ignore[index]
    return plain.logits_of(model, bench.inputs)


def _copy(own: Any, theirs: Any, split: Any, index: int) -> None:
    conv = hasattr(own, "nf")
    width = own.weight.shape[1 if conv else 0]
    rows = plain.heads_of(torch.arange(width)[None], split)[0, index]
    at = (slice(None), rows) if conv else rows
    own.weight.data[at] = theirs.weight.data[at]
    if getattr(own, "bias", None) is not None:
        own.bias.data[rows] = theirs.bias.data[rows]
