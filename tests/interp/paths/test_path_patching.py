"""Path patching against frozen runs written here with plain PyTorch hooks on Hugging Face's own modules."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hooks import FrankenlensError, HookedVLM
from interp.metrics import LogitDifference
from interp.paths import (
    Path,
    Receiver,
    path_effects,
    path_map,
    paths_between,
    paths_in_order,
    receivers_of,
    senders_of,
)
from interp.paths.job import Job
from interp.prompts import PromptBuilder, collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.sweep.stored import Unsupported
from tests.families import EACH_KIND, FAMILIES, redraw, tiny

TRACES = (
    "<think> red 3 , blue 2 </think> answer",
    "<think> red </think> answer",
    "<think> 3 </think> answer",
)
QUESTIONS = ("how many red", "what shape in row 2", "how many blue are there")
HEADS, KV_HEADS = 4, 2


class Duo:
    """A tiny model, its redrawn copy as donor, three prompts; and path patching by plain hooks, prompt by prompt."""

    def __init__(self, family: str) -> None:
        given = tiny(family)
        other = copy.deepcopy(given.model)
        redraw(other, seed=7)
        inputs = given.inputs()
        self.recipient, self.donor = HookedVLM(given.model, inputs=inputs), HookedVLM(other, inputs=inputs)
        builder = PromptBuilder(given.processor, TraceFormat(answer=("answer", None)))
        size: Any = [given.images(1)[0].size[::-1]]
        images = given.images(3, sizes=size)
        self.prompts = [
            builder.build(Example(f"e{i}", (images[i],), QUESTIONS[i], "5"), TRACES[i]) for i in range(3)
        ]
        self.swapped = [
            builder.build(Example(f"s{i}", (images[(i + 1) % 3],), QUESTIONS[i], "5"), TRACES[i])
            for i in range(3)
        ]
        self.metric = LogitDifference(torch.arange(3) + 30, torch.arange(3) + 40)
        self.layers: Any = given.model.get_decoder().layers
        self.given = given
        self.clean_runs: dict[tuple[Any, Any], tuple[Tensor, dict[str, Tensor]]] = {}
        logits = [self.recipient(p.inputs).logits.abs().max().item() for p in self.prompts]
        self.tolerance = 1e-5 * max(1.0, *logits)

    def run(self, prompt: Any, model: Any = None, edits: Any = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the outputs of q, k, v, attention, MLP and the inputs of W_O, with (module, function) edits."""
        model = self.given.model if model is None else model
        bare = not edits and not self.layers[0]._forward_pre_hooks
        if bare and (prompt, model) in self.clean_runs:
            return self.clean_runs[prompt, model]
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for module, function in edits:
                stack.callback(module.register_forward_hook(function).remove)
            for number, layer in enumerate(model.get_decoder().layers):
                parts = {"attn": layer.self_attn, "mlp": layer.mlp}
                parts |= {letter: getattr(layer.self_attn, f"{letter}_proj") for letter in "qkv"}
                for name, module in parts.items():
                    keep = _keeper(seen, f"{name}{number}")
                    stack.callback(module.register_forward_hook(keep).remove)
                before = _keeper(seen, f"z{number}", of_input=True)
                stack.callback(layer.self_attn.o_proj.register_forward_hook(before).remove)
                before = _keeper(seen, f"pre{number}", of_input=True)
                stack.callback(layer.register_forward_hook(before, with_kwargs=True).remove)
            logits = model(**prompt.inputs, use_cache=False).logits
        if bare:
            self.clean_runs[prompt, model] = logits, seen
        return logits, seen

    def change(self, sender: str, prompt: Any, mask: Tensor, model: Any = None, source: Any = None) -> Tensor:
        """donor - recipient of what a sender writes, at the tokens of the mask."""
        _, own = self.run(prompt)
        _, theirs = self.run(source or prompt, model)
        parts = sender.split(".")
        model = self.given.model if model is None else model
        if sender == "embed":
            difference = theirs["pre0"] - own["pre0"]
        elif "head" in parts:
            layer, head = int(parts[1]), int(parts[-1])
            written = []
            for of, values in ((model, theirs), (self.given.model, own)):
                weight = of.get_decoder().layers[layer].self_attn.o_proj.weight
                d = weight.shape[1] // HEADS
                columns = slice(head * d, (head + 1) * d)
                written.append(values[f"z{layer}"][..., columns] @ weight[:, columns].T)
            difference = written[0] - written[1]
        else:
            difference = theirs[f"{parts[2]}{parts[1]}"] - own[f"{parts[2]}{parts[1]}"]
        return (difference * mask[..., None]).detach()

    def frozen(
        self, prompt: Any, at: str, change: Tensor, mlps_too: bool = True, free: str = ""
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A run with the change behind a component and all later attention (and MLP) outputs at their clean values."""
        _, clean = self.run(prompt)
        kind, number = ("embed", -1) if at == "embed" else (at.split(".")[2], int(at.split(".")[1]))
        edits = []
        for layer, block in enumerate(self.layers):
            for name, module in (("attn", block.self_attn), ("mlp", block.mlp)):
                here = (layer, name == "mlp")
                if here < (number, kind == "mlp"):
                    continue
                if here == (number, kind == "mlp"):
                    edits.append((module, _set(clean[f"{name}{layer}"] + change)))
                elif (name == "attn" or mlps_too) and free != f"{name}{layer}":
                    edits.append((module, _set(clean[f"{name}{layer}"])))
        if at != "embed":
            return self.run(prompt, edits=edits)
        handle = self.layers[0].register_forward_pre_hook(_add_to_input(change), with_kwargs=True)
        try:
            return self.run(prompt, edits=edits)
        finally:
            handle.remove()

    def expected(self, path: str, where: str, mlps_too: bool = True, **source: Any) -> np.ndarray:
        """Direct effects, one prompt at a time."""
        found = []
        for row, prompt in enumerate(self.prompts):
            metric, batch = self.metric.select([row]), collate([prompt])
            clean = metric(self.run(prompt)[0], batch)
            at, *receivers = path.split(" -> ")
            donated = {
                "model": source.get("model"),
                "source": source["prompts"][row] if "prompts" in source else None,
            }
            change = self.change(at, prompt, batch.mask(where)[0], **donated)
            logits = self.along(prompt, at, receivers, change, mlps_too)
            found.append(float(metric(logits, batch) - clean))
        return np.array(found)

    def along(
        self, prompt: Any, at: str, receivers: list[str], change: Tensor, mlps_too: bool = True
    ) -> Tensor:
        """Logits when a change of what a component writes goes along a path."""
        for receiver in receivers[:-1]:
            change, at = self.passed(prompt, at, change, receiver, mlps_too)
        last = receivers[-1].split(".")
        free = f"mlp{last[1]}" if last[-1] == "mlp" else ""
        logits, seen = self.frozen(prompt, at, change, mlps_too, free)
        if receivers[-1] == "logits":
            return logits
        return self.run(prompt, edits=[self.put(prompt, receivers[-1], seen)])[0]

    def everywhere(self, prompt: Any, at: str, change: Tensor) -> Tensor:
        """Logits when a change of what a component writes goes wherever it goes."""
        if at == "embed":
            handle = self.layers[0].register_forward_pre_hook(_add_to_input(change), with_kwargs=True)
            try:
                return self.run(prompt)[0]
            finally:
                handle.remove()
        kind, number = at.split(".")[2], int(at.split(".")[1])
        module = self.layers[number].mlp if kind == "mlp" else self.layers[number].self_attn
        clean = self.run(prompt)[1][f"{kind}{number}"]
        return self.run(prompt, edits=[(module, _set(clean + change))])[0]

    def put(self, prompt: Any, receiver: str, seen: dict[str, Tensor]) -> Any:
        """The edit that writes a receiver's recorded output into a run, into one head only where it is a head's."""
        parts = receiver.split(".")
        layer = self.layers[int(parts[1])]
        if parts[-1] == "mlp":
            return layer.mlp, _set(seen[f"mlp{parts[1]}"])
        new = self.run(prompt)[1][f"{parts[-1]}{parts[1]}"].clone()
        d = new.shape[-1] // (HEADS if parts[-1] == "q" else KV_HEADS)
        columns = slice(int(parts[-2]) * d, (int(parts[-2]) + 1) * d)
        new[..., columns] = seen[f"{parts[-1]}{parts[1]}"][..., columns]
        return getattr(layer.self_attn, f"{parts[-1]}_proj"), _set(new)

    def passed(
        self, prompt: Any, at: str, change: Tensor, receiver: str, mlps_too: bool
    ) -> tuple[Tensor, str]:
        """What a receiver's component writes more than it did, and which component that is."""
        _, clean = self.run(prompt)
        parts = receiver.split(".")
        name = "mlp" if parts[-1] == "mlp" else "attn"
        _, seen = self.frozen(prompt, at, change, mlps_too, free=f"{name}{parts[1]}")
        if name == "attn":
            _, seen = self.run(prompt, edits=[self.put(prompt, receiver, seen)])
        key = f"{name}{parts[1]}"
        return seen[key] - clean[key], f"blocks.{parts[1]}.{name}"


def _keeper(seen: dict[str, Tensor], name: str, of_input: bool = False) -> Callable[..., None]:
    def keep(module: Any, args: tuple, *rest: Any) -> None:
        if of_input:
            value = args[0] if args else rest[0]["hidden_states"]
        else:
            value = rest[-1][0] if isinstance(rest[-1], tuple) else rest[-1]
        seen[name] = value.detach().clone()

    return keep


def _set(value: Tensor) -> Callable[..., Any]:
    return lambda module, args, out: (value, *out[1:]) if isinstance(out, tuple) else value


def _add_to_input(change: Tensor) -> Callable[..., Any]:
    def add(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0] + change, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + change}

    return add


