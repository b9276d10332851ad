"""A PEFT adapter as RL: loaded whole, merged into a copy of IN, and proved to compute what the adapted model does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.anatomy.watching import forward
from hooks.errors import FrankenlensError, one_line, shown
from hooks.selfcheck import undisturbed
from hooks.selfcheck_writes import tolerance
from hooks.stored.files import entries
from hooks.stored.names import Names
from hooks.stored.settings import require_sound_settings, settings_of

LOST = 0.05
"""Share of an update (of its norm) that may be lost where merged weights are rounded to their type."""
ROUNDING = "rounding"
"""What a larger share is called where it is accepted."""
SHOWN = 5
_WRONG = 0.05  # how far the merged model may be from the adapted one, of how far that is from IN
ROOT = "base_model.model."
"""What names of an adapter's tensors begin with."""
_FILE = "adapter_model.safetensors"
GATHER = (
    "A run under DeepSpeed ZeRO-3 writes such files where weights are not gathered: save the adapter again with "
    "stage3_gather_16bit_weights_on_model_save, or from the consolidated checkpoint (zero_to_fp32.py)."
)
"""What to do where tensors are missing."""


@dataclass(frozen=True)
class Merged:
    """A model with an adapter's update in its weights.

    Attributes:
        model: the merged model.
        lost: the share of the update's norm that the type of the weights does not hold.
    """

    model: Any
    lost: float


def is_adapter(path: str | Path) -> bool:
    """Whether a path is the folder of a PEFT adapter."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def merge_adapter(
    model: Any,
    folder: Path,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    accept: Sequence[str] = (),
) -> Merged:
    """Merge an adapter into a model, which is given up for it.

    Each weight is merged in float32 and rounded once, to its own type. On a prompt, the merged model's logits are those
    of the model under PEFT's own adapter.

    Args:
        model: the model that the adapter was trained on.
        folder: the adapter's.
        tensors: what `read_adapter` read in it.
        inputs: a prompt that the model takes, as tensors on its device.
        accept: holds `ROUNDING` where a type that loses more than `LOST` of the update is wanted all the same.

    Raises:
        FrankenlensError: the adapter lacks what its config names, is that of another model, or cannot be merged; it
            changes a weight that has two uses; too much of it is lost to rounding; or the merged model computes
            something else.
    """
    own, ties = undisturbed_logits(model, inputs), _ties(model)
    adapted = _adapted(model, folder, tensors)
    _require_own_weights(adapted.get_base_model(), ties, folder)
    wanted = undisturbed_logits(adapted.get_base_model(), inputs)
    try:
        lost = _merge(adapted)
        merged = adapted.unload().eval()
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        raise FrankenlensError(f"{folder}: PEFT cannot merge this adapter: {one_line(error)}") from error
    if lost > LOST and ROUNDING not in accept:
        raise FrankenlensError(
            f"{folder}: in {str(merged.dtype).removeprefix('torch.')}, {lost:.0%} of the adapter's update would be "
            "lost where merged weights are rounded. Open the pair in dtype='float32' (of a command: --dtype float32), "
            f"or take the loss: accept=[{ROUNDING!r}]."
        )
    wrong, moved = (
        (undisturbed_logits(merged, inputs) - other).abs().max().item() for other in (wanted, own)
    )
    if lost <= LOST and not wrong <= max(tolerance(wanted), _WRONG * moved):
        raise FrankenlensError(
            f"{folder}: the merged model is not the adapted one: on a prompt, its logits are off by {wrong:.3g}, where "
            f"RL is {moved:.3g} away from IN. Merge the adapter where it was trained, save the whole model "
            "(model.merge_and_unload().save_pretrained(folder)), and give that folder."
        )
    return Merged(merged, lost)


def adapted_logits(
    model: Any, folder: Path, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> tuple[Float[Tensor, "batch pos vocab"], Float[Tensor, "batch pos vocab"]]:
    """The logits of a model, and those under PEFT's own adapter, for which it is given up.

    Args:
        model, folder, tensors, inputs: as for `merge_adapter`.

    Raises:
        FrankenlensError: the adapter is not one of this model, or lacks what its config names.
    """
    own = undisturbed_logits(model, inputs)
    return own, undisturbed_logits(_adapted(model, folder, tensors).get_base_model(), inputs)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file.

    Raises:
        FrankenlensError: there is no safetensors file, it is damaged, tensors in it are empty, or the adapter's
            settings cannot be read or name code that would be imported.
    """
    from safetensors.torch import load_file

    require_sound_settings(folder)
    settings = settings_of(folder / "adapter_config.json")
    for name in (
        "megatron_config",
        "megatron_core",
    ):  # PEFT imports the module that is named beside the first
        if settings.get(name) not in (None, "megatron.core"):
            raise FrankenlensError(
                f"{folder}/adapter_config.json: {name} is {shown(settings[name])}, an adapter of Megatron's layers, "
                "which is not merged here: merge it where it was trained, and give the whole model."
            )
    file = folder / _FILE
    if not os.path.isfile(file):
        raise FrankenlensError(
            f"{folder}: a PEFT adapter without {_FILE}. Only safetensors are read: save it again with "
            "save_pretrained(folder, safe_serialization=True)."
        )
    entries(file)
    tensors = load_file(file)
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty or not tensors:
        what = f"{len(empty)} tensors are empty ({', '.join(empty[:SHOWN])})" if tensors else "there is none"
        raise FrankenlensError(f"{file}: {what}. {GATHER}")
    return tensors


