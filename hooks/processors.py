"""Loading the processor of a vision-language checkpoint, with or without torchvision.

Most processors that cannot be built without torchvision fail over their video part alone: the image part has
a Pillow backend. For those a subclass without the video part stands in. It carries the name of the class it
stands in for, so that what it saves loads as the ordinary processor wherever torchvision is installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from hooks.errors import FrankenlensError, one_line
from hooks.stored.settings import require_sound_settings, settings_of
from hooks.whereabouts import not_found, require_checkpoint

_VIDEO = "video_processor"
_DECLARING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(
    path_or_id: str | Path,
    *,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    **kwargs: Any,
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor (images and text) of a checkpoint; the tokenizer of a text-only one.

    Where torchvision is installed this is `AutoProcessor`. Where it is missing and the processor wants it for
    videos only, it is the same class without its video part (`image_only`).

    Args:
        path_or_id: folder or Hugging Face repository.
        trust_remote_code: passed to `AutoProcessor`.
        local_files_only: do not go to the network.
        kwargs: further arguments of `from_pretrained` (`revision`, `subfolder`, `token`, ...).

    Raises:
        FrankenlensError: no such checkpoint, or it has no processor of its own, or the processor cannot be built; the
            message says what is missing and what to do.
    """
    hub = {"local_files_only": local_files_only, **kwargs}
    name = str(path_or_id)
    require_checkpoint(path_or_id)
    if os.path.isdir(name):
        require_sound_settings(Path(name) / str(kwargs.get("subfolder", "")))
    try:
        declared = None if is_torchvision_available() else _declared_class(name, trust_remote_code, hub)
        if declared is not None and _VIDEO in declared.get_attributes():
            processor = image_only(declared).from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
        else:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
    except FrankenlensError:
        raise
    except Exception as error:  # files of a processor can make transformers and tokenizers raise anything
        if needs_own_code(error):
            raise FrankenlensError(own_code_message(name)) from error
        if message := not_found(name, error, hub):
            raise FrankenlensError(message) from error
        raise FrankenlensError(
            f"cannot load the processor of {name!r}: {one_line(error)}\n"
            "Put the processor's files (processor_config.json or preprocessor_config.json, tokenizer files, "
            "chat template) next to the weights: AutoProcessor.from_pretrained(<original model>)"
            ".save_pretrained(<folder>)." + _torchvision_hint()
        ) from error
    words: Any = tokenizer_of(processor)
    if words is not None and set(words.get_vocab()) <= set(words.all_special_tokens):
        # transformers makes up a tokenizer without words where a folder has no files of one
        raise FrankenlensError(
            f"cannot load the processor of {name!r}: it holds no files of a tokenizer, which would know no word.\n"
            "Put them next to the weights: AutoTokenizer.from_pretrained(<original model>).save_pretrained(<folder>); "
            "or open it without: processor=None."
        )
    if isinstance(processor, PreTrainedTokenizerBase) and not sees_images(name, trust_remote_code, hub):
        return processor
    if not isinstance(processor, ProcessorMixin):
        raise FrankenlensError(
            f"{name!r} holds no processor: AutoProcessor found only a {type(processor).__name__}, which cannot "
            "read images. Save the processor of the original model next to the weights: "
            "AutoProcessor.from_pretrained(<original model>).save_pretrained(<folder>)."
        )
    return processor


def sees_images(name: str, trust_remote_code: bool = False, hub: Mapping[str, Any] | None = None) -> bool:
    """Whether a checkpoint's configuration is that of an architecture with images."""
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **(hub or {}))
    except (OSError, ValueError):
        return True
    return is_visual(config)


def is_visual(config: Any) -> bool:
    """Whether a configuration is that of an architecture with images."""
    seeing = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return seeing or getattr(config, "vision_config", None) is not None


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or what is given if it is one itself; None where there is none."""
    return (
        processor if isinstance(processor, PreTrainedTokenizerBase) else getattr(processor, "tokenizer", None)
    )


def image_token_of(model: Any, processor: Any = None) -> int | None:
    """The placeholder of image tokens, as the model or its processor names it; None where neither does."""
    owners = (model.config, getattr(model.config, "text_config", None), processor)
    names = ("image_token_id", "image_token_index", "image_patch_id")
    ids = (getattr(owner, name, None) for owner in owners for name in names)
    return next((i for i in ids if isinstance(i, int)), None)


@cache
def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A subclass of the same name whose only parts are those that are not for videos.

    Passing videos to it raises, as there is nothing to read them.

    Args:
        processor_class: a processor with a `video_processor` part, such as `Qwen2_5_VLProcessor`.
    """
    return type(
        processor_class.__name__,
        (_WithoutVideo, processor_class),
        {"__doc__": f"{processor_class.__name__} for images and text only (torchvision is not installed)."},
    )


class _WithoutVideo(ProcessorMixin):
    """First in the method resolution order of what `image_only` makes."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        # The class stood in for hands on all its parts by position; the base keeps those in get_attributes().
        kwargs.pop(_VIDEO, None)
        super().__init__(image_processor, tokenizer, None, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    @classmethod
    def validate_init_kwargs(cls, processor_config: dict, valid_kwargs: Any) -> tuple[dict, dict]:
        # A video section, written where torchvision was present, is not ours to read.
        kept = {key: value for key, value in processor_config.items() if key != _VIDEO}
        stood_in_for = cls.__mro__[2].__init__.__code__
        names = stood_in_for.co_varnames[: stood_in_for.co_argcount][1:]
        return ProcessorMixin.validate_init_kwargs(kept, names)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        if videos is not None:
            raise FrankenlensError(
                f"this {type(self).__name__} reads images and text only: reading videos needs torchvision"
            )
        return super().__call__(images=images, text=text, **kwargs)


def _declared_class(name: str, trust_remote_code: bool, hub: dict[str, Any]) -> type[ProcessorMixin] | None:
    """The processor class that a checkpoint's files name, else the one that goes with its architecture."""
    quiet = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    for file in _DECLARING_FILES:
        found = cached_file(name, file, **hub, **quiet)
        declared = settings_of(Path(found)).get("processor_class") if found else None
        if isinstance(declared, str):
            return processor_class_from_name(declared)
    if cached_file(name, "config.json", **hub, **quiet) is None:
        return None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
    except ValueError:  # an architecture unknown to transformers; AutoProcessor then gives the verdict
        return None
    found: Any = PROCESSOR_MAPPING.get(type(config), None)
    return found


def needs_own_code(error: Exception) -> bool:
    """Whether transformers refused a checkpoint because it comes with code of its own."""
    return "trust_remote_code" in str(error)


def own_code_message(name: str) -> str:
    """What to do about such a checkpoint."""
    return (
        f"{name} comes with code of its own, which is run only when you ask for it: read it, and give "
        "trust_remote_code=True."
    )


def _torchvision_hint() -> str:
    return "" if is_torchvision_available() else " If it needs torchvision: pip install torchvision."