_DUOS: dict[str, Duo] = {}


def duo(family: str) -> Duo:
    if family not in _DUOS:
        _DUOS[family] = Duo(family)
    return _DUOS[family]


PATHS = (
    "embed -> blocks.0.attn.head.2.q",
    "embed -> blocks.2.mlp",
    "embed -> logits",
    "blocks.0.attn.head.1 -> blocks.0.mlp",
    "blocks.0.attn.head.1 -> blocks.1.attn.head.3.q",
    "blocks.0.attn.head.1 -> blocks.2.attn.kv_head.0.k",
    "blocks.0.attn.head.1 -> blocks.1.attn.kv_head.1.v",
    "blocks.0.attn.head.1 -> logits",
    "blocks.1.attn -> blocks.2.attn.head.0.q",
    "blocks.0.mlp -> blocks.1.attn.kv_head.1.k",
    "blocks.0.mlp -> blocks.2.mlp",
    "blocks.2.mlp -> logits",
)
CHAINS = (
    "blocks.0.attn.head.0 -> blocks.1.attn.kv_head.0.v -> logits",
    "embed -> blocks.1.attn.kv_head.1.k -> blocks.2.mlp",
    "blocks.0.attn.head.2 -> blocks.0.mlp -> blocks.1.attn.kv_head.1.v -> logits",
    "embed -> blocks.1.attn.head.1.q -> logits",
)


