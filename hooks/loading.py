"""Loading a checkpoint: safetensors only, nothing random in it, one clear error when something is missing."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from hooks.errors import FrankenlensError, one_line
from hooks.extras import require_installed
from hooks.processors import needs_own_code, own_code_message
from hooks.stored.entry import DTYPES, Entry
from hooks.stored.files import SHOWN, require_one_precision, require_shape, shards_of
from hooks.stored.layouts import Layout, layout_of
from hooks.stored.settings import require_sound_settings
from hooks.stored.tensors import Stored
from hooks.stored.wrapped import is_wrapped, unwrapped
from hooks.whereabouts import not_found, require_checkpoint

LARGER = 16
"""How many numbers for a byte in its files a model may have; packed in two bits, it has four."""
FREE = 1 << 28
"""Numbers that a model may have whatever its files hold: a gigabyte."""
_QUIET = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
    settings: str | Path | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load an image-text-to-text model, or a causal language model, in evaluation mode.

    Args:
        path_or_id: a folder, in whatever layout a trainer left it (`hooks.stored.layouts`), or a repository.
        settings: the folder or repository that config.json is taken from where a trainer's folder has none.
        dtype, device_map, trust_remote_code, kwargs: as `from_pretrained` has them.

    Raises:
        FrankenlensError: no such checkpoint, a pickle that names code, two sets of weights in one folder, quantized
            tensors without a word of how (or the reverse), an unknown architecture, or weights that are missing or of
            another shape.
        MissingPackage: `device_map` without accelerate.
    """
    if device_map is not None:
        require_installed("device_map", "accelerate")
    hub = {name: kwargs[name] for name in ("revision", "subfolder", "token", "cache_dir") if name in kwargs}
    require_checkpoint(path_or_id)
    is_folder, stored = os.path.isdir(path_or_id), {}
    source: Any = path_or_id
    if is_folder:
        folder = Path(path_or_id) / hub.get("subfolder", "")
        layout, stored = _require_sound(folder, kwargs.get("variant"), settings)
        if not layout.is_plain or is_wrapped(stored):
            source, hub = None, {}
            kwargs = {name: value for name, value in kwargs.items() if name not in ("subfolder", "variant")}
    else:
        _require_sound_repository(str(path_or_id), hub)
    auto: Any = AutoModelForImageTextToText
    try:
        named = path_or_id if source is not None else layout.settings
        config = AutoConfig.from_pretrained(named, trust_remote_code=trust_remote_code, **hub)
        auto = auto_class(config)
        if is_folder and not trust_remote_code:
            _require_modest(path_or_id, auto, config, stored)
        kind, more = auto, {"trust_remote_code": trust_remote_code}
        if source is None:
            kind, more = _streamed(auto, config, stored, layout)
            dtype = _own_type(config, stored) if dtype == "auto" else dtype
        loaded: Any = kind.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            **more,
            use_safetensors=True,
            output_loading_info=True,
            **{**kwargs, "ignore_mismatched_sizes": True},  # they are named below
        )
    except (FrankenlensError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a configuration can make transformers raise anything
        if needs_own_code(error):
            raise FrankenlensError(own_code_message(str(path_or_id))) from error
        if message := not_found(path_or_id, error, hub):
            raise FrankenlensError(message) from error
        first = one_line(error)
        said = "image-text-to-text" if auto is AutoModelForImageTextToText else "causal language"
        raise FrankenlensError(f"{path_or_id}: not loaded as a model of the kind {said}: {first}") from error
    model, info = loaded
    if source is None:
        _name(model, path_or_id, layout)
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or ())
    for name, stored, wanted in mismatched:
        require_shape(path_or_id, name, stored, wanted)
    if names := [str(key) for key in info.get("missing_keys") or ()]:
        raise FrankenlensError(
            f"{path_or_id}: {len(names)} weights are absent from the checkpoint and would be random: "
            f"{', '.join(names[:SHOWN])} …"
        )
    if not is_folder:
        found = cached_file(str(path_or_id), "config.json", local_files_only=True, **hub)
        _require_sound(Path(str(found)).parent, kwargs.get("variant"))
    return model.eval()


def _require_sound(
    folder: Path, variant: str | None, settings: str | Path | None = None
) -> tuple[Layout, dict[str, Entry]]:
    """Refuse a checkpoint that would be read otherwise than it was meant, from the headers of its files."""
    layout = layout_of(folder, variant, settings)
    stored = layout.read()
    require_sound_settings(layout.settings, len(stored))
    if layout.is_plain:
        require_one_precision(folder, stored)
    return layout, stored


