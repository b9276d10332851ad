"""Opening, refusing to open, and the self-check's own claims."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hooks import FrankenlensError, HookedVLM
from tests.families import EACH_KIND, tiny


@pytest.mark.parametrize("family", EACH_KIND)
def test_zeroing_every_point_changes_the_logits(family: str) -> None:
    given = tiny(family)
    vlm = HookedVLM(given.model, given.processor)
    changes = vlm.verify()
    assert set(changes) == set(vlm.hook_points)
    assert min(changes.values()) > 1e-3


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_of_the_long_self_check_can_be_left_out(progress: bool, monkeypatch) -> None:
    drawn = []

    def bar(names, disable, **_):
        drawn.append(not disable)
        return names

    monkeypatch.setattr("hooks.selfcheck.tqdm", bar)
    given = tiny("llava")
    HookedVLM(given.model, given.processor).verify(progress=progress)
    assert drawn == [progress]


@pytest.mark.parametrize("family", EACH_KIND)
def test_opening_leaves_no_trace(family: str) -> None:
    given = tiny(family)
    given.model.train()
    for parameter in given.model.parameters():
        parameter.requires_grad_(False)
    HookedVLM(given.model, given.processor)
    assert given.model.training and all(module.training for module in given.model.modules())
    assert all(not p.requires_grad and p.grad is None for p in given.model.parameters())


def test_llava_last_vision_block_is_absent_with_the_reason() -> None:
    given = tiny("llava")
    vlm = HookedVLM(given.model, given.processor)
    last = len(vlm.anatomy.vision.blocks) - 1
    assert vlm.absent
    assert all(name.startswith(f"vision.blocks.{last}.") for name in vlm.absent)
    with pytest.raises(FrankenlensError, match=r"absent.*vision_feature_layer"):
        vlm.run_with_cache(given.inputs(), f"vision.blocks.{last}.hook_mlp_out")


def test_the_block_before_an_absent_one_can_be_written() -> None:
    # transformers records hidden states with hooks of its own; ours must come first or the write is lost.
    given = tiny("llava")
    vlm = HookedVLM(given.model, given.processor)
    name = f"vision.blocks.{len(vlm.anatomy.vision.blocks) - 2}.hook_resid_post"
    with torch.no_grad():
        bare = vlm(given.inputs()).logits
        moved = vlm.run_with_hooks(given.inputs(), [(name, lambda a, hook: a * 2)]).logits
    assert (moved - bare).abs().max() > 1e-2


def test_self_check_catches_a_point_whose_value_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    import hooks.engine

    given = tiny("qwen2_5_vl")
    honest = hooks.engine._new_value
    monkeypatch.setattr(
        hooks.engine, "_new_value", lambda hook, t: None if (v := honest(hook, t)) is None else v * 1.01
    )
    with pytest.raises(FrankenlensError, match="own value back moved the logits"):
        HookedVLM(given.model, given.processor)


@pytest.mark.parametrize("family", EACH_KIND)
@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)))
def test_a_point_that_writes_something_else_is_absent_and_costs_no_other(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hooks.engine

    given = tiny(family)
    given.model.to(dtype)
    inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in given.inputs().items()}
    before = set(HookedVLM(given.model, inputs=inputs).absent)
    honest = hooks.engine._new_value

    def wrong(hook, tensor):
        value = honest(hook, tensor)
        return (
            value if value is None or not hook.context.name.endswith("1.hook_mlp_out") else value.roll(1, -1)
        )

    monkeypatch.setattr(hooks.engine, "_new_value", wrong)
    absent = HookedVLM(given.model, inputs=inputs).absent
    told = {name for name, why in absent.items() if "moved the logits by" in why}
    assert told == {name for name in absent if name.endswith("1.hook_mlp_out")} - before
    assert "blocks.1.hook_mlp_out" in told and set(absent) == before | told


def test_closed_refuses_and_names_the_way_back() -> None:
    given = tiny("qwen2_vl")
    vlm = HookedVLM(given.model, given.processor)
    vlm.close()
    with pytest.raises(FrankenlensError, match="open the model again"):
        vlm(given.inputs())


def test_unknown_hook_names_the_nearest() -> None:
    given = tiny("qwen2_vl")
    vlm = HookedVLM(given.model, given.processor)
    with pytest.raises(FrankenlensError, match=r"blocks\.1\.attn\.hook_pattern"):
        vlm.run_with_cache(given.inputs(), "blocks.1.attn.hook_patern")


def test_a_text_model_opens_without_a_processor_and_says_what_it_lacks() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=8,
        initializer_range=0.5,
    )
    vlm = HookedVLM(LlamaForCausalLM(config).eval())
    assert not vlm.absent and not vlm.can("vision") and vlm.can("plain blocks")
    with pytest.raises(FrankenlensError, match="vision tower"):
        vlm.require("vision", "this analysis")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(vlm({"input_ids": ids}).logits, vlm.model(input_ids=ids).logits)
        _, cache = vlm.run_with_cache({"input_ids": ids})
    assert torch.equal(cache["embed"], vlm.model.get_input_embeddings()(ids))


def test_a_model_that_does_not_run_on_the_prompt_is_refused_in_one_sentence() -> None:
    given = tiny("qwen2_vl")
    with pytest.raises(FrankenlensError, match=r"does not run on the prompt .* inputs=") as caught:
        HookedVLM(given.model, inputs={"input_ids": torch.tensor([[10**6]])})
    assert caught.value.__cause__ is not None
    given.model(**given.inputs())  # the model is as it was


def test_from_pretrained_roundtrip(tmp_path) -> None:
    given = tiny("qwen2_5_vl")
    given.model.save_pretrained(tmp_path)
    given.processor.save_pretrained(tmp_path)
    inputs = given.inputs()
    with torch.no_grad():
        assert torch.equal(HookedVLM.from_pretrained(tmp_path)(inputs).logits, given.model(**inputs).logits)


def test_bad_checkpoints_say_what_is_wrong(tmp_path) -> None:
    given = tiny("qwen2_5_vl")
    with pytest.raises(FrankenlensError, match=r"config\.json|processor"):
        HookedVLM.from_pretrained(tmp_path)
    given.model.save_pretrained(tmp_path)
    with pytest.raises(FrankenlensError, match="processor"):
        HookedVLM.from_pretrained(tmp_path)
    given.processor.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FrankenlensError, match="safetensors"):
        HookedVLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").rename(weights)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(FrankenlensError, match="no_such_model"):
        HookedVLM.from_pretrained(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    given = tiny("qwen2_5_vl")
    given.model.save_pretrained(tmp_path)
    given.processor.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if name.endswith("q_proj.weight")))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(FrankenlensError, match=r"q_proj\.weight"):
        HookedVLM.from_pretrained(tmp_path)


def test_a_model_without_weights_shows_its_points_and_is_not_run() -> None:
    given = tiny("qwen2_5_vl")
    points = set(HookedVLM(given.model, given.processor).hook_points)
    bare = given.model.to("meta")
    with pytest.raises(FrankenlensError, match="has no weights"):
        HookedVLM(bare, given.processor)
    assert points == set(HookedVLM(bare, check=False).hook_points)


def test_a_full_device_is_said_and_makes_no_point_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from hooks import selfcheck_once

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("device is full")

    given = tiny("qwen2_vl")
    monkeypatch.setattr(selfcheck_once, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        HookedVLM(given.model, given.processor)
