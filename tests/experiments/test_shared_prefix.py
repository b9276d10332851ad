"""The shared-prefix trainer against TRL's own log-probabilities, entropies and losses, setting by setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from experiments.triple import checkpoints, grpo_settings
from experiments.triple.grpo_settings import REFUSED, require_followed, require_one_device, unknown_settings
from experiments.triple.model import ModelSize, build_model, build_tokenizer
from experiments.triple.rl import RL, build_trainer
from experiments.triple.shared_prefix import SharedPrefixGRPOTrainer
from hooks.errors import FrankenlensError
from tests.hooks.reference import tolerance

TINY = ModelSize(
    layers=2, hidden=32, heads=2, kv_heads=1, mlp=32, vision_layers=1, vision_hidden=16, vision_heads=2
)
SAMPLES = 3
THEIRS, OURS = (kind._get_per_token_logps_and_entropies for kind in (GRPOTrainer, SharedPrefixGRPOTrainer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("triple") / "in"
    checkpoints.save(build_model(build_tokenizer(), TINY, seed=0).eval(), path)
    return path


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(**trl: Any) -> Any:
        model, processor = checkpoints.load(folder)
        trainer = build_trainer(model, processor, RL(1, prompts=2, samples=SAMPLES), 0, tmp_path, trl=trl)
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        return trainer

    return make


@pytest.fixture(scope="module")
def sampled(folder: Path, tmp_path_factory) -> dict[str, Any]:
    """Two prompts with three completions each, cut to different lengths, with advantages that differ."""
    model, processor = checkpoints.load(folder)
    out = tmp_path_factory.mktemp("sampled")
    settings = {"max_completion_length": 12, "num_iterations": 2}
    trainer: Any = build_trainer(model, processor, RL(1, prompts=2, samples=SAMPLES), 0, out, trl=settings)
    model.train()
    rows = [trainer.train_dataset[i] for i in range(2) for _ in range(SAMPLES)]
    inputs = trainer._generate_and_score_completions(rows)
    for row in range(2 * SAMPLES):
        inputs["completion_mask"][row, 3 + row :] = 0
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    inputs["advantages"] = torch.tensor([1.5, -0.7, -0.8, 0.4, 1.1, -1.5])
    return inputs


def scores(
    trainer: Any, how: Any, model: Any, inputs: dict[str, Any], compute_entropy: bool = True, **more: Any
) -> Any:
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    ids, mask = (
        torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
    )
    kept = inputs["completion_ids"].shape[1]
    given = {name: inputs[name] for name in names if name in inputs}
    return how(trainer, model, ids, mask, kept, compute_entropy=compute_entropy, **given, **more)


def loss(trainer: Any, how: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's loss over what `how` scores, after a step away from what was sampled from; and its gradient."""
    trainer._get_per_token_logps_and_entropies = MethodType(how, trainer)
    given, start = dict(inputs), copy.deepcopy(trainer.model.state_dict())
    with torch.no_grad():
        given["old_per_token_logps"] = scores(trainer, how, trainer.model, inputs)[0]
        if trainer.ref_model is not None:
            given["ref_per_token_logps"] = scores(trainer, how, trainer.ref_model, inputs, False)[0]
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    trainer.model.zero_grad()
    value = trainer._compute_loss(trainer.model, given)
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.model.load_state_dict(start)
    return value.detach(), gradient


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probabilities_and_entropies_at_a_temperature(temperature: float, made, sampled) -> None:
    trainer = made(temperature=temperature)
    with torch.no_grad():
        own, own_entropy, _ = scores(trainer, OURS, trainer.model, sampled)
        theirs, entropy, _ = scores(trainer, THEIRS, trainer.model, sampled)
        parts = scores(trainer, OURS, trainer.model, sampled, batch_size=4)
    for ours, other in ((own, theirs), (own_entropy, entropy), (parts[0], theirs), (parts[1], entropy)):
        assert (ours - other).abs().max() <= tolerance(other)
    assert ((own != 0) == sampled["completion_mask"].bool()).all()
    trainer.temperature = 1.3 * temperature  # what an ignored temperature would do
    with torch.no_grad():
        ignored = scores(trainer, OURS, trainer.model, sampled)[0]
    assert (ignored - theirs).abs().max() > 100 * tolerance(theirs)


