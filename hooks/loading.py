"""Loading a checkpoint: safetensors only, nothing random in it, one clear error when something is missing."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from hooks.errors import FrankenlensError
from hooks.extras import require_installed
from hooks.processors import needs_own_code, own_code_message
from hooks.stored.files import SHOWN, entries, require_one_precision, require_shape, weight_files
from hooks.whereabouts import not_found, require_checkpoint


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load an image-text-to-text model, or a causal language model, in evaluation mode.

    Raises:
        FrankenlensError: no such checkpoint, a pickle checkpoint, two sets of weights in one folder, quantized tensors
            without a word of how (or the reverse), an unknown architecture, or weights that are missing or of another
            shape.
        MissingPackage: `device_map` without accelerate.
    """
    if device_map is not None:
        require_installed("device_map", "accelerate")
    hub = {name: kwargs[name] for name in ("revision", "subfolder", "token", "cache_dir") if name in kwargs}
    require_checkpoint(path_or_id)
    if Path(path_or_id).is_dir():
        _require_sound(Path(path_or_id) / hub.get("subfolder", ""), kwargs.get("variant"))
    auto: Any = AutoModelForImageTextToText
    try:
        auto = auto_class(AutoConfig.from_pretrained(path_or_id, trust_remote_code=trust_remote_code, **hub))
        loaded: Any = auto.from_pretrained(
            path_or_id,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **{**kwargs, "ignore_mismatched_sizes": True},  # they are named below
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if needs_own_code(error):
            raise FrankenlensError(own_code_message(str(path_or_id))) from error
        if message := not_found(path_or_id, error, hub):
            raise FrankenlensError(message) from error
        first = str(error).strip().splitlines()[0]
        kind = "image-text-to-text" if auto is AutoModelForImageTextToText else "causal language"
        raise FrankenlensError(f"{path_or_id}: not loaded as a model of the kind {kind}: {first}") from error
    model, info = loaded
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or ())
    for name, stored, wanted in mismatched:
        require_shape(path_or_id, name, stored, wanted)
    if names := [str(key) for key in info.get("missing_keys") or ()]:
        raise FrankenlensError(
            f"{path_or_id}: {len(names)} weights are absent from the checkpoint and would be random: "
            f"{', '.join(names[:SHOWN])} …"
        )
    if not Path(path_or_id).is_dir():
        found = cached_file(str(path_or_id), "config.json", local_files_only=True, **hub)
        _require_sound(Path(str(found)).parent, kwargs.get("variant"))
    return model.eval()


def _require_sound(folder: Path, variant: str | None) -> None:
    """Refuse a checkpoint that would be read otherwise than it was meant, from the headers of its files."""
    files = weight_files(folder, variant)
    require_one_precision(folder, {key: one for file in files for key, one in entries(file).items()})


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
