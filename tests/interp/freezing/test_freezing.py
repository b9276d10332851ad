"""Freezing against training loops written out by hand, under optimizers, accelerate and TRL."""

import copy
import gc
import json
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks as post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as pre_hooks

from hooks import FrankenlensError, HookedVLM, weight_slices
from hooks.unopened import unopened_anatomy
from interp.freezing import freeze
from interp.training import COPY, ComponentLog
from tests.families import EACH_KIND, TinyVLM, tiny

UNITS = (
    "blocks.1.attn.head.1",
    "blocks.1.attn.kv_head.0",
    "blocks.2.mlp.neuron.3-7",
    "vision.blocks.1.attn.head.0",
)
MIXED = ("blocks.0", *UNITS)
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, foreach=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.3, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.3),
}


@pytest.fixture
def vlm() -> TinyVLM:
    return tiny("qwen2_5_vl")


@pytest.fixture(autouse=True)
def _no_hook_stays() -> Iterator[None]:
    yield
    assert not post_hooks and not pre_hooks


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def masks(model, addresses) -> dict[str, Tensor]:
    """True where a weight is frozen, for every parameter; by the slices that grafts use too."""
    found = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for address in addresses:
        for piece in weight_slices(model, unopened_anatomy(model), address):
            piece.of(found[piece.parameter]).fill_(True)
    return found