@pytest.mark.parametrize(
    ("family", "where"),
    [
        *((family, "all") for family in FAMILIES),
        *zip(FAMILIES, ("image", "question") * 3, strict=True),
    ],
)
def test_direct_effects_are_those_of_frozen_runs_by_plain_hooks(family: str, where: str) -> None:
    pair, paths = duo(family), PATHS if where == "all" else PATHS[{"image": 0, "question": 1}[where] :: 2]
    got = path_effects(
        pair.recipient, pair.prompts, pair.metric, paths, donor=pair.donor, where=where, batch_size=2,
        control=False, progress=False,
    )["direct"]  # fmt: skip
    expected = np.stack([pair.expected(path, where, model=pair.donor.model) for path in paths])
    assert np.abs(got.to_numpy() - expected).max() <= pair.tolerance
    size = np.abs(expected).max(1)
    # what is changed before the decision only, reaches it by later keys and values
    silent = np.array([p.endswith(("logits", "2.attn.head.0.q", "2.mlp")) and where != "all" for p in paths])
    assert (size[silent] == 0).all()
    assert (size[~silent] > 0).all() and (size[~silent] > 100 * pair.tolerance).sum() >= 2


@pytest.mark.parametrize("family", EACH_KIND)
def test_chains_pass_on_the_change_of_each_receivers_own_output(family: str) -> None:
    pair = duo(family)
    got = path_effects(
        pair.recipient, pair.prompts, pair.metric, CHAINS, donor=pair.donor, control=False, progress=False
    )
    expected = np.stack([pair.expected(path, "all", model=pair.donor.model) for path in CHAINS])
    assert np.abs(got["direct"].to_numpy() - expected).max() <= pair.tolerance
    assert (np.abs(expected).max(1) > 100 * pair.tolerance).all()
    assert got["interaction"].isnull().all()


