"""The callback in transformers' own `Trainer`, against weights and gradients that are looked at beside it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainingArguments

from hooks import FrankenlensError, weight_slices
from hooks.unopened import unopened_anatomy
from interp.freezing import freeze
from interp.training import COPY, ComponentLog
from tests.families import TinyVLM, tiny

WATCHED = (
    "blocks.0",
    "blocks.1.attn.head.1",
    "blocks.1-2.mlp",
    "blocks.1.attn.kv_head.0",
    "projector",
    "vision",
)
FROZEN = ("vision", "blocks.1.attn.head.1")


class Beside(TrainerCallback):
    """What weights and gradients are at every step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        }
        self.gradients.append(grads)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})


def trainer(made: TinyVLM, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.1,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        | settings
    )

    def batch(rows: list[int]) -> dict[str, Tensor]:
        inputs = made.inputs(batch=2)
        inputs["pixel_values"] = (inputs["pixel_values"] * (1 + rows[0] / 7)).to(made.model.dtype)
        return {**inputs, "labels": inputs["input_ids"]}

    rows: Any = list(range(16))
    return Trainer(made.model, args, data_collator=batch, train_dataset=rows, callbacks=list(callbacks))


def pieces(model: Any, address: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    return [one.of(tensors[one.parameter]) for one in weight_slices(model, unopened_anatomy(model), address)]


def read(folder: Path) -> pd.DataFrame:
    table: Any = pd.read_json(folder / "components.jsonl", lines=True)
    return table.set_index(["step", "address"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_weights_and_gradients(dtype: torch.dtype, tmp_path: Path) -> None:
    made = tiny("qwen2_5_vl")
    model = made.model.to(dtype)
    model.save_pretrained(str(tmp_path / "start"))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    log, beside = ComponentLog(WATCHED, tmp_path / "start"), Beside()
    with freeze(model, FROZEN) as held:
        run = trainer(made, tmp_path / "run", beside, log)
        run.train()
        assert held.report().query("frozen")["identical"].all()
    table = read(tmp_path / "run")
    assert table.index.tolist() == [(step, address) for step in (2, 4) for address in WATCHED]
    for (step, address), row in table.iterrows():  # type: ignore[misc]
        now, before, gradient = (
            [one.double() for one in pieces(model, address, tensors)]
            for tensors in (beside.weights[step - 1], start, beside.gradients[step - 1])
        )
        delta = [a - b for a, b in zip(now, before, strict=True)]
        norm, whole = float(get_total_norm(delta)), float(get_total_norm(before))
        assert row["n"] == sum(one.numel() for one in now)
        assert row["update_norm"] == pytest.approx(norm, rel=1e-6)
        assert row["relative_norm"] == pytest.approx(norm / whole, rel=1e-6)
        assert row["gradient_norm"] == pytest.approx(float(get_total_norm(gradient)), rel=1e-5)
        changed = sum(int(one.count_nonzero()) for one in delta) / row["n"]
        assert row["changed"] == pytest.approx(changed, abs=1e-12)
        assert (row["changed"] == row["gradient_norm"] == 0) == (address in FROZEN)
    for entry in [one for one in run.state.log_history if "loss" in one]:
        for address in WATCHED:
            logged: Any = table.loc[(entry["step"], address), "changed"]
            assert entry[f"changed/{address}"] == pytest.approx(logged, abs=1e-12)


def test_a_copy_and_the_files_say_the_same(tmp_path: Path) -> None:
    made = tiny("smolvlm")  # its embedding is tied
    made.model.save_pretrained(str(tmp_path / "start"))
    watched = ["embed", "blocks.1.attn.head.0", "blocks.0.mlp"]
    tables = []
    for reference in (COPY, tmp_path / "start"):
        again = copy.deepcopy(made)
        log = ComponentLog(watched, reference)
        run = trainer(again, tmp_path / str(len(tables)), log)
        sizes: list[int] = []
        log.put_first(run)
        assert run.callback_handler.callbacks[0] is log
        run.add_callback(_at_start(lambda log=log, sizes=sizes: sizes.append(log.kept_bytes)))
        run.train()
        model: Any = again.model
        own = sum(one.numel() for a in watched for one in pieces(model, a, dict(model.named_parameters())))
        assert sizes == [4 * own if reference == COPY else 0]
        tables.append(read(tmp_path / str(len(tables))))
    pd.testing.assert_frame_equal(*tables)
    assert (tables[0]["changed"] > 0.5).all()


def _at_start(call: Any) -> TrainerCallback:
    class Called(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            call()

    return Called()


def test_by_default_every_part_is_watched_against_the_folder_it_was_loaded_from(tmp_path: Path) -> None:
    made = tiny("llava")
    made.model.save_pretrained(str(tmp_path / "start"))
    made.model.config._name_or_path = str(tmp_path / "start")
    log = ComponentLog()
    trainer(made, tmp_path / "run", log, max_steps=1, logging_steps=1).train()
    table = read(tmp_path / "run").reset_index()
    assert {
        "vision",
        "projector",
        "embed",
        "ln_final",
        "unembed",
        "blocks.2.mlp",
        "vision.blocks.1.attn",
    } <= set(table["address"])
    every = [f"blocks.{layer}.{part}" for layer in range(3) for part in ("attn", "mlp")]
    assert [one for one in table["address"] if one.startswith("blocks.")] == every


def test_resumed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    made = tiny("smolvlm")
    made.model.save_pretrained(str(tmp_path / "start"))
    whole, parts = copy.deepcopy(made), copy.deepcopy(made)
    given: dict[str, Any] = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    given["lr_scheduler_type"] = "constant"
    trainer(whole, tmp_path / "whole", ComponentLog(["blocks.0"], tmp_path / "start"), **given).train()
    cut = ComponentLog(["blocks.0"], tmp_path / "start")
    trainer(parts, tmp_path / "parts", cut, **{**given, "max_steps": 3}).train()
    again = copy.deepcopy(made)
    log = ComponentLog(["blocks.0"], tmp_path / "start")
    point = str(tmp_path / "parts" / "checkpoint-2")
    trainer(again, tmp_path / "parts", log, **given).train(resume_from_checkpoint=point)
    pd.testing.assert_frame_equal(read(tmp_path / "parts"), read(tmp_path / "whole"), rtol=1e-5)
    with pytest.raises(FrankenlensError, match="resumed at step 2, and reference='copy' would copy"):
        trainer(again, tmp_path / "parts", ComponentLog("blocks.0", COPY), **given).train(
            resume_from_checkpoint=point
        )


def test_what_it_cannot_measure_is_refused_before_the_first_step(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made = tiny("llava")
    start = tmp_path / "start"
    made.model.save_pretrained(str(start))

    def refused(log: ComponentLog, message: str, own: TinyVLM = made) -> None:
        before = [p.detach().clone() for p in own.model.parameters()]
        with pytest.raises(FrankenlensError, match=message):
            trainer(own, tmp_path / "run", log).train()
        assert all(torch.equal(a, b) for a, b in zip(before, own.model.parameters(), strict=True))

    refused(ComponentLog("blocks.7", start), r"blocks\.7: the text tower has blocks 0-2")
    refused(ComponentLog("blocks.0"), "give reference= the folder of that checkpoint, or reference='copy'")
    other = copy.deepcopy(made)
    nn.init.normal_(next(iter(other.model.model.language_model.layers[0].parameters())))
    refused(
        ComponentLog("blocks.0", start), r"1 watched tensors are not those that training starts from", other
    )
    inner: Any = get_peft_model(copy.deepcopy(made.model), LoraConfig(target_modules=["q_proj"]))
    adapted = replace(made, model=inner)
    refused(ComponentLog("blocks.0", start), "under an adapter.*compare --rl ADAPTER", adapted)
    with pytest.raises(FrankenlensError, match="logging_strategy is .*epoch.* give every="):
        trainer(made, tmp_path / "run", ComponentLog("blocks.0", start), logging_strategy="epoch").train()
    with pytest.raises(FrankenlensError, match="is not an address"):
        ComponentLog("layer 3")


def test_a_step_s_numbers_are_not_logged_at_another(tmp_path: Path) -> None:
    made = tiny("qwen2_5_vl")
    run = trainer(
        made, tmp_path, ComponentLog("blocks.0", COPY, every=2), max_steps=6, logging_steps=3, max_grad_norm=0
    )
    run.train()
    written = read(tmp_path)["update_norm"].droplevel("address").to_dict()
    name = "update_norm/blocks.0"
    logged = {row["step"]: row[name] for row in run.state.log_history if name in row and "loss" in row}
    assert set(written) == {2, 4, 6} and {row["step"] for row in run.state.log_history} >= {3, 6}
    assert logged == {6: pytest.approx(written[6])}