def backward(model, inputs) -> None:
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def train(model, inputs, make, steps: int = 3, accumulate: int = 2, optimizer=None) -> dict[str, Tensor]:
    """An ordinary loop with clipping and accumulation; returns where a gradient was not 0."""
    optimizer = optimizer or make(model.parameters())
    seen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for _ in range(steps):
        for _ in range(accumulate):
            backward(model, inputs)
        for name, p in model.named_parameters():
            if p.grad is not None:
                seen[name] |= p.grad != 0
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_kept_and_moved(before, model, frozen, seen) -> None:
    for name, p in model.named_parameters():
        assert torch.equal(p[frozen[name]], before[name][frozen[name]]), name
        assert not seen[name][frozen[name]].any(), name
        rest = ~frozen[name]
        if seen[name][rest].any():
            assert not torch.equal(p[rest], before[name][rest]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_weights_keep_every_bit_and_the_others_move(name: str, vlm: TinyVLM) -> None:
    model, inputs, make = vlm.model, vlm.inputs(batch=2), OPTIMIZERS[name]
    before, frozen, free = weights(model), masks(model, MIXED), copy.deepcopy(model)
    with freeze(model, MIXED) as held:
        seen = train(model, inputs, make)
        report = held.report()
    assert_kept_and_moved(before, model, frozen, seen)
    assert held.n_frozen == sum(int(mask.sum()) for mask in frozen.values())
    assert held.n_trained == sum(int((~mask).sum()) for mask in frozen.values())
    assert report["weights"].sum() == sum(p.numel() for p in model.parameters())
    assert (
        report.loc[report["frozen"], "identical"].all() and not report.loc[report["frozen"], "gradient"].any()
    )
    assert (report.loc[~report["frozen"], "identical"] != report.loc[~report["frozen"], "gradient"]).all()
    train(free, inputs, make)  # what freezing guards against
    moved = max(
        float((p.detach() - before[n])[frozen[n]].abs().max())
        for n, p in free.named_parameters()
        if frozen[n].any()
    )
    assert moved > 1e-3


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_the_rest_is_trained_exactly_as_if_the_frozen_weights_were_constants(name: str, vlm: TinyVLM) -> None:
    model, inputs, make = vlm.model, vlm.inputs(batch=2), OPTIMIZERS[name]
    reference, frozen, before = copy.deepcopy(model), masks(model, UNITS), weights(model)
    optimizer, norms = make(reference.parameters()), []
    for _ in range(3):
        backward(reference, inputs)
        for n, p in reference.named_parameters():
            p.grad[frozen[n]] = 0  # by hand, and the values put back by hand
        norms.append(nn.utils.clip_grad_norm_(reference.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for n, p in reference.named_parameters():
                p[frozen[n]] = before[n][frozen[n]]
    optimizer, own = make(model.parameters()), []
    with freeze(model, UNITS):
        for _ in range(3):
            backward(model, inputs)
            own.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            optimizer.zero_grad()
    assert own == norms
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    full = copy.deepcopy(vlm.model)
    full.load_state_dict(before, strict=False)
    backward(full, inputs)
    assert nn.utils.clip_grad_norm_(full.parameters(), 0.5) > norms[0] * (
        1 + 1e-4
    )  # the slices do count otherwise


@pytest.mark.parametrize("name", ["adamw", "sgd momentum"])
def test_an_optimizer_that_is_older_than_the_freezing(name: str, vlm: TinyVLM) -> None:
    model, inputs, make = vlm.model, vlm.inputs(batch=2), OPTIMIZERS[name]
    optimizer = make(model.parameters())
    train(model, inputs, make, steps=2, optimizer=optimizer)  # now it holds momentum of all
    backward(model, inputs)  # and every parameter a gradient
    before, frozen = weights(model), masks(model, MIXED)
    with freeze(model, MIXED):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seen = train(model, inputs, make, optimizer=optimizer)
    assert_kept_and_moved(before, model, frozen, seen)
    kept = weights(model)
    train(model, inputs, make, steps=1, optimizer=optimizer)  # released: all of it trains again
    assert all(not torch.equal(p, kept[n]) for n, p in model.named_parameters() if frozen[n].any())


@pytest.mark.parametrize("family", EACH_KIND)
def test_every_kind_of_address_in_every_family(family: str) -> None:
    vlm = tiny(family)
    model, inputs = vlm.model, vlm.inputs(batch=2)
    addresses = (
        *UNITS,
        "projector",
        "ln_final",
        "vision.blocks.0",
        "blocks.0.mlp",
        "vision.blocks.1.mlp.neuron.2",
    )
    if model.config.tie_word_embeddings or model.lm_head.weight is model.get_input_embeddings().weight:
        addresses = (*addresses, "embed")
    before, frozen = weights(model), masks(model, addresses)
    with freeze(HookedVLM(model, inputs=inputs), addresses):
        seen = train(model, inputs, OPTIMIZERS["adamw"], steps=1)
    assert_kept_and_moved(before, model, frozen, seen)
    assert any(mask.any() and not mask.all() for mask in frozen.values())


def test_the_embedding_is_both_where_it_is_tied() -> None:
    model = tiny("smolvlm").model
    with freeze(model, "embed"):
        assert not model.lm_head.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    with pytest.raises(FrankenlensError, match="name `embed`"):
        freeze(model, "unembed")


def test_all_heads_of_a_layer_leave_its_queries_to_no_one(vlm: TinyVLM) -> None:
    block = unopened_anatomy(vlm.model).text.blocks[1]
    with freeze(vlm.model, ["blocks.1.attn.head.0-3", "blocks.1.attn.head.2"]) as held:
        assert not vlm.model.get_parameter(f"{block.qkv[0]}.weight").requires_grad
        assert not vlm.model.get_parameter(f"{block.out}.weight").requires_grad
        assert vlm.model.get_parameter(f"{block.qkv[1]}.weight").requires_grad
        assert held.n_frozen == sum(
            int(m.sum()) for m in masks(vlm.model, ["blocks.1.attn.head.0-3"]).values()
        )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_bfloat16_autocast(use_reentrant: bool, vlm: TinyVLM) -> None:
    model, inputs = vlm.model, vlm.inputs(batch=2)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    addresses = (*UNITS, "blocks.0")
    before, frozen = weights(model), masks(model, addresses)
    with freeze(model, addresses), torch.autocast("cpu", torch.bfloat16):
        seen = train(model, inputs, OPTIMIZERS["adamw"])
    assert_kept_and_moved(before, model, frozen, seen)
    assert seen[f"{unopened_anatomy(model).text.blocks[1].qkv[0]}.weight"].any()


def test_bfloat16_weights(vlm: TinyVLM) -> None:
    model, inputs = vlm.model.to(torch.bfloat16), vlm.inputs(batch=2)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    before, frozen = weights(model), masks(model, MIXED)
    with freeze(model, MIXED):
        train(model, inputs, OPTIMIZERS["adamw"])
    assert all(torch.equal(p[frozen[n]], before[n][frozen[n]]) for n, p in model.named_parameters())


def test_accelerate(vlm: TinyVLM) -> None:
    from accelerate import Accelerator

    model, inputs = vlm.model, vlm.inputs(batch=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    before, frozen = weights(model), masks(model, MIXED)
    with freeze(model, MIXED) as held:
        wrapped, optimizer = accelerator.prepare(model, OPTIMIZERS["adamw"](model.parameters()))
        for _ in range(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**inputs, labels=inputs["input_ids"]).loss)
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    report = held.report()
    assert all(torch.equal(p[frozen[n]], before[n][frozen[n]]) for n, p in model.named_parameters())
    assert (report["identical"] != report["gradient"]).all()


def test_transformers_own_trainer(vlm: TinyVLM, tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    model, inputs = vlm.model, vlm.inputs(batch=2)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.3,
        max_grad_norm=0.1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    before, frozen = weights(model), masks(model, MIXED)
    with freeze(model, MIXED) as held:
        data = {"data_collator": lambda _: {**inputs, "labels": inputs["input_ids"]}}
        Trainer(model, settings, train_dataset=list(range(8)), **data).train()  # type: ignore[arg-type]
    report = held.report()
    assert all(torch.equal(p[frozen[n]], before[n][frozen[n]]) for n, p in model.named_parameters())
    assert report.loc[report["frozen"], "identical"].all()
    assert not report.query("not frozen and gradient")["identical"].any()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_trl_grpo_with_images(checkpointing: bool, vlm: TinyVLM, tmp_path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = vlm.model, vlm.processor.tokenizer
    rows = [
        {"prompt": [{"role": "user", "content": f"what color is cell {i} ?"}], "images": [image]}
        for i, image in enumerate(vlm.images(4))
    ]
    tokenizer.padding_side = "left"  # as TRL loads it
    added = tokenizer.added_tokens_decoder.items()
    special = [i for i, token in added if token.special and i != tokenizer.eos_token_id]
    settings = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.3,
        max_grad_norm=0.1,
        gradient_checkpointing=checkpointing,
        generation_kwargs={"suppress_tokens": special},
        report_to=[],
        save_strategy="no",
    )

    def reward(completion_ids: list[list[int]], **_) -> list[float | None]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    before, frozen = weights(model), masks(model, MIXED)
    log = ComponentLog([*UNITS, "blocks.2.attn"], COPY, every=1)
    with freeze(model, MIXED) as held:
        GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=vlm.processor,
            callbacks=[log],
        ).train()
    report = held.report()
    lines = map(json.loads, (tmp_path / "components.jsonl").read_text().splitlines())
    last = {line["address"]: line for line in lines if line["step"] == 2}
    pieces = weight_slices(model, unopened_anatomy(model), "blocks.2.attn")
    moved = [p.of(model.get_parameter(p.parameter)) - p.of(before[p.parameter]) for p in pieces]
    assert last["blocks.2.attn"]["update_norm"] == pytest.approx(
        float(nn.utils.get_total_norm(moved)), rel=1e-5
    )
    assert last["blocks.2.attn"]["gradient_norm"] > 0
    assert all(not last[unit]["changed"] and not last[unit]["gradient_norm"] for unit in UNITS)
    assert all(torch.equal(p[frozen[n]], before[n][frozen[n]]) for n, p in model.named_parameters())
    assert (
        report.loc[report["frozen"], "identical"].all() and not report.loc[report["frozen"], "gradient"].any()
    )
    trained = report.query("not frozen")
    assert not trained.query("gradient")["identical"].any()
    assert trained["gradient"].mean() > 0.95


def state(model) -> tuple:
    flags = {n: (p.requires_grad, len(p._backward_hooks or ())) for n, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return flags, hooks, list(model.state_dict())


def test_released_it_leaves_no_trace(vlm: TinyVLM) -> None:
    model = vlm.model
    model.get_parameter("model.language_model.layers.0.mlp.up_proj.weight").requires_grad_(
        False
    )  # the user's own
    before = state(model)
    held = freeze(model, MIXED)
    assert state(model) != before and not held.released
    held.release()
    held.release()
    assert held.released and state(model) == before
    with pytest.raises(RuntimeError), freeze(model, MIXED):
        raise RuntimeError
    assert state(model) == before


def test_it_acts_though_no_one_holds_it_and_ends_with_the_model() -> None:
    vlm = tiny("qwen2_5_vl")
    model, inputs = vlm.model, vlm.inputs(batch=2)
    before, frozen = weights(model), masks(model, MIXED)
    freeze(model, MIXED)
    gc.collect()
    seen = train(model, inputs, OPTIMIZERS["adamw"], steps=1)
    assert_kept_and_moved(before, model, frozen, seen)
    twin = copy.deepcopy(model)  # a copy is free
    kept = weights(twin)
    train(twin, inputs, OPTIMIZERS["adamw"], steps=1)
    assert any(not torch.equal(p[frozen[n]], kept[n][frozen[n]]) for n, p in twin.named_parameters())
    del model, vlm, seen
    gc.collect()
    assert not pre_hooks and not post_hooks


def test_the_report_sees_what_no_optimizer_did(vlm: TinyVLM) -> None:
    head = next(iter(weight_slices(vlm.model, unopened_anatomy(vlm.model), UNITS[0])))
    with freeze(vlm.model, MIXED) as held, torch.no_grad():
        assert held.report()["identical"].all() and held.report()["gradient"].isna().all()
        head.of(vlm.model.get_parameter(head.parameter))[0, 0] += 1e-6
        changed = held.report().query("not identical")
        assert changed[["tensor", "frozen"]].values.tolist() == [[head.parameter, True]]
        twin = copy.deepcopy(vlm.model)
        assert len(held.report(twin).query("not identical")) == 1


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ("blocks.9", r"blocks\.9: the text tower has blocks 0-2"),
        (["blocks.0", "blocks.1.attn.head.4"], "block 1 has heads 0-3"),
        ("block.1", "'block.1' is not an address. Did you mean"),
        ([], "at least one address"),
        (["vision", "projector", "blocks.0-2", "embed", "ln_final", "unembed"], "nothing is left to train"),
    ],
)
def test_what_names_nothing_is_refused_and_the_model_is_as_it_was(
    addresses, message: str, vlm: TinyVLM
) -> None:
    before = state(vlm.model)
    with pytest.raises(FrankenlensError, match=message):
        freeze(vlm.model, addresses)
    assert state(vlm.model) == before


def test_adapters_are_refused_before_and_after(vlm: TinyVLM) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(vlm.model), settings)
    with pytest.raises(FrankenlensError, match=r"q_proj is wrapped in an adapter.*merge_and_unload"):
        freeze(adapted, "blocks.0")
    with pytest.raises(FrankenlensError, match="not a Linear"):
        freeze(nn.Linear(2, 2), "blocks.0")
    with freeze(vlm.model, "blocks.0"):
        late: nn.Module = get_peft_model(vlm.model, settings)
        before = weights(late)
        with pytest.raises(FrankenlensError, match="is wrapped in an adapter"):
            train(late, vlm.inputs(batch=2), OPTIMIZERS["adamw"])
        assert all(torch.equal(p, before[n]) for n, p in late.named_parameters())


def test_single_units_of_sharded_models_are_refused_and_whole_tensors_are_not(
    vlm: TinyVLM, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        FrankenlensError, match=re.escape("rows 8-15 of") + r".*cannot be frozen alone.*data-parallel"
    ):
        freeze(vlm.model, UNITS[0])
    freeze(vlm.model, "blocks.0").release()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    vlm.model.get_parameter(
        "lm_head.weight"
    ).ds_id = 0  # DeepSpeed marks all parameters; this one is not frozen
    freeze(vlm.model, UNITS[0]).release()
    query = vlm.model.get_parameter("model.language_model.layers.1.self_attn.q_proj.weight")
    query.ds_id = 1
    with pytest.raises(FrankenlensError, match="cannot be frozen alone"):
        freeze(vlm.model, UNITS[0])
    del query.ds_id
    with freeze(vlm.model, UNITS[0]):
        query._hp_mapping = None  # ZeRO-1 and 2 mark them when training starts
        before = weights(vlm.model)
        with pytest.raises(FrankenlensError, match="cannot be frozen alone"):
            train(vlm.model, vlm.inputs(batch=2), OPTIMIZERS["adamw"])
        assert all(torch.equal(p, before[n]) for n, p in vlm.model.named_parameters())


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp(vlm: TinyVLM, process_group) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs = vlm.model, vlm.inputs(batch=2)
    mesh, before, frozen = init_device_mesh("cpu", (1,)), weights(model), masks(model, ["blocks.0", "vision"])
    unit = copy.deepcopy(model)
    with freeze(unit, UNITS[0]):
        fully_shard(unit, mesh=mesh)
        with pytest.raises(FrankenlensError, match="cannot be frozen alone"):
            train_sharded(unit, inputs)
    with freeze(model, ["blocks.0", "vision"]) as held:
        fully_shard(model, mesh=mesh)
        train_sharded(model, inputs)
        with pytest.raises(FrankenlensError, match="sharded or wrapped"):
            held.report()
        saved = tiny("qwen2_5_vl").model
        saved.load_state_dict(
            {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.state_dict().items()}
        )
        report = held.report(saved)
    assert report.loc[report["frozen"], "identical"].all()
    trained = report.query("not frozen")
    assert not trained.loc[["proj.weight" in name for name in trained["tensor"]], "identical"].any()
    for name, p in saved.named_parameters():
        assert torch.equal(p[frozen[name]], before[name][frozen[name]])


def train_sharded(model, inputs) -> None:
    optimizer = OPTIMIZERS["adamw foreach"](p for p in model.parameters() if p.requires_grad)
    backward(model, inputs)
    optimizer.step()