@pytest.mark.parametrize("family", EACH_KIND)
def test_all_paths_in_order_are_the_whole_effect(family: str) -> None:
    pair = duo(family)
    senders = ["embed", "blocks.0.attn.head.1", "blocks.0.mlp", "blocks.1.attn", "blocks.2.mlp"]
    paths = paths_between(pair.recipient, senders)
    settings: Any = dict(donor=pair.donor, batch_size=2, progress=False)
    together = paths_in_order(pair.recipient, pair.prompts, pair.metric, paths, **settings)
    apart = path_effects(pair.recipient, pair.prompts, pair.metric, paths, control=False, **settings)
    assert together["complete"].all() and apart["complete"].all()
    whole = np.stack([pair_whole(pair, sender) for sender in senders])
    assert np.abs(apart["whole"].to_numpy() - whole).max() <= pair.tolerance
    assert np.abs(together["in_order"].to_numpy() - whole).max() <= pair.tolerance
    assert (np.abs(whole).max(1) > 100 * pair.tolerance).all()
    sums = apart["direct"].groupby("path_sender").sum().sel(path_sender=senders).to_numpy()
    rounding = 40 * pair.tolerance  # of up to 32 paths, summed
    assert np.abs(apart["interaction"].to_numpy() - (whole - sums)).max() <= rounding
    # the last MLP has one path, to the logits: nothing interacts; the others do
    sizes = np.abs(apart["interaction"].to_numpy()).max(1)
    assert sizes[-1] <= pair.tolerance and (sizes[:-1] > 100 * pair.tolerance).all()


