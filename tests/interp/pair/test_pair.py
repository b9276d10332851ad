"""Pairs are loaded, refused with the thing that differs, and hashed."""

import hashlib
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from interp.pair.pair import Pair, weights_sha256
from interp.prompts.roles import TraceFormat
from tests.families import TinyVLM, tiny


def opened(made: TinyVLM) -> HookedVLM:
    """On a prompt that an unchanged processor wrote: what is changed here is for the pair to find, not for opening."""
    return HookedVLM(made.model, made.processor, inputs=tiny(made.family).inputs(), check=False)


@pytest.fixture
def in_() -> TinyVLM:
    return tiny("llava", 1)


@pytest.fixture
def rl() -> TinyVLM:
    return tiny("llava", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """IN and RL as folders, as `save_pretrained` writes them."""
    root = tmp_path_factory.mktemp("pair")
    for name, seed in (("in", 1), ("rl", 2)):
        made = tiny("llava", seed)
        made.model.save_pretrained(root / name)
        made.processor.save_pretrained(root / name)
    return root


def test_models_and_prompts_of_a_pair(in_, rl):
    fmt = TraceFormat(answer=(r"\boxed{", "}"))
    pair = Pair(opened(in_), opened(rl), opened(tiny("llava", 3)), fmt, system="count")
    assert list(pair.models) == ["in", "rl", "base"]
    assert pair.models["rl"] is pair.rl and pair.processor is in_.processor
    assert pair.trace_format.answer == fmt.answer and pair.builder.system == "count"
    assert list(Pair(pair.in_, pair.rl).models) == ["in", "rl"]


def test_ends_of_turn_are_those_of_the_generation_settings(in_, rl):
    ends = in_.processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<global-img>"])
    rl.model.generation_config.eos_token_id = ends
    assert set(ends) <= set(Pair(opened(in_), opened(rl)).builder.end_ids)


def test_loading_a_pair(folders):
    pair = Pair.from_pretrained(folders / "in", folders / "rl", base=folders / "in", check=False)
    for name, vlm in pair.models.items():
        expected = tiny("llava", 2 if name == "rl" else 1).model.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in vlm.model.state_dict().items())
    found = pair.provenance()
    assert found["in"]["weights_sha256"] == found["base"]["weights_sha256"] != found["rl"]["weights_sha256"]
    assert found["rl"]["class"] == "LlavaForConditionalGeneration" and found["rl"]["name_or_path"].endswith(
        "rl"
    )
    pair.close()


def test_a_pickle_checkpoint_is_refused(folders, tmp_path):
    shutil.copytree(folders / "rl", tmp_path / "rl")
    state = load_file(tmp_path / "rl" / "model.safetensors")
    (tmp_path / "rl" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "rl" / "pytorch_model.bin")
    with pytest.raises(FrankenlensError, match=r"pytorch_model\.bin.*safetensors"):
        Pair.from_pretrained(folders / "in", tmp_path / "rl", check=False)


def test_a_checkpoint_without_a_processor_is_refused(folders, tmp_path, in_, rl):
    (tmp_path / "rl").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders / "rl" / name, tmp_path / "rl")
    with pytest.raises(ValueError, match="processor"):
        Pair.from_pretrained(folders / "in", tmp_path / "rl", check=False)
    with pytest.raises(FrankenlensError, match="RL has no processor"):
        Pair(opened(in_), HookedVLM(rl.model, check=False))


