"""Pairs that read text alone, by the command line and from Python; numbers against plain forwards of bare models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import frankenlens as fl
from experiments.cli import main
from interp.results.files import load_dataset
from tests.text_pairs import NUMBERS, PAIRS, TextPair, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot be taken up at a stored token"),
    pytest.mark.filterwarnings("ignore:.*puts a norm or a factor between its heads and the stream"),
]
N = 8
SHARED = ["--n", str(N), "--max-new-tokens", "12"]
COMMANDS: dict[str, list[str]] = {
    "map": [*SHARED, "--points", "resid_pre", "attn_out", "mlp_out", "vision", "projector"],
    "lens": [*SHARED, "--tuned-steps", "2"],
    "paths": SHARED,
    "knockout": [*SHARED, "--layers", "suffixes"],
    "compare": ["--subspace", "4"],
    "transfer": [*SHARED, "--variants", "factors", "parts", "--addresses", "blocks.2.mlp"],
}
LACKING = {("gemma2", "paths"), ("qwen3_5_text", "paths")}
"""What these architectures refuse in a sentence: paths need two pre-norm parts, cuts need attention everywhere."""
EVERY = [pytest.param(name, marks=() if name == "qwen3" else pytest.mark.slow, id=name) for name in PAIRS]


@pytest.fixture(scope="module", params=EVERY)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TextPair]:
    return request.param, make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bare(made: tuple[str, TextPair]) -> dict[str, Any]:
    """Both models, without any of this package."""
    folders = {"in": made[1].in_, "rl": made[1].rl}
    return {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


@pytest.fixture(scope="module")
def pages(made: tuple[str, TextPair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands write."""
    name, pair = made
    out = tmp_path_factory.mktemp(f"{name}-out")
    for command, options in COMMANDS.items():
        data = [] if command == "compare" else ["--data", str(pair.data)]
        argv = [
            command,
            "--in",
            str(pair.in_),
            "--rl",
            str(pair.rl),
            *data,
            *options,
            "--out",
            str(out / command),
        ]
        assert main(argv) == (2 if (name, command) in LACKING else 0), command
    return out


@pytest.fixture(scope="module")
def opened(made: tuple[str, TextPair], pages: Path):
    """The pair, and decisions on the rows that the command drew."""
    pair = fl.Pair.from_pretrained(made[1].in_, made[1].rl)
    rows = {example.id: example for example in fl.read_jsonl(made[1].data)[0]}
    drawn = load_dataset(pages / "map" / "map.nc")["looked_at"].to_numpy().tolist()
    assert len(drawn) == N
    return pair, fl.find_decisions(pair, [rows[name] for name in drawn], max_new_tokens=12)