class _Waiting:
    """A tensor that transformers reads when it comes to it, one after the other, as it does with safetensors."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._stored.read()[index]

    def get_shape(self) -> list[int]:
        """Its shape, without reading it."""
        return list(self._stored.shape)


def _streamed(
    auto: Any, config: Any, stored: Mapping[str, Entry], layout: Layout
) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The model's class, and arguments of its `from_pretrained` that hand it a trainer's tensors by its names."""
    with torch.device("meta"):
        model = auto.from_config(config)
    own, _ = unwrapped(stored, model, layout.folder)
    require_one_precision(layout.settings, own)
    waiting = {key: _Waiting(one.stored) for key, one in own.items()}
    return type(model), {"config": config, "state_dict": waiting}


def _own_type(config: Any, stored: Mapping[str, Entry]) -> torch.dtype:
    """What "auto" is: the configuration's type, as of a checkpoint in safetensors, or that of the first weight."""
    kinds = (DTYPES.get(one.kind) for one in stored.values())
    first = next((one for one in kinds if one is not None and one.is_floating_point), torch.float32)
    return getattr(config, "dtype", None) or first


def _name(model: PreTrainedModel, path: str | Path, layout: Layout) -> None:
    """What `from_pretrained` takes from a folder beside weights: the name, and how it generates."""
    model.name_or_path = model.config.name_or_path = str(path)
    if os.path.isfile(layout.settings / "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(layout.settings, local_files_only=True)


def _require_sound_repository(name: str, hub: Mapping[str, Any]) -> None:
    """Refuse a repository by its small files, before its weights are there."""
    files = ("config.json", "adapter_config.json", "model.safetensors.index.json")
    try:
        if cached_file(name, files[0], **hub, **_QUIET) is None:
            return
        found = {file: cached_file(name, file, **hub, **_QUIET) for file in files}
    except (OSError, ValueError, TypeError):
        return  # no such repository, or no network: transformers says so in its own words
    if found["adapter_config.json"]:
        raise FrankenlensError(
            f"{name} is a PEFT adapter, not a checkpoint: download it, and give its folder as RL beside its IN."
        )
    if found["config.json"]:
        require_sound_settings(Path(found["config.json"]).parent)
    if found["model.safetensors.index.json"]:
        shards_of(Path(found["model.safetensors.index.json"]))


def _require_modest(path: str | Path, auto: Any, config: Any, stored: Mapping[str, Entry]) -> None:
    """Refuse a configuration of a far larger model than its files hold, before memory is spent on it.

    Built without weights, and only where sizes that it names are those of no tensor.
    """
    if _fits(config, stored):
        return
    with torch.device("meta"):
        model = auto.from_config(config)
    wanted = sum(weight.numel() for weight in model.state_dict().values())
    held = sum(one.size for one in stored.values())
    if wanted > max(FREE, LARGER * held):
        raise FrankenlensError(
            f"{path}: config.json describes a model of {wanted:,} numbers, and its files hold {held:,} bytes: they are "
            "not of one checkpoint; download or save it again, whole."
        )


def _fits(config: Any, stored: Mapping[str, Entry]) -> bool:
    """Whether widths and depths of a configuration are found in the files."""
    sizes = {size for one in stored.values() for size in one.shape}
    depth = max((int(n) for key in stored for n in re.findall(r"\.(\d{1,6})\.", key)), default=-1) + 1
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        widths = [getattr(part, name, None) for name in ("hidden_size", "intermediate_size", "vocab_size")]
        layers = getattr(part, "num_hidden_layers", None)
        if any(isinstance(one, int) and one not in sizes for one in widths):
            return False
        if isinstance(layers, int) and layers > depth:
            return False
    return True


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a configuration's model with logits: images and text, else causal.

    Some classes that see images are filed as causal language models (Phi-4-multimodal), some configurations have a
    class of either kind; then the checkpoint's own `architectures` decides. Remote code says itself what it is.
    """
    kinds = (
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    )
    named = set(getattr(config, "architectures", None) or ())
    filed: list[tuple[Any, Any]] = [
        (auto, mapping[type(config)]) for auto, mapping in kinds if type(config) in mapping
    ]
    for auto, own in filed:
        if named.intersection(kind.__name__ for kind in (own if isinstance(own, tuple) else (own,))):
            return auto
    remote = getattr(config, "auto_map", None) or {}
    known = [auto for auto, _ in filed] or [auto for auto, _ in kinds if auto.__name__ in remote]
    return known[0] if known else AutoModelForImageTextToText