def changed_vocabulary(rl):
    core = json.loads(rl.processor.tokenizer.backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    rl.processor.tokenizer._tokenizer = type(rl.processor.tokenizer.backend_tokenizer).from_str(
        json.dumps(core)
    )


def changed_splitting(rl):
    from tokenizers import normalizers

    rl.processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


CHANGES = {
    "setting text_config.rms_norm_eps: 1e-06 and 0.1": lambda rl: setattr(
        rl.model.config.text_config, "rms_norm_eps", 0.1
    ),
    "setting text_config.rope_parameters.rope_theta": lambda rl: (
        rl.model.config.text_config.rope_parameters.update(rope_theta=7.0)
    ),
    r"tensor lm_head.weight: float32 \(85, 32\) and float32 \(90, 32\)": lambda rl: (
        rl.model.resize_token_embeddings(90)
    ),
    "tensor .*: float32 .* and bfloat16": lambda rl: rl.model.to(torch.bfloat16),
    "token 'red': id .* and": changed_vocabulary,
    "token '<new>': id nothing and 85": lambda rl: rl.processor.tokenizer.add_tokens(["<new>"]),
    "special token eos_token: '<|im_end|>' and '<pad>'": lambda rl: setattr(
        rl.processor.tokenizer, "eos_token", "<pad>"
    ),
    "tokenizer part 'normalizer'": changed_splitting,
    "processor setting image_processor.size.shortest_edge: 24 and 48": lambda rl: setattr(
        rl.processor.image_processor, "size", {"shortest_edge": 48}
    ),
    "processor setting patch_size: 6 and 3": lambda rl: setattr(rl.processor, "patch_size", 3),
    "chat template, from character 0: '<|im_start|>user": lambda rl: setattr(
        rl.processor, "chat_template", "You may think. " + rl.processor.chat_template
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_pair_that_differs_is_refused_with_what_differs(in_, rl, message):
    CHANGES[message](rl)
    with pytest.raises(FrankenlensError, match="(?s)IN and RL are no pair.*" + message.replace("|", r"\|")):
        Pair(opened(in_), opened(rl))


def test_own_templates_may_differ_where_one_is_given(in_, rl, folders, tmp_path):
    given = in_.processor.chat_template
    rl.processor.chat_template = "You may think. " + given
    assert Pair(opened(in_), opened(rl), template=given).builder.template == given
    rl.processor.patch_size = 3
    with pytest.raises(FrankenlensError, match="processor setting patch_size"):
        Pair(opened(in_), opened(rl), template=given)
    adapter(tmp_path, tiny("llava", 1))
    tokenizer = tiny("llava", 1).processor.tokenizer
    tokenizer.chat_template = "You may think. " + given
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FrankenlensError, match="chat template"):
        Pair.from_pretrained(folders / "in", tmp_path, check=False)
    assert Pair.from_pretrained(folders / "in", tmp_path, check=False, template=given)


def test_a_processor_that_keeps_rl_from_opening_is_named(rl, folders, tmp_path):
    rl.model.save_pretrained(tmp_path)
    rl.processor.patch_size = 3
    rl.processor.save_pretrained(tmp_path)
    with pytest.raises(FrankenlensError, match="processor setting patch_size: 6 and 3"):
        Pair.from_pretrained(folders / "in", tmp_path)


def test_another_architecture_is_refused(in_):
    with pytest.raises(
        FrankenlensError, match=r"architecture: LlavaForCond.* and Qwen2_5_VLForConditionalGeneration"
    ):
        Pair(opened(in_), opened(tiny("qwen2_5_vl")))


def test_what_a_checkpoint_records_of_its_making_may_differ(in_, rl):
    rl.model.config._name_or_path = "elsewhere"
    rl.model.config.text_config.use_cache = False
    rl.model.config.text_config.initializer_range = 0.5
    rl.processor.tokenizer.padding_side = "left"
    assert Pair(opened(in_), opened(rl))


def adapter(folder, in_: TinyVLM):
    """A LoRA adapter on two projections of the text tower, with random weights, and its update of one weight."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=r".*language_model.*(q_proj|down_proj)")
    adapted = get_peft_model(in_.model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_stands_for_rl(folders, tmp_path):
    adapter(tmp_path, tiny("llava", 1))
    pair = Pair.from_pretrained(folders / "in", tmp_path, check=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    before, after = (vlm.model.state_dict() for vlm in (pair.in_, pair.rl))
    assert list(before) == list(after)
    name = next(key for key in tensors if "layers.1" in key and "q_proj.lora_A" in key)
    update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * 6 / 2
    weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
    assert torch.allclose(after[weight] - before[weight], update, atol=1e-5)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {
        k for k in before if "language_model" in k and k.endswith(("q_proj.weight", "down_proj.weight"))
    }
    assert pair.provenance()["rl"]["name_or_path"] == str(tmp_path)


def test_an_adapter_that_does_not_fit_is_refused(folders, tmp_path):
    adapter(tmp_path, tiny("llava", 1))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.other.lora_A.weight": torch.ones(2, 3)}, file)
    with pytest.raises(
        FrankenlensError, match=r"adapter tensor base_model\.model\.other\.lora_A\.weight has no place"
    ):
        Pair.from_pretrained(folders / "in", tmp_path, check=False)
    save_file(tensors, file)
    tokenizer = tiny("llava", 1).processor.tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FrankenlensError, match=r"(?s)IN and the adapter are no pair.*token '<new>'"):
        Pair.from_pretrained(folders / "in", tmp_path, check=False)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FrankenlensError, match="Only safetensors"):
        Pair.from_pretrained(folders / "in", tmp_path, check=False)


def test_a_hash_sees_one_weight_and_not_the_object():
    model = torch.nn.Linear(2, 1)
    parts = b""
    for name, tensor in sorted(model.state_dict().items()):
        parts += f"{name} torch.float32 {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes()
    assert weights_sha256(model) == hashlib.sha256(parts).hexdigest()
    before = weights_sha256(model)
    model.bias.data += 1e-6
    assert weights_sha256(model) != before
    assert len(weights_sha256(model.to(torch.bfloat16))) == 64