@torch.no_grad()
def last_logits(model: Any, prompt: fl.Prompt, hooks: dict[str, Tensor] | None = None) -> Tensor:
    """Next-token logits behind a prompt, some modules' outputs replaced."""
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, value=value: value)
        for path, value in (hooks or {}).items()
    ]
    logits = model(input_ids=prompt.inputs["input_ids"], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits.double()


@torch.no_grad()
def output(model: Any, prompt: fl.Prompt, path: str) -> Tensor:
    """What a module gives out."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    model(input_ids=prompt.inputs["input_ids"], use_cache=False)
    handle.remove()
    return seen[0]


def account(pages: Path, command: str) -> str:
    return (pages / command / "report.html").read_text(encoding="utf-8")


def test_every_command_ends_in_a_report_or_in_a_sentence(made, pages) -> None:
    for command in COMMANDS:
        assert (pages / command / "report.html").is_file() == ((made[0], command) not in LACKING), command


def test_what_needs_an_image_is_left_out_with_a_sentence(made, pages) -> None:
    assert "vision and projector: no prompt has an image" in account(pages, "map")
    assert {"vision", "projector"}.isdisjoint(load_dataset(pages / "map" / "map.nc")["point"].to_numpy())
    assert "the lens over an image: the prompt that is drawn has none" in account(pages, "lens")
    assert not (pages / "lens" / "lens_image.png").exists()
    if (made[0], "knockout") not in LACKING:
        assert "routes of the image: no question has one (3)" in account(pages, "knockout")
    variants = set(pd.read_csv(pages / "transfer" / "transfer.csv")["variant"])
    assert "vision" not in variants and {"embed", "all mlp"} <= variants


def test_the_map_is_what_plain_hooks_give(made, pages, bare, opened) -> None:
    _, decisions = opened
    effects = load_dataset(pages / "map" / "map.nc")["effect"].sel(direction="rl_to_in", role="all")
    writer = "model.layers.2.post_feedforward_layernorm" if made[0] == "gemma2" else "model.layers.2.mlp"
    for row, prompt in enumerate(decisions.prompts):
        a, b = int(decisions.metric.a[row]), int(decisions.metric.b[row])
        logits = {name: last_logits(model, prompt) for name, model in bare.items()}
        moved = last_logits(bare["in"], prompt, {writer: output(bare["rl"], prompt, writer)})
        clean, patched, donor = (float(x[a] - x[b]) for x in (logits["in"], moved, logits["rl"]))
        own = effects.sel(component="blocks.2.mlp", example=prompt.example.id).item()
        allowed = 1e-5 * max(1.0, float(logits["in"].abs().max()))
        assert abs(own - (patched - clean)) < allowed and abs(own) > 100 * allowed
        assert abs(patched - donor) < allowed  # nothing else was trained
    for before in ("blocks.0.mlp", "blocks.2.hook_resid_pre"):
        assert float(abs(effects.sel(component=before)).max()) == 0


def test_python_gives_the_same_map(pages, opened) -> None:
    pair, decisions = opened
    found = fl.component_map(pair, decisions, ["rl_to_in"], ["mlp_out"], ["all"], progress=False)
    written = load_dataset(pages / "map" / "map.nc")["effect"].sel(direction="rl_to_in", role="all")
    both = written.sel(component=found["component"].to_numpy(), example=found["example"].to_numpy())
    np.testing.assert_allclose(found["effect"].to_numpy()[0, :, 0], both.to_numpy(), atol=1e-5)


def test_the_lens_ends_in_the_models_own_words(bare, opened) -> None:
    pair, decisions = opened
    prompt = decisions.prompts[0]
    found = fl.compare_lenses(pair, [prompt], where="decision", batch_size=1)
    logs = {name: last_logits(model, prompt).log_softmax(-1) for name, model in bare.items()}
    kl = float((logs["rl"].exp() * (logs["rl"] - logs["in"])).sum())
    own = found["kl"].sel(comparison="rl") if "comparison" in found.dims else found["kl"]
    assert float(own.isel(layer=-1).to_numpy().ravel()[0]) == pytest.approx(kl, rel=1e-4)
    assert kl > 1


def test_direct_attribution_adds_up_to_the_logits(bare, opened) -> None:
    pair, decisions = opened
    metric = decisions.metric
    found = fl.direct_logit_attribution(pair.rl, decisions.prompts, metric.a, metric.b, where="decision")
    total = found["contribution"].sum("component").to_numpy()
    cap = getattr(bare["rl"].config, "final_logit_softcapping", None)
    for row, prompt in enumerate(decisions.prompts):
        logits = last_logits(bare["rl"], prompt)
        logits = (
            logits if cap is None else cap * torch.atanh(logits / cap)
        )  # what is added up is not yet capped
        assert total[row] == pytest.approx(float(logits[metric.a[row]] - logits[metric.b[row]]), abs=1e-3)


def test_whole_effects_of_paths_are_the_maps(made, pages, opened) -> None:
    if (made[0], "paths") in LACKING:
        pair, decisions = opened
        with pytest.raises(fl.FrankenlensError, match="path patching needs what"):
            fl.pair_paths(pair, decisions, senders=["blocks.2.mlp"])
        return
    paths = load_dataset(pages / "paths" / "paths.nc").sel(direction="rl_to_in", sender="blocks.2.mlp")
    effects = load_dataset(pages / "map" / "map.nc")["effect"].sel(direction="rl_to_in", role="all")
    wanted = effects.sel(component="blocks.2.mlp").to_numpy()
    np.testing.assert_allclose(paths["whole"].to_numpy(), wanted, atol=1e-4)


def test_cuts_are_what_masked_forwards_give(made, pages, bare) -> None:
    if made[0] != "qwen3":  # the others make a mask of their own, which a caller cannot give
        return
    found = load_dataset(pages / "knockout" / "knockout.nc").sel(model="rl", route="question -> last")
    for row, name in enumerate(found["example"].to_numpy()[:3]):
        clean, cut = _answered(bare["rl"], made[1], str(name))
        assert float(found["clean"][row]) == pytest.approx(clean, abs=1e-4)
        value = float(found["value"].isel(example=row).sel(window="0-3"))
        assert value == pytest.approx(cut, abs=1e-4) and abs(value - clean) > 1e-2


@torch.no_grad()
def _answered(model: Any, pair: TextPair, name: str) -> tuple[float, float]:
    """log P of the answer in RL's own trace, and that with the question hidden from the token before the answer."""
    builder = fl.PromptBuilder(fl.load_processor(pair.in_))
    (example,) = [one for one in fl.read_jsonl(pair.data)[0] if one.id == name]
    number = example.question.split()[4]
    assert example.answer == NUMBERS[(NUMBERS.index(number) + 1) % len(NUMBERS)]
    prompt = builder.build(example, f"<think> it is {number} </think> answer {example.answer}")
    ids, n = prompt.inputs["input_ids"], len(prompt)
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    logs = []
    for hidden in (False, True):
        if hidden:
            mask[n - 2, prompt.positions("question")] = torch.finfo(torch.float32).min
        logits = model(input_ids=ids, attention_mask=mask[None, None], use_cache=False).logits[0, n - 2]
        logs.append(float(logits.log_softmax(-1)[ids[0, n - 1]]))
    return logs[0], logs[1]


def test_the_comparison_finds_the_one_part_that_was_trained(made, pages) -> None:
    weights = [load_file(folder / "model.safetensors") for folder in (made[1].in_, made[1].rl)]
    squares = {name: float((weights[1][name] - x).double().square().sum()) for name, x in weights[0].items()}
    planted = sum(value for name, value in squares.items() if name.startswith("model.layers.2.mlp."))
    assert planted > 0 and sum(squares.values()) == planted
    table = pd.read_csv(pages / "compare" / "compare_addresses.csv").set_index("address")
    assert table.loc["blocks.2.mlp", "fro_norm"] == pytest.approx(planted**0.5, rel=1e-5)
    assert table.loc["blocks.2", "fro_norm"] == table.loc["blocks.2.mlp", "fro_norm"]
    assert (table.loc[~table.index.str.startswith("blocks.2"), "fro_norm"] == 0).all()
    assert "projector" not in table.index and "vision" not in table.index
    if made[0] == "qwen3_5_text":
        assert {"blocks.0.mixer", "blocks.1.attn"} <= set(table.index) and "blocks.0.attn" not in table.index


def test_a_graft_of_that_part_makes_in_answer_as_rl(made, pages, bare, opened) -> None:
    pair, decisions = opened
    table = pd.read_csv(pages / "transfer" / "transfer.csv").set_index("variant")
    assert table.loc["IN", "accuracy"] == 0
    assert (
        table.loc["blocks.2.mlp", "accuracy"]
        == table.loc["all mlp", "accuracy"]
        == table.loc["RL", "accuracy"]
        == 1
    )
    assert table.loc["embed", "accuracy"] == 0
    prompt = decisions.prompts[0]
    with fl.grafted(pair.in_, pair.rl, fl.Graft(("blocks.2.mlp",))):
        logits = pair.in_(prompt.inputs).logits[0, -1].double()
    assert torch.equal(logits, last_logits(bare["rl"], prompt))


def test_what_is_about_images_alone_says_so(made, tmp_path, capsys) -> None:
    pair = made[1]
    own = ["--in", str(pair.in_), "--rl", str(pair.rl), "--out", str(tmp_path)]
    for command, words in {"attention": "--keys question", "map": "give questions without images"}.items():
        data = ["--data", str(pair.data)] if command == "attention" else ["--n", "2"]
        assert main([command, *own, *data]) == 2
        told = capsys.readouterr().err
        assert words in told and "Traceback" not in told


def test_the_suite_leaves_out_the_parts_that_need_images(made, tmp_path, capsys) -> None:
    if made[0] != "qwen3":
        return
    pair = made[1]
    own = [
        "--in",
        str(pair.in_),
        "--rl",
        str(pair.rl),
        "--data",
        str(pair.data),
        "--n",
        "4",
        "--max-new-tokens",
        "12",
    ]
    assert main(["suite", *own, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "attention: no question has an image" in page and "localize: the models read text alone" in page
    assert {"metrics.csv", "compare.csv", "transfer.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert "vis and v2r: no question has an image" in page
    assert main(["suite", *own, "--parts", "attention", "--out", str(tmp_path / "one")]) == 2
    assert "--keys question" in capsys.readouterr().err