def pair_whole(pair: Duo, sender: str) -> np.ndarray:
    """An ordinary patch by plain hooks."""
    found = []
    for row, prompt in enumerate(pair.prompts):
        batch, metric = collate([prompt]), pair.metric.select([row])
        change = pair.change(sender, prompt, batch.mask("all")[0], pair.donor.model)
        clean, seen = pair.run(prompt)
        if sender == "embed":
            handle = pair.layers[0].register_forward_pre_hook(_add_to_input(change), with_kwargs=True)
            logits, _ = pair.run(prompt)
            handle.remove()
        else:
            _, number, name, *_ = sender.split(".")
            layer = pair.layers[int(number)]
            module = layer.mlp if name == "mlp" else layer.self_attn
            logits, _ = pair.run(prompt, edits=[(module, _set(seen[f"{name}{number}"] + change))])
        found.append(float(metric(logits, batch) - metric(clean, batch)))
    return np.array(found)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_part_of_the_paths_in_order_leaves_the_rest_clean(family: str) -> None:
    pair = duo(family)
    sender, middle = "blocks.0.attn.head.1", "blocks.1.mlp"
    settings: Any = dict(donor=pair.donor, progress=False)
    got = paths_in_order(pair.recipient, pair.prompts, pair.metric, [f"{sender} -> {middle}"], **settings)
    # one receiver and nothing else recomputed: the chain through it, straight to the logits
    expected = pair.expected(f"{sender} -> {middle} -> logits", "all", model=pair.donor.model)
    assert np.abs(got["in_order"].to_numpy()[0] - expected).max() <= pair.tolerance
    assert np.abs(expected).max() > 100 * pair.tolerance and not got["complete"].any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_with_mlps_between_only_attention_is_frozen(family: str) -> None:
    pair = duo(family)
    paths = [path for path in PATHS if not path.endswith("mlp")]
    paths.append("blocks.0.attn.head.0 -> blocks.1.attn.kv_head.0.v -> blocks.2.attn.kv_head.0.v -> logits")
    got = path_effects(
        pair.recipient, pair.prompts, pair.metric, paths, donor=pair.donor, between="mlps", control=False,
        progress=False,
    )["direct"].to_numpy()  # fmt: skip
    expected = np.stack([pair.expected(p, "all", mlps_too=False, model=pair.donor.model) for p in paths])
    frozen = np.stack([pair.expected(p, "all", model=pair.donor.model) for p in paths])
    assert np.abs(got - expected).max() <= pair.tolerance
    assert np.abs(frozen - expected).max() > 100 * pair.tolerance


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm"])
def test_the_donor_may_be_another_prompt_of_the_same_model(family: str) -> None:
    pair = duo(family)
    got = path_effects(
        pair.recipient, pair.prompts, pair.metric, PATHS[3:], donor_prompts=pair.swapped, control=False,
        progress=False,
    )  # fmt: skip
    expected = np.stack([pair.expected(path, "all", prompts=pair.swapped) for path in PATHS[3:]])
    assert np.abs(got["direct"].to_numpy() - expected).max() <= pair.tolerance
    assert np.abs(expected).max() > 100 * pair.tolerance


def test_the_control_takes_the_change_of_the_partner() -> None:
    """Donor minus recipient on the other prompt; the effect of it, in both, is that of the senders' own there."""
    pair = duo("qwen2_5_vl")
    alike = [pair.prompts[0], pair.swapped[0]]  # same words, other images
    metric = LogitDifference(torch.tensor([30, 30]), torch.tensor([40, 40]))
    settings: Any = dict(donor=pair.donor, progress=False)
    got = path_effects(pair.recipient, alike, metric, [*PATHS, *CHAINS], **settings)
    parsed = [Path.parse(path) for path in PATHS]
    run = Job(pair.recipient, alike, metric, parsed, pair.donor, None, "all", "frozen").start(
        [0, 1], others=True
    )
    hooks = {"blocks.0.mlp": "blocks.0.hook_mlp_out", "blocks.0.attn": "blocks.0.hook_attn_out"}
    batch = collate(alike[::-1])
    with torch.no_grad():
        theirs, ours = (
            vlm.run_with_cache(batch.inputs, list(hooks.values()))[1] for vlm in (pair.donor, pair.recipient)
        )
    senders = {str(path.sender): path.sender for path in parsed}
    known = set(hooks) & set(senders)
    assert known
    for name in known:
        expected = (theirs[hooks[name]] - ours[hooks[name]]).float()
        assert (run.sent(senders[name], other=True) - expected).abs().max() <= pair.tolerance
        assert (run.sent(senders[name]) - expected).abs().max() > 100 * pair.tolerance
    for name in ("direct", "whole"):
        assert np.abs(got[f"{name}_other"] - got[name]).max() > 100 * pair.tolerance
    for row, prompt in enumerate(alike):
        one = metric.select([row])
        clean, mask = one(pair.run(prompt)[0], collate([prompt])), torch.ones(len(prompt))

        def moved(logits: Tensor, one: Any = one, clean: Tensor = clean, prompt: Any = prompt) -> float:
            return float(one(logits, collate([prompt])) - clean)

        for path in [*PATHS, *CHAINS]:
            sender, *receivers = path.split(" -> ")
            change = pair.change(sender, alike[1 - row], mask, pair.donor.model)
            expected = moved(pair.along(prompt, sender, receivers, change))
            assert abs(float(got["direct_other"].sel(path=path)[row]) - expected) <= pair.tolerance
            expected = moved(pair.everywhere(prompt, sender, change))
            assert abs(float(got["whole_other"].sel(sender=sender)[row]) - expected) <= pair.tolerance
    single = path_effects(pair.recipient, alike, metric, [*PATHS, *CHAINS], batch_size=1, **settings)
    for name in ("direct_other", "whole_other"):
        assert np.abs(single[name] - got[name]).max() <= pair.tolerance
    alone = path_effects(pair.recipient, pair.prompts[:1], pair.metric.select([0]), PATHS[:2], **settings)
    assert alone["direct_other"].isnull().all()