def the_same(trainer: Any, sampled: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's loss and gradient, which are ours too."""
    own, gradient = loss(trainer, OURS, sampled)
    theirs, other = loss(trainer, THEIRS, sampled)
    assert (own - theirs).abs() <= tolerance(theirs)
    assert (gradient - other).abs().max() <= tolerance(other)
    return theirs, other


@pytest.mark.parametrize(
    "trl",
    [
        {"temperature": 0.7},
        *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo")),
        {"importance_sampling_level": "sequence"},
        {"epsilon": 0.01},
        {"epsilon_high": 0.001},
        {"delta": 1.001},
        {"beta": 0.5},
        {"beta": 0.5, "use_bias_correction_kl": False},
        {"top_entropy_quantile": 0.4},
        {"entropy_coef": 0.3},
        {"off_policy_mask_threshold": 1e-6},
    ],
    ids=str,
)
def test_every_loss_is_trl_own(trl: dict[str, Any], made, sampled) -> None:
    theirs, other = the_same(made(**trl), sampled)
    usual = "grpo" if trl.get("loss_type", "grpo") != "grpo" else "dapo"  # of one batch, bnpo is dapo
    plain, without = loss(made(loss_type=usual), OURS, sampled)
    assert max((plain - theirs).abs(), (without - other).abs().max()) > 100 * tolerance(other)


@pytest.mark.parametrize(
    "trl",
    [{"gradient_checkpointing": True}, {"pad_to_multiple_of": 8}],
    ids=str,
)
def test_what_changes_no_number_changes_none(trl: dict[str, Any], made, sampled) -> None:
    _, gradient = the_same(made(**trl), sampled)
    assert gradient.abs().max() > 100 * tolerance(gradient)


def test_a_completion_that_is_masked_out_whole(made, sampled) -> None:
    """As `mask_truncated_completions` does to those that were cut off."""
    inputs = {**sampled, "completion_mask": sampled["completion_mask"].clone()}
    inputs["completion_mask"][[0, 4]] = 0
    trainer = made(mask_truncated_completions=True)
    own, gradient = loss(trainer, OURS, inputs)
    theirs, other = loss(trainer, THEIRS, inputs)
    assert (own - theirs).abs() <= tolerance(theirs)
    assert (gradient - other).abs().max() <= tolerance(other)
    assert (loss(trainer, OURS, sampled)[0] - theirs).abs() > 100 * tolerance(theirs)
    inputs["completion_mask"][:] = 0
    assert not loss(trainer, OURS, inputs)[1].any()


def test_images_of_other_sizes_are_other_prompts(made, sampled) -> None:
    """The same tokens before another image, and images with other numbers of patches, are no group."""
    trainer = made()
    inputs = {**sampled, "pixel_values": sampled["pixel_values"].clone()}
    per = len(inputs["pixel_values"]) // (2 * SAMPLES)
    inputs["pixel_values"][per : 2 * per] += 0.5
    with torch.no_grad():
        own = scores(trainer, OURS, trainer.model, inputs)[0]
        theirs = scores(trainer, THEIRS, trainer.model, inputs)[0]
        before = scores(trainer, THEIRS, trainer.model, sampled)[0]
    assert (own - theirs).abs().max() <= tolerance(theirs)
    assert (theirs - before)[1].abs().max() > 100 * tolerance(theirs)
    inputs["image_grid_thw"] = torch.cat([inputs["image_grid_thw"], inputs["image_grid_thw"][:1]])
    with pytest.raises(FrankenlensError, match="every prompt needs one image"):
        scores(trainer, OURS, trainer.model, inputs)


def test_bf16_runs_in_autocast(made, sampled, monkeypatch) -> None:
    """Off from TRL's own by no more than autocast itself is from full precision, and not full precision."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    whole = made()
    with torch.no_grad():
        full = scores(whole, OURS, whole.model, sampled)[0]
    trainer = made(bf16=True)
    with torch.no_grad():
        own = scores(trainer, OURS, trainer.model, sampled)[0]
        theirs = scores(trainer, THEIRS, trainer.model, sampled)[0]
    rounding = (theirs - full).abs().max()
    assert rounding > 100 * tolerance(full)
    assert (own - full).abs().max() > 0.1 * rounding and (own - theirs).abs().max() < 2 * rounding


ON = {
    "neftune_noise_alpha": 5.0,
    "router_aux_loss_coef": 0.01,
    "deepspeed": "zero3.json",
    "fsdp": "full_shard",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_by_name(name: str) -> None:
    require_followed({name: 0.0 if name == "router_aux_loss_coef" else None})
    with pytest.raises(FrankenlensError, match=rf"{name} is .*does not follow: .*TRL's own GRPOTrainer"):
        require_followed({name: ON.get(name, True)})


def test_refusals_come_before_training(made, monkeypatch) -> None:
    with pytest.raises(FrankenlensError, match=r"neftune_noise_alpha is 5\.0, .*Leave it at None"):
        made(neftune_noise_alpha=5.0)
    assert unknown_settings() == frozenset()
    monkeypatch.setattr(grpo_settings, "BY_TRL", grpo_settings.BY_TRL - {"delta"})
    made()
    with pytest.raises(FrankenlensError, match=r"delta is 1\.5, .*newer than the shared-prefix loss"):
        made(delta=1.5)


def test_attention_that_takes_no_mask_and_several_devices_are_refused(folder: Path, tmp_path: Path) -> None:
    model, processor = checkpoints.load(folder)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(FrankenlensError, match=r"'flash_attention_2', which takes no mask.*'sdpa'"):
        build_trainer(model, processor, RL(1, prompts=2, samples=2), 0, tmp_path)

    class Launched:
        world_size, n_gpu = 1, 4

    with pytest.raises(FrankenlensError, match="there are 4 devices"):
        require_one_device(Launched)
