"""The sweep engine against one full forward per intervention and prompt, with the edit written as a plain hook here."""

import copy
import gc
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hooks import FrankenlensError, HookedVLM
from hooks.memory import parse_bytes
from interp.metrics import AnswerLogProbability, LogitDifference, TraceLogLikelihood
from interp.metrics.reading import Reading
from interp.prompts import PromptBatch, PromptBuilder, collate
from interp.prompts.roles import TraceFormat
from interp.questions.examples import Example
from interp.sweep import Intervention, head_map, residual_map, sweep
from interp.sweep.batch import BatchSweep
from interp.sweep.intervention import bind
from interp.sweep.places import where_mask
from interp.sweep.stored import StoredRun
from tests.families import EACH_KIND, FAMILIES, redraw, tiny

QUESTIONS = ("how many red", "what shape in row 2 is there", "what color is the star")
TRACES = (
    "<think> red 3 , blue 2 </think> answer 5",
    "<think> red </think> answer 2",
    "<think> 3 </think> answer 4 1",
)
METRICS = ("last", "trace", "answer")


class Duo:
    """A tiny model, its redrawn copy as donor, and three prompts of different lengths and images."""

    def __init__(self, family: str, sliding_window: int | None = None) -> None:
        self.given = tiny(family)
        if sliding_window is not None:
            self.given = replace(self.given, model=_with_window(self.given.model, sliding_window))
        other = copy.deepcopy(self.given.model)
        redraw(other, seed=7)
        inputs = self.given.inputs()
        self.recipient = HookedVLM(self.given.model, inputs=inputs)
        self.donor = HookedVLM(other, inputs=inputs)
        builder = PromptBuilder(self.given.processor, TraceFormat(answer=("answer", None)))
        images = self.given.images(4)
        shown = [(images[0],), (images[1],), (images[2], images[3])]
        self.prompts = [
            builder.build(Example(f"e{i}", shown[i], QUESTIONS[i], "5"), TRACES[i]) for i in range(3)
        ]
        n = len(self.prompts)
        self._activations: dict[tuple[str, int, str], torch.Tensor] = {}
        self.metrics = {
            "last": LogitDifference(torch.arange(n) + 30, torch.arange(n) + 40),
            "trace": TraceLogLikelihood(),
            "answer": AnswerLogProbability(),
        }

    def expected(self, intervention: Intervention) -> np.ndarray:
        """[metric example], one prompt at a time, unpadded, by one hook on a full forward."""
        found = np.full((len(self.metrics), len(self.prompts)), np.nan)
        for row, prompt in enumerate(self.prompts):
            batch = collate([prompt])
            where = where_mask(intervention.where, batch)
            text = self.recipient.hook_points[intervention.hook].axes[0] == "batch"
            if text and not where.any():
                continue
            hook = self._hook(intervention, row, batch, where)
            with torch.no_grad():
                logits = self.recipient.run_with_hooks(batch.inputs, [(intervention.hook, hook)]).logits
            for number, metric in enumerate(self.metrics.values()):
                found[number, row] = float(metric.select([row])(logits, batch)[0])
        return found

    def _activation(self, model: str, row: int, name: str) -> torch.Tensor:
        """Of a plain run of one prompt, made once."""
        key = (model, row, name)
        if key not in self._activations:
            with torch.no_grad():
                inputs = collate([self.prompts[row]]).inputs
                _, cache = getattr(self, model).run_with_cache(inputs, name)
            self._activations[key] = cache[name]
        return self._activations[key].clone()

    def _hook(self, i: Intervention, row: int, batch: Any, where: torch.Tensor) -> Any:
        tokens = where[0].nonzero()[:, 0]
        donated = self._activation("donor", row, i.hook)
        tower = "vision." if i.hook.startswith("vision.") else ""
        before = self._activation("recipient", row, f"{tower}blocks.{self._layer(i)}.hook_resid_pre")

        def new(own: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
            if i.kind == "replace":
                return donor if i.value is None else torch.zeros_like(own) + i.value
            if i.kind in ("add", "scale"):
                value: Any = i.value
                return own + value if i.kind == "add" else own * value
            return before if i.kind == "skip" and i.hook.endswith("post") else torch.zeros_like(own)

        def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            out, other = activation.clone(), donated
            if hook.point.axes[0] != "batch":
                return self._on_patches(i, batch, activation, new(out, other))
            if i.kind == "knockout":
                assert i.source is not None
                keys = where_mask(i.source, batch)[0].nonzero()[:, 0]
                heads = range(out.shape[1]) if i.index is None else [i.index]
                for head in heads:
                    for query in tokens:
                        out[0, head, query, keys] = -torch.inf
            elif hook.point.axes[-1] == "key":
                heads = slice(None) if i.index is None else slice(i.index, i.index + 1)
                out[:, heads, tokens] = new(activation, other)[:, heads, tokens]
            elif i.index is None:
                out[:, tokens] = new(activation, other)[:, tokens]
            elif hook.point.axes[-1] == "d_mlp":
                out[:, tokens, i.index] = new(activation, other)[:, tokens, i.index]
            else:
                out[:, tokens, i.index] = new(activation, other)[:, tokens, i.index]
            return out

        return write

    def _on_patches(
        self, i: Intervention, batch: Any, activation: torch.Tensor, new: torch.Tensor
    ) -> torch.Tensor:
        if i.index is None and i.kind != "knockout":
            return new
        out = activation.clone()
        if i.kind != "knockout":
            out[..., i.index, :] = new[
                ..., i.index, :
            ]  # every split point of the vision side ends in one more axis
            return out
        firsts = [0]
        if out.ndim == 3 and "image_grid_thw" in batch.inputs:
            firsts = [0, *batch.inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()[:-1]]
        assert isinstance(i.source, int)
        heads = range(out.shape[-3]) if i.index is None else [i.index]
        for head in heads:
            for first in firsts:
                out[..., head, :, first + i.source] = -torch.inf
        return out

    def _layer(self, i: Intervention) -> int:
        layer = self.recipient.hook_points[i.hook].layer
        return 0 if layer is None else min(layer, self.recipient.n_layers - 1)

    @cached_property
    def tolerance(self) -> float:
        """1e-5 x the largest logit, for metrics that add up logits of several tokens too."""
        with torch.no_grad():
            largest = max(
                float(self.recipient(collate([prompt]).inputs).logits.abs().max()) for prompt in self.prompts
            )
        return 1e-5 * max(1.0, largest)


def _with_window(model: Any, size: int) -> Any:
    """The same weights, every other decoder layer looking back `size` tokens only."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = ["sliding_attention", "full_attention"] * text.num_hidden_layers
    text.layer_types, text.use_sliding_window, text.sliding_window = (
        kinds[: text.num_hidden_layers],
        True,
        size,
    )
    made = type(model)(config).eval()
    made.load_state_dict(model.state_dict())
    return made


_DUOS: dict[str, Duo] = {}


def duo(family: str) -> Duo:
    if family not in _DUOS:
        _DUOS[family] = Duo(family)
    return _DUOS[family]


def interventions_of(vlm: HookedVLM) -> list[Intervention]:
    """Every text hook point of blocks 0 and 2 and every kind, on tokens of all sorts."""
    places: list[Any] = ["all", "question", "image", "reasoning", "decision", 3, -2]
    found: list[Intervention] = []
    for number, name in enumerate(vlm.hook_points):
        point = vlm.hook_points[name]
        text = point.axes[0] == "batch"
        if not text and name != "projector.hook_out" and not name.endswith("0.hook_resid_post"):
            continue
        if point.layer == 1 and "resid" not in name:
            continue
        where = places[number % len(places)] if text else "all"
        split = text and any(axis in point.axes for axis in ("head", "kv_head", "d_mlp"))
        indices = [None, 1] if split else [None]
        for index in indices:
            found.append(Intervention(name, "replace", where, index))
            found.append(Intervention(name, "scale", places[(number + 1) % 7] if text else "all", index, 0.5))
            if point.leaf != "hook_attn_scores":
                found.append(Intervention(name, "zero", where, index))
            if point.axes[-1] != "key":
                found.append(Intervention(name, "add", where, index, 0.7))
    block, skipped = "vision.blocks.1", ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
    found += [Intervention(f"{block}.{leaf}", "skip") for leaf in skipped]
    found += [
        Intervention(f"{block}.attn.{at}", "scale", "all", 1, 3.0)
        for at in ("hook_q", "hook_z", "hook_result")
    ]
    found += [
        Intervention(f"{block}.attn.hook_attn_scores", "knockout", "all", i, source=2) for i in (None, 1)
    ]
    for layer in (0, 2):
        scores = f"blocks.{layer}.attn.hook_attn_scores"
        found.append(Intervention(scores, "knockout", "reasoning", None, source="image"))
        found.append(Intervention(scores, "knockout", "decision", 2, source="question"))
        for leaf in ("hook_attn_out", "hook_mlp_out", "hook_resid_post"):
            found.append(Intervention(f"blocks.{layer}.{leaf}", "skip", "all"))
    return found


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in ("qwen3_vl", "llava") else pytest.mark.slow) for f in FAMILIES],
)
def test_every_kind_at_every_point_is_one_full_forward_each(family: str) -> None:
    pair = duo(family)
    wanted = interventions_of(pair.recipient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sweep(
            pair.recipient, pair.prompts, wanted, pair.metrics, donor=pair.donor, batch_size=3, progress=False
        )
    moved = []
    for number, intervention in enumerate(wanted):
        expected = pair.expected(intervention)
        got = found.value.values[:, number]
        np.testing.assert_array_equal(np.isnan(got[0]), np.isnan(expected[0]), err_msg=intervention.name)
        np.testing.assert_allclose(got, expected, rtol=0, atol=pair.tolerance, err_msg=intervention.name)
        moved.append(float(np.nanmax(np.abs(expected - found.clean.values))))
    assert np.median(moved) > 100 * pair.tolerance


@pytest.mark.parametrize("family", EACH_KIND)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(data=st.data())
def test_drawn_sites(family: str, data: st.DataObject) -> None:
    pair = duo(family)
    names = [name for name, point in pair.recipient.hook_points.items() if point.axes[0] == "batch"]
    draw = data.draw
    wanted = []
    for _ in range(3):
        name = draw(st.sampled_from(names))
        axes = pair.recipient.hook_points[name].axes
        split = any(axis in axes for axis in ("head", "kv_head", "d_mlp"))
        index = draw(st.sampled_from([None, 0, 1])) if split else None
        kind, value = draw(st.sampled_from([("replace", None), ("scale", 0.3), ("scale", 2.0)]))
        wanted.append(Intervention(name, kind, draw(st.integers(-20, 40)), index, value))
    found = sweep(
        pair.recipient, pair.prompts, wanted, pair.metrics, donor=pair.donor, batch_size=2, progress=False
    )
    for number, intervention in enumerate(wanted):
        expected = pair.expected(intervention)
        np.testing.assert_allclose(
            found.value.values[:, number], expected, rtol=0, atol=pair.tolerance, err_msg=intervention.name
        )


def test_sliding_windows() -> None:
    """Layers 0 and 2 look back 8 tokens: less than the prompt, so the window decides what an edit can reach."""
    pair, whole = Duo("qwen2_5_vl", sliding_window=8), duo("qwen2_5_vl")
    wanted = [i for i in interventions_of(pair.recipient) if i.kind in ("replace", "zero", "knockout")][::3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, donor=pair.donor, progress=False)
    for number, intervention in enumerate(wanted):
        np.testing.assert_allclose(
            found["value"].isel(intervention=number),
            pair.expected(intervention),
            atol=pair.tolerance,
            rtol=0,
        )
    inputs = collate(pair.prompts[:1]).inputs
    with torch.no_grad():
        moved = (pair.recipient(inputs).logits - whole.recipient(inputs).logits)[0, -1].abs().max()
    assert moved > 100 * pair.tolerance


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl", "llava"))
def test_left_padding_gives_what_right_padding_gives(family: str) -> None:
    pair = duo(family)
    metric = pair.metrics["trace"]
    wanted = [
        Intervention("blocks.1.hook_resid_pre", "scale", "question", value=0.5),
        Intervention("blocks.0.attn.hook_q", "zero", -3, 1),
        Intervention("blocks.2.attn.hook_attn_scores", "knockout", "reasoning", source="image"),
        Intervention("blocks.1.attn.hook_result", "zero", "image", 2),
        Intervention("blocks.1.mlp.hook_post", "scale", "decision", 3, 4.0),
    ]
    found = {}
    for side in ("left", "right"):
        batch = collate(pair.prompts, side)

        def never(hook: str, index: int | None) -> torch.Tensor:
            raise AssertionError

        bound = [bind(i, pair.recipient, batch, None, never, {}) for i in wanted]
        sweeper = BatchSweep(
            pair.recipient,
            batch,
            Reading([metric], batch),
            [b.edits for b in bound],
        )
        assert sweeper.shortcuts == "tokens and layers"
        found[side] = torch.stack([value for _, value in sorted(sweeper.run(range(len(wanted))))])
    assert (found["left"] - found["right"]).abs().max() <= pair.tolerance
    for number, intervention in enumerate(wanted):
        expected = pair.expected(intervention)[1]
        np.testing.assert_allclose(found["left"][number, 0], expected, rtol=0, atol=pair.tolerance)


def test_what_is_resampled_depends_on_neither_the_batches_nor_the_order() -> None:
    """Of the decoder and of the vision tower; at batch size 1 too, where no other row stands beside it."""
    pair = duo("qwen2_vl")
    builder, images = pair.prompts[0].builder, pair.given.images(4)
    given = [
        builder.build(Example(str(i), tuple(images[i : i + 1]), QUESTIONS[0], "5"), TRACES[0])
        for i in range(4)
    ]
    wanted = [
        Intervention(hook, "resample") for hook in ("blocks.1.hook_mlp_out", "vision.blocks.1.hook_mlp_out")
    ]
    metric = LogitDifference(torch.tensor([30, 31, 32, 33]), torch.tensor([40, 41, 42, 43]))
    found = sweep(pair.recipient, given, wanted, metric, progress=False)
    assert (abs(found.value - found.clean) > 100 * pair.tolerance).any("example").all()
    order = [2, 0, 3, 1]
    for rows, size in (([0, 1, 2, 3], 1), (order, 3), (order, 1)):
        other = sweep(
            pair.recipient,
            [given[r] for r in rows],
            wanted,
            metric.select(rows),
            batch_size=size,
            progress=False,
        )
        np.testing.assert_allclose(other.value, found.value[..., rows], rtol=0, atol=pair.tolerance)


@pytest.mark.parametrize("family", EACH_KIND)
def test_mean_and_resample(family: str) -> None:
    pair = duo(family)
    same = [pair.prompts[0], pair.prompts[0].builder.build(
        Example("other", tuple(pair.given.images(3)[2:3]), QUESTIONS[0], "5"), TRACES[0]
    )]  # fmt: skip
    if same[0].roles != same[1].roles:
        pytest.skip("images of another size")
    hook, early = "blocks.1.hook_mlp_out", "vision.blocks.1.hook_mlp_out"
    wanted = [Intervention(hook, kind, "question") for kind in ("mean", "resample")]
    wanted += [Intervention(early, kind) for kind in ("mean", "resample")]
    metric = LogitDifference(torch.tensor([30, 31]), torch.tensor([40, 41]))
    found = sweep(pair.recipient, same, wanted, metric, progress=False)
    batch = collate(same)
    where = batch.mask("question")
    with torch.no_grad():
        _, cache = pair.recipient.run_with_cache(batch.inputs, hook)
        mean = cache[hook][where].mean(0)
        for number, value in enumerate((mean, cache[hook].flip(0))):
            logits = pair.recipient.run_with_hooks(
                batch.inputs, [(hook, lambda a, hook, v=value: torch.where(where[..., None], v, a))]
            ).logits
            np.testing.assert_allclose(
                found.value.values[0, number], metric(logits, batch), rtol=0, atol=pair.tolerance
            )
        _, cache = pair.recipient.run_with_cache(batch.inputs, early)
        seen = cache[early]
        halves = seen.chunk(2)  # images of one size, one after the other
        for number, value in enumerate(
            (seen.flatten(0, -2).mean(0).expand_as(seen), torch.cat(halves[::-1]))
        ):
            logits = pair.recipient.run_with_hooks(batch.inputs, [(early, lambda a, hook, v=value: v)]).logits
            np.testing.assert_allclose(
                found.value.values[0, 2 + number], metric(logits, batch), rtol=0, atol=pair.tolerance
            )
            assert (
                np.abs(found.value.values[0, 2 + number] - found.clean.values[0]).max() > 100 * pair.tolerance
            )


def test_what_changes_nothing_is_exactly_the_clean_run() -> None:
    pair = duo("qwen2_5_vl")
    hooks = [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.2.mlp.hook_post",
        "blocks.2.attn.hook_z",
        "blocks.0.attn.hook_result",
        "projector.hook_out",
    ]
    wanted = [Intervention(hook, "scale", value=1.0) for hook in hooks]
    late = Intervention("blocks.0.hook_resid_pre", "zero", "decision")
    found = sweep(pair.recipient, pair.prompts, [*wanted, late], AnswerLogProbability(), progress=False)
    assert (
        found.value.values[0] == found.clean.values[0]
    ).all()  # the last token predicts nothing that is read


def test_bf16_is_as_far_off_as_bf16_itself() -> None:
    pair = duo("qwen2_5_vl")
    model = copy.deepcopy(pair.given.model).to(torch.bfloat16)
    half = HookedVLM(model, inputs=pair.given.inputs())
    metric = {"last": pair.metrics["last"]}
    wanted = [
        Intervention("blocks.0.attn.hook_result", "zero", "image", 1),
        Intervention("blocks.1.hook_mlp_out", "scale", "question", value=0.5),
        Intervention("blocks.2.attn.hook_z", "zero", "decision", 2),
    ]
    exact = sweep(pair.recipient, pair.prompts, wanted, metric, progress=False).value.values[0]
    got = sweep(half, pair.prompts, wanted, metric, progress=False).value.values[0]
    plain = np.full_like(got, np.nan)
    whole = np.full_like(got, np.nan)
    for row, prompt in enumerate(pair.prompts):
        batch = collate([prompt])
        for number, i in enumerate(wanted):
            hook = (i.hook, pair._hook(i, row, batch, where_mask(i.where, batch)))
            with torch.no_grad():
                logits = half.run_with_hooks(batch.inputs, [hook]).logits
            plain[number, row] = float(metric["last"].select([row])(logits, batch)[0])
    whole = np.abs(plain - exact)
    assert np.abs(got - exact).max() <= 2 * whole.max()
    assert whole.max() > 0


def test_an_unknown_attention_goes_the_longer_way_and_says_so() -> None:
    pair = Duo("llava")
    pair.given.model.set_attn_implementation("eager")
    wanted = [Intervention("blocks.1.hook_mlp_out", "scale", "question", value=0.5)]
    eager = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, progress=False)
    text = pair.given.model.model.language_model
    for layer in text.layers:  # something between the blocks that no module tree shows
        layer.register_forward_hook(lambda m, args, out: out if out.shape[1] > 20 else out * 1.5)
    for size in (3, 1):  # every batch is checked
        with pytest.warns(UserWarning, match="cannot be taken up at a stored token"):
            found = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, batch_size=size, progress=False)
        np.testing.assert_allclose(found.value, eager.value, rtol=0, atol=pair.tolerance)


def test_tokens_that_look_at_later_ones_are_not_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = duo("llava")
    real = StoredRun._visibility

    def sees_all(run: StoredRun, layer: int) -> torch.Tensor:
        return torch.ones_like(real(run, layer))

    monkeypatch.setattr(StoredRun, "_visibility", sees_all)
    wanted = Intervention("blocks.1.hook_mlp_out", "zero", 3)
    with pytest.warns(UserWarning, match="look at later ones"):
        found = sweep(pair.recipient, pair.prompts, [wanted], pair.metrics, progress=False)
    np.testing.assert_allclose(found.value[:, 0], pair.expected(wanted), rtol=0, atol=pair.tolerance)


def first_five(batch: PromptBatch) -> torch.Tensor:
    return batch.mask("all") & (torch.arange(batch.roles.shape[1]) < 5)


def test_means_are_told_apart_and_are_of_all_prompts(tmp_path: Path) -> None:
    """Two functions of one name, another set of prompts on the same folder, and keys, whose token axis is "key"."""
    pair = duo("qwen2_5_vl")
    metric, hook = pair.metrics["trace"], "blocks.1.hook_mlp_out"

    def other(batch: PromptBatch) -> torch.Tensor:
        return batch.mask("question")

    other.__name__ = "first_five"
    both = [Intervention(hook, "mean", first_five), Intervention(hook, "mean", other)]
    found = sweep(pair.recipient, pair.prompts, both, metric, progress=False).value.values[0]
    for number, one in enumerate(both):
        alone = sweep(pair.recipient, pair.prompts, [one], metric, progress=False).value.values[0, 0]
        np.testing.assert_allclose(found[number], alone, rtol=0, atol=pair.tolerance)
    sweep(pair.recipient, pair.prompts[:2], both[:1], metric, batch_size=1, out=tmp_path, progress=False)
    with pytest.raises(FrankenlensError, match="is of other prompts"):
        sweep(pair.recipient, pair.prompts, both[:1], metric, batch_size=1, out=tmp_path, progress=False)
    keys = Intervention("blocks.1.attn.hook_rot_k", "mean", "question", 1)
    got = sweep(pair.recipient, pair.prompts[:1], [keys], metric, progress=False).value.values[0, 0]
    batch = collate(pair.prompts[:1])
    tokens = batch.mask("question")[0].nonzero()[:, 0]

    def write(k: torch.Tensor, hook: Any) -> torch.Tensor:
        k = k.clone()
        k[0, tokens, 1] = k[0, tokens, 1].mean(0)
        return k

    with torch.no_grad():
        logits = pair.recipient.run_with_hooks(batch.inputs, [(keys.hook, write)]).logits
    np.testing.assert_allclose(got, metric(logits, batch), rtol=0, atol=pair.tolerance)


def test_edited_scores_stay_masked() -> None:
    """Zeroed scores: the same prompt gives the same alone and beside a longer one, and equals a masked softmax of 0."""
    pair = duo("llava")
    hook = "blocks.1.attn.hook_attn_scores"
    wanted = [Intervention(hook, "zero"), Intervention(hook, "scale", value=-1.0)]
    metric = pair.metrics["trace"]
    together = sweep(pair.recipient, pair.prompts, wanted, metric, progress=False).value.values[0]
    for row, prompt in enumerate(pair.prompts):
        alone = sweep(pair.recipient, [prompt], wanted, metric, progress=False).value.values[0]
        np.testing.assert_allclose(together[:, row], alone[:, 0], rtol=0, atol=pair.tolerance)
    batch = collate(pair.prompts[:1])

    def write(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.where(scores == -torch.inf, scores, 0.0)

    with torch.no_grad():
        logits = pair.recipient.run_with_hooks(batch.inputs, [(wanted[0].hook, write)]).logits
    np.testing.assert_allclose(together[0, 0], metric(logits, batch)[0], rtol=0, atol=pair.tolerance)


def test_a_batch_without_images_beside_one_with_them() -> None:
    pair = duo("qwen2_5_vl")
    text = pair.prompts[0].builder.build(Example("text", (), QUESTIONS[0], "5"), TRACES[0])
    wanted = [
        Intervention("projector.hook_out", "replace"),
        Intervention("vision.blocks.1.hook_mlp_out", "mean"),
    ]
    metric = pair.metrics["trace"]
    found = sweep(
        pair.recipient,
        [text, pair.prompts[0]],
        wanted,
        metric,
        donor=pair.donor,
        batch_size=1,
        progress=False,
    )
    assert np.isnan(found.value.values[0, :, 0]).all()
    assert (np.abs(found.value.values[0, :, 1] - found.clean.values[0, 1]) > 100 * pair.tolerance).all()


def test_a_budget_makes_lanes_fewer_and_numbers_no_other() -> None:
    pair = duo("qwen2_5_vl")
    wanted = [Intervention(f"blocks.{i}.attn.hook_z", "zero", "all", h) for i in range(3) for h in range(4)]
    free = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, progress=False)
    tight = sweep(pair.recipient, pair.prompts, wanted, pair.metrics, max_memory="2MB", progress=False)
    np.testing.assert_allclose(tight.value, free.value, rtol=0, atol=pair.tolerance)
    with pytest.raises(
        FrankenlensError, match=r"takes about \d+ KiB for one prompt.* 1000 B of memory is allow"
    ):
        sweep(pair.recipient, pair.prompts, wanted, pair.metrics, max_memory=1000, progress=False)
    assert parse_bytes("2GiB") == 2 * 2**30
    assert parse_bytes("1.5 kB") == 1500
    with pytest.raises(FrankenlensError, match="is no size"):
        parse_bytes("much")


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Intervention("blocks.1.hook_mlp", "zero"), "is no hook point"),
        (Intervention("blocks.1.attn.hook_z", "zero", "all", 4), "index 4 is out of range"),
        (Intervention("blocks.1.hook_mlp_out", "zero", "all", 0), "no heads, neurons or experts"),
        (Intervention("blocks.1.hook_mlp_out", "replace"), "needs a value, or a donor"),
        (Intervention("blocks.1.hook_mlp_out", "add"), "add needs a value"),
        (Intervention("blocks.1.hook_mlp_out", "zero", value=1.0), "takes no value"),
        (Intervention("blocks.1.hook_resid_pre", "skip"), "skip acts on"),
        (Intervention("blocks.1.hook_mlp_out", "knockout", source="image"), "knockout acts on"),
        (Intervention("blocks.1.attn.hook_attn_scores", "knockout"), "knockout needs source="),
        (Intervention("projector.hook_out", "zero", "question"), "has no text tokens"),
        (Intervention("vision.blocks.1.hook_mlp_out", "zero", 3), "has no text tokens"),
        (Intervention("vision.blocks.1.attn.hook_z", "zero", "all", 2), "index 2 is out of range"),
        (
            Intervention("vision.blocks.1.attn.hook_attn_scores", "knockout", "question", source="all"),
            "'question' is no patch",
        ),
        (
            Intervention("vision.blocks.1.attn.hook_attn_scores", "knockout", "all", source=999),
            "there is no patch 999",
        ),
        (Intervention("blocks.1.attn.hook_pattern", "mean"), "have none"),
        (Intervention("vision.blocks.1.attn.hook_pattern", "resample"), "needs an activation of patches"),
        (Intervention("blocks.1.hook_mlp_out", "add", value=torch.ones(7, 32)), "value has size 7 along pos"),
        (Intervention("blocks.1.hook_mlp_out", "add", value=torch.ones(1, 1, 1, 32)), "value has 4 axes"),
        (
            Intervention("blocks.1.hook_mlp_out", "zero", "questions"),
            "Did you mean 'question'",
        ),
        (Intervention("blocks.1.hook_mlp_out", "erase"), "kind 'erase' is none of"),
    ],
)
def test_what_cannot_act_is_refused_before_anything_runs(intervention: Intervention, message: str) -> None:
    pair = duo("qwen2_5_vl")
    with pytest.raises(FrankenlensError, match=message):
        sweep(pair.recipient, pair.prompts, [intervention], pair.metrics, progress=False)


def test_a_metric_that_reads_no_token_is_refused() -> None:
    pair = duo("qwen2_5_vl")
    short = pair.prompts[0].truncated(pair.prompts[0].n_prompt_tokens)
    wanted = [Intervention("blocks.1.hook_mlp_out", "zero")]
    with pytest.raises(FrankenlensError, match="reads no token of prompt 0"):
        sweep(pair.recipient, [short], wanted, AnswerLogProbability(), progress=False)
    with pytest.raises(FrankenlensError, match="was made for 3 prompts and 2 are given"):
        sweep(pair.recipient, pair.prompts[:2], wanted, pair.metrics["last"], progress=False)
    with pytest.raises(FrankenlensError, match="go row by row"):
        sweep(
            pair.recipient, [short], wanted, pair.metrics["trace"], donor_prompts=pair.prompts, progress=False
        )


def test_the_model_is_left_as_it_was() -> None:
    pair = duo("qwen2_5_vl")
    model = pair.given.model
    configs = {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    inputs = pair.given.inputs()
    with torch.no_grad():
        before = model(**inputs).logits

    def breaks(batch):
        raise RuntimeError("broken")

    wanted = [Intervention("blocks.1.hook_mlp_out", "zero"), Intervention("blocks.1.attn.hook_k", "zero")]
    sweep(pair.recipient, pair.prompts, wanted, pair.metrics, progress=False)
    with pytest.raises(RuntimeError, match="broken"):
        sweep(
            pair.recipient,
            pair.prompts,
            [Intervention("hook_embed", "zero", breaks)],
            pair.metrics,
            progress=False,
        )
    assert {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")} == configs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("at", [1, 2, 3], ids=["clean", "first lane", "second lane"])
def test_a_metric_that_raises_leaves_model_and_gradients_though_its_traceback_is_kept(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that is left in the middle would end with the traceback, and set then what held when it began."""
    pair = duo("qwen2_5_vl")
    model, calls, own = pair.given.model, [], Reading.__call__
    configs = {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")}

    def breaks(self: Reading, logits: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return own(self, logits)

    monkeypatch.setattr(Reading, "__call__", breaks)
    wanted = [Intervention(f"blocks.{layer}.hook_mlp_out", "zero") for layer in range(2)]
    with pytest.raises(KeyboardInterrupt) as kept, torch.no_grad():
        sweep(pair.recipient, pair.prompts, wanted, pair.metrics["last"], progress=False)
    assert {name: id(m.config) for name, m in model.named_modules() if hasattr(m, "config")} == configs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(calls) == at and torch.is_grad_enabled()
    del kept
    gc.collect()
    assert torch.is_grad_enabled()


def test_maps_are_sweeps_with_named_axes() -> None:
    pair = duo("qwen3_vl")
    metric = pair.metrics["last"]
    found = residual_map(
        pair.recipient,
        pair.prompts,
        metric,
        donor=pair.donor,
        layers=[0, 2],
        positions=[0, 5, 48],
        progress=False,
    )
    assert found.value.dims == ("layer", "position", "example")
    for layer, position in ((2, 5), (0, 48)):
        wanted = Intervention(f"blocks.{layer}.hook_resid_pre", "replace", position)
        got = found.value.sel(layer=layer, position=position)
        np.testing.assert_allclose(got, pair.expected(wanted)[0], rtol=0, atol=pair.tolerance)
    assert np.isnan(found.value.sel(position=48)).any()  # the shortest prompt ends before
    heads = head_map(
        pair.recipient, pair.prompts, metric, roles=("image", "decision"), kind="zero", progress=False
    )
    assert heads.value.shape == (3, 4, 2, 3)
    wanted = Intervention("blocks.1.attn.hook_result", "zero", "image", 3)
    got = heads.value.sel(layer=1, head=3, role="image")
    np.testing.assert_allclose(got, pair.expected(wanted)[0], rtol=0, atol=pair.tolerance)
    with pytest.raises(FrankenlensError, match="at least one role"):
        head_map(pair.recipient, pair.prompts, metric, roles=(), kind="zero")