def test_an_architecture_that_takes_no_shortcut_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = duo("qwen3_vl")
    settings: Any = dict(donor=pair.donor, where="question", control=False, progress=False)
    call = (pair.recipient, pair.prompts, pair.metric, [*PATHS, *CHAINS])
    short = path_effects(*call, **settings)

    def unsupported(*args: Any) -> None:
        raise Unsupported("for this test")

    monkeypatch.setattr("interp.sweep.batch.StoredRun", unsupported)
    with pytest.warns(UserWarning, match="for this test"):
        long = path_effects(*call, **settings)
    for name in ("direct", "whole"):
        assert np.abs(long[name] - short[name]).max() <= pair.tolerance


@pytest.mark.parametrize("between", ["frozen", "mlps"])
def test_ones_own_activation_changes_exactly_nothing(between: Any) -> None:
    pair = duo("qwen2_vl")
    got = path_map(
        pair.recipient, pair.prompts, pair.metric, senders=["blocks.0.attn.head.1", "blocks.1.mlp"],
        between=between, donor=pair.recipient, progress=False,
    )  # fmt: skip
    assert (got["direct"] == 0).all() and (got["whole"] == 0).all() and (got["interaction"] == 0).all()


def test_the_model_is_left_as_it_was() -> None:
    pair = duo("llava")
    before = {name: tensor.clone() for name, tensor in pair.given.model.state_dict().items()}
    clean, hooks = pair.recipient.model(**pair.prompts[0].inputs).logits, _hooks_on(pair.given.model)
    path_effects(pair.recipient, pair.prompts, pair.metric, CHAINS, donor=pair.donor, progress=False)
    after = pair.given.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert torch.equal(pair.recipient.model(**pair.prompts[0].inputs).logits, clean)
    assert _hooks_on(pair.given.model) == hooks


def _hooks_on(model: Any) -> list[tuple[int, int]]:
    """transformers keeps some of its own."""
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_maps_hold_every_receiver_of_a_sender_and_every_sender_of_a_receiver() -> None:
    vlm = duo("qwen2_vl").recipient
    below = [str(receiver) for receiver in receivers_of(vlm, "blocks.1.mlp")]
    assert below == [
        *(f"blocks.2.attn.head.{h}.q" for h in range(4)), *(f"blocks.2.attn.kv_head.{g}.k" for g in range(2)),
        *(f"blocks.2.attn.kv_head.{g}.v" for g in range(2)), "blocks.2.mlp", "logits",
    ]  # fmt: skip
    above = [str(sender) for sender in senders_of(vlm, "blocks.1.attn.kv_head.0.k")]
    assert above == ["embed", *(f"blocks.0.attn.head.{h}" for h in range(4)), "blocks.0.mlp"]
    assert len(paths_between(vlm, ["blocks.0-1.mlp"], ["logits", "blocks.1.mlp"])) == 3
    assert len(paths_between(vlm, receivers=["logits"])) == 1 + 3 * 5
    assert all(
        str(p.receiver) == "logits" or p.receiver.via != "in"
        for p in paths_between(vlm, ["embed"], None, "mlps")
    )


@given(
    st.integers(0, 60), st.integers(0, 60), st.integers(0, 40),
    st.sampled_from(["attn.head.{}.q", "attn.kv_head.{}.k", "attn.kv_head.{}.v", "mlp"]),
    st.sampled_from(["attn.head.{}", "attn", "mlp"]),
)  # fmt: skip
def test_paths_are_read_and_written_alike(low: int, high: int, unit: int, to: str, of: str) -> None:
    receiver = f"blocks.{high}.{to.format(unit)}"
    text = f"blocks.{low}.{of.format(unit)} -> {receiver} -> logits"
    path = Path.parse(text)
    assert str(path) == text and Path.parse(path) is path
    assert path.through == (Receiver.parse(receiver),) and path.receiver == Receiver()


