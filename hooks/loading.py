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

from hooks.errors import FrankenlensError
from hooks.extras import require_installed
from hooks.processors import needs_own_code, own_code_message


def load_model(
    path_or_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load an image-text-to-text model, or a causal language model, in evaluation mode.

    Raises:
        FrankenlensError: no such checkpoint, a pickle checkpoint, an unknown architecture, or missing weights.
        MissingPackage: `device_map` without accelerate.
    """
    if device_map is not None:
        require_installed("device_map", "accelerate")
    folder = Path(path_or_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FrankenlensError(
                f"{folder}: no config.json, so this is not a checkpoint written by save_pretrained."
            )
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
            found = f"only pickle files ({', '.join(pickles)})" if pickles else "no weights at all"
            raise FrankenlensError(
                f"{folder}: {found}. Only safetensors are read: load it once in a place you trust and call "
                "model.save_pretrained(folder)."
            )
    auto: Any = AutoModelForImageTextToText
    try:
        hub = {
            name: kwargs[name] for name in ("revision", "subfolder", "token", "cache_dir") if name in kwargs
        }
        auto = auto_class(AutoConfig.from_pretrained(path_or_id, trust_remote_code=trust_remote_code, **hub))
        loaded: Any = auto.from_pretrained(
            path_or_id,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, KeyError) as error:
        if needs_own_code(error):
            raise FrankenlensError(own_code_message(str(path_or_id))) from error
        first = str(error).strip().splitlines()[0]
        kind = "image-text-to-text" if auto is AutoModelForImageTextToText else "causal language"
        raise FrankenlensError(f"{path_or_id}: not loaded as a model of the kind {kind}: {first}") from error
    model, info = loaded
    for kind, meaning in (
        ("missing_keys", "absent from the checkpoint"),
        ("mismatched_keys", "of another shape"),
    ):
        if info.get(kind):
            names = [str(key) for key in list(info[kind])[:5]]
            raise FrankenlensError(
                f"{path_or_id}: {len(info[kind])} weights are {meaning} and would be random: {', '.join(names)} …"
            )
    return model.eval()


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