def _adapted(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> Any:
    """The model under the adapter, every tensor of which has found its place."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    own = Modules(model)
    named = {own.key(name): tensor for name, tensor in tensors.items()}
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise FrankenlensError(
                f"{folder}: {config.peft_type.value} adds tokens, not an update of weights, so it cannot be merged; "
                "give an adapter of weights, such as LoRA."
            )
        if set(named) != set(tensors):
            own.rename(config, named)
        config.inference_mode = True
        with warnings.catch_warnings():  # of settings that newer versions of PEFT do not know
            warnings.simplefilter("ignore")
            adapted = PeftModel(model, config)
            found = set_peft_model_state_dict(adapted, named)
    except FrankenlensError:
        raise
    except KeyError as error:  # a part that was saved whole
        raise FrankenlensError(
            f"{folder / _FILE}: its config names {error}, which is not in it. {GATHER}"
        ) from error
    except Exception as error:  # its settings can make PEFT raise anything
        raise FrankenlensError(
            f"{folder}: not the adapter of this model; PEFT says: {one_line(error)}"
        ) from error
    if found.unexpected_keys:
        raise FrankenlensError(
            f"{folder}: adapter tensor {found.unexpected_keys[0]} has no place in IN ({len(found.unexpected_keys)} of "
            f"{len(tensors)} have none), under its own name or that of an older transformers; is it the adapter of "
            "another model?"
        )
    lacking = [name for name in found.missing_keys if "default" in name.split(".")]
    if lacking:
        raise FrankenlensError(
            f"{folder / _FILE}: {len(lacking)} tensors that its config names are not in it: "
            f"{', '.join(lacking[:SHOWN])}. {GATHER}"
        )
    return adapted.eval()


class Modules:
    """The modules of a model under the names that adapters know them by, older ones among them."""

    def __init__(self, model: Any) -> None:
        self._paths = {path for path, _ in model.named_modules()}
        self._names = Names(model)

    def key(self, name: str) -> str:
        """An adapter's tensor, with the module's own path in its name."""
        if not name.startswith(ROOT):
            return name
        parts = name.removeprefix(ROOT).split(".")
        for end in range(len(parts), 0, -1):
            if path := self.path(".".join(parts[:end])):
                return ".".join([ROOT + path, *parts[end:]])
        return name

    def path(self, path: str) -> str:
        """A module's own path; empty where there is no such module."""
        if path in self._paths:
            return path
        try:
            name, _ = self._names(f"{path}.weight")
        except FrankenlensError:  # a tensor that transformers makes anew, which PEFT converts
            return ""
        found = name.removesuffix(".weight")
        return found if found in self._paths else ""

    def rename(self, config: Any, named: Iterable[str]) -> None:
        """Put the model's own paths into a config that was written with older ones."""
        targets = config.target_modules
        if (
            targets is not None
            and targets != "all-linear"
            and (isinstance(targets, str) or "." in "".join(targets))
        ):
            changed = {name.removeprefix(ROOT).rpartition(".lora_")[0] for name in named if ".lora_" in name}
            config.target_modules = changed or targets
        for table in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(config, table, None) or {}
            setattr(config, table, {self.path(path) or path: value for path, value in pattern.items()})


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """Module to the others that use its weight."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {one: [o for o in some if o != one] for some in users.values() if len(some) > 1 for one in some}


def _require_own_weights(model: nn.Module, ties: Mapping[str, list[str]], folder: Path) -> None:
    """Refuse to change a weight that is used elsewhere, where the adapter does not act."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and path in ties:
            raise FrankenlensError(
                f"{folder}: the adapter changes {path}, whose weight is tied to {', '.join(ties[path])}; merged, it "
                "would change both. Untie them in IN first, and save that as IN: model.config.tie_word_embeddings = "
                f"False; {ties[path][0]}.weight = nn.Parameter({path}.weight.clone()) (or the other way round); "
                "model.save_pretrained(folder)."
            )


@torch.no_grad()
def _merge(adapted: Any) -> float:
    """Merge in place, layer by layer, in float32; the share of the update that rounding takes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lost = updated = 0.0
    for layer in [one for one in adapted.get_base_model().modules() if isinstance(one, BaseTunerLayer)]:
        base: Any = layer.get_base_layer()
        weights = [w for w in base.parameters(recurse=False) if w.dtype in (torch.float16, torch.bfloat16)]
        before = [w.data for w in weights]
        for weight in weights:
            weight.data = weight.data.float()
        merging: Any = layer
        merging.merge()
        for weight, old in zip(weights, before, strict=True):
            exact, weight.data = weight.data, weight.data.to(old.dtype)
            lost += (weight.data.float() - exact).double().square().sum().item()
            updated += (exact - old.float()).double().square().sum().item()
    return (lost / updated) ** 0.5 if updated else 0.0


@torch.no_grad()
def undisturbed_logits(model: Any, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos vocab"]:
    """The logits of a model on a prompt, in float32; its random states stay as they were."""
    with undisturbed(model):
        return forward(model, inputs).float()