FAULTS = {
    "blocks.0.attn.head.4 -> logits": "path 1 .*no head 4 in layer 0; it has heads 0-3",
    "blocks.9.mlp -> logits": "path 1 .*no layer 9; the decoder has layers 0-2",
    "blocks.0.mlp -> blocks.1.attn.kv_head.2.k": "no kv_head 2 in layer 1; it has kv_heads 0-1",
    "blocks.0.mlp -> blocks.1.attn.head.3.k": r"write blocks\.1\.attn\.kv_head\.1\.k",
    "blocks.0.mlp -> blocks.1.attn.kv_head.1.q": r"queries belong to heads: blocks\.1\.attn\.head\.2\.q",
    "blocks.1.mlp -> blocks.1.attn.head.0.q": "reads before",
    "blocks.0.mlp -> blocks.1.attn.head.0": "Add .q, .k or .v",
    "blocks.0.mlp": "is no path; write SENDER -> RECEIVER",
    "blocks.0.mlp -> logits -> blocks.1.mlp": "the logits end a path",
    "blocks.0-1.mlp -> logits": "is a range",
    "unembed -> logits": "sends nothing into the residual stream",
    "vision.blocks.0.mlp -> logits": "sends nothing",
    "embed -> logits": "is path 0 again",
}


@pytest.mark.parametrize(("path", "match"), FAULTS.items())
def test_a_path_that_does_not_exist_is_one_error_that_names_its_row(path: str, match: str) -> None:
    pair = duo("qwen2_vl")
    with pytest.raises(FrankenlensError, match=match):
        path_effects(pair.recipient, pair.prompts, pair.metric, ["embed -> logits", path], donor=pair.donor)


def test_an_empty_role_and_prompts_that_do_not_line_up_name_the_row() -> None:
    pair = duo("qwen2_vl")
    builder = pair.prompts[0].builder
    bare = builder.build(Example("bare", (), "how many red", "5"), TRACES[0])
    prompts = [pair.prompts[0], bare]
    metric = pair.metric.select([0, 1])
    call: Any = (pair.recipient, prompts, metric, ["blocks.0.mlp -> logits"])
    with pytest.raises(FrankenlensError, match=r"row 1 \(bare\) has no token where=image"):
        path_effects(*call, donor=pair.donor, where="image")
    with pytest.raises(FrankenlensError, match=r"row 1 \(bare / e1\)"):
        path_effects(*call, donor_prompts=pair.prompts[:2])
    with pytest.raises(FrankenlensError, match="need a donor"):
        path_effects(*call)
    with pytest.raises(FrankenlensError, match="MLPs are parts of every path and no receivers"):
        path_effects(pair.recipient, prompts, metric, PATHS[:2], donor=pair.donor, between="mlps")
    with pytest.raises(FrankenlensError, match="is a chain"):
        paths_in_order(pair.recipient, prompts, metric, [CHAINS[0]], donor=pair.donor)
    with pytest.raises(FrankenlensError, match="lies before any"):
        paths_between(pair.recipient, ["blocks.2.mlp"], ["blocks.0.mlp"])


def test_a_text_prompt_without_an_image_is_patched_as_any_other() -> None:
    pair = duo("qwen2_5_vl")
    bare = pair.prompts[0].builder.build(Example("bare", (), "how many red", "5"), TRACES[0])
    call: Any = (pair.recipient, [bare], pair.metric.select([0]), paths_between(pair.recipient, ["embed"]))
    got = path_effects(*call, donor=pair.donor, progress=False)
    together = paths_in_order(*call, donor=pair.donor, progress=False)
    assert np.abs(together["in_order"] - got["whole"]).max() <= pair.tolerance
    assert float(np.abs(got["whole"]).max()) > 100 * pair.tolerance
