"""A LoRA adapter as its own matrices: which parameter each of them changes, and by how much, without a model.

PEFT is not needed: what an adapter does is in its file and its settings. A setting that would make it compute
anything else than W + s B A is refused by name rather than passed over (s = alpha / r; alpha / sqrt(r) for rsLoRA,
2312.03732; magnitudes of DoRA, 2402.09353, are read).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hooks.errors import FrankenlensError, shown
from hooks.stored.checkpoint import SHOWN, Checkpoint
from hooks.stored.settings import settings_of
from interp.comparison.low_rank import LowRank
from interp.pair.adapter import GATHER, ROOT, Modules, read_adapter

_PARTS = re.compile(
    r"(?P<path>.+)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<leaf>\.weight|\.bias)?"
)
_UNDERSTOOD = frozenset(
    "auto_mapping base_model_name_or_path revision peft_type peft_version task_type inference_mode r lora_alpha "
    "rank_pattern alpha_pattern target_modules exclude_modules modules_to_save layers_to_transform layers_pattern "
    "lora_dropout bias lora_bias fan_in_fan_out use_rslora use_dora init_lora_weights megatron_config megatron_core "
    "loftq_config eva_config qalora_group_size runtime_config ensure_weight_tying".split()
)
"""Settings that say nothing else than what is read here; others must be absent or off."""
_PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")  # these leave IN's weights alone
_MERGE = (
    "merge it with PEFT where it was trained (merge_and_unload, then save_pretrained), and give that folder"
)


class Adapter:
    """What a LoRA adapter does to the parameters of the model that it was trained on.

    Attributes:
        folder: the adapter's.
        updates: parameter to the update of its matrix (a convolution's kernel is flattened to columns).
        magnitudes: parameter to the norm that each of its rows is given after the update (DoRA).
        offsets: bias to what is added to it.
        replaced: parameter to what stands in its place (`modules_to_save`, trained biases).

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        in_: the checkpoint of the model.

    Raises:
        FrankenlensError: it is no LoRA adapter of that model, its file lacks something, one of its settings is not
            understood, or it changes one of two uses of a tied weight.
    """

    def __init__(self, folder: Path | str, in_: Checkpoint) -> None:
        self.folder = Path(folder)
        tensors = read_adapter(self.folder)
        self._config = settings_of(self.folder / "adapter_config.json")
        _require_lora(self.folder, self._config)
        self.updates: dict[str, LowRank] = {}
        self.magnitudes: dict[str, Float[Tensor, " row"]] = {}
        self.offsets: dict[str, Float[Tensor, " row"]] = {}
        self.replaced: dict[str, Shaped[Tensor, "..."]] = {}
        found = self._sorted(tensors, Modules(in_.model))
        for path, own in found.items():
            self._read_module(path, own, in_)
        for name in self.updates.keys() & self.replaced.keys():
            self._require_base(name, in_)
        self._require_complete(in_.model)
        self._require_biases(in_.model)
        self._require_whole_weights(in_)

    @property
    def changed(self) -> frozenset[str]:
        """All parameters that it changes."""
        return frozenset(self.updates) | frozenset(self.offsets) | frozenset(self.replaced)

    def _sorted(
        self, tensors: Mapping[str, Tensor], modules: Modules
    ) -> dict[str, dict[str, tuple[str, Tensor]]]:
        """Module to its parts: what they are, to the module's name in the file and the tensor."""
        found: dict[str, dict[str, tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            own = modules.key(name).removeprefix(ROOT).replace(".base_layer.", ".")
            match = _PARTS.fullmatch(own)
            if match is None:
                self.replaced[own] = tensor
                continue
            what = match["what"] + (".bias" if match["leaf"] == ".bias" else "")
            told = name.removeprefix(ROOT).partition(f".{match['what']}")[0]
            found.setdefault(match["path"], {})[what] = (told, tensor)
        return found

    def _read_module(self, path: str, own: Mapping[str, tuple[str, Tensor]], in_: Checkpoint) -> None:
        told = next(iter(own.values()))[0]
        try:
            module: Any = in_.model.get_submodule(path)
        except AttributeError as error:
            raise FrankenlensError(
                f"{self.folder}: it changes {path}, which {type(in_.model).__name__} has not; is it the adapter of "
                "another model?"
            ) from error
        lookup = isinstance(module, nn.Embedding)
        names = ("lora_embedding_B", "lora_embedding_A") if lookup else ("lora_B", "lora_A")
        if missing := [name for name in names if name not in own]:
            raise FrankenlensError(f"{self.folder}: {missing[0]} of {path} is not in its file. {GATHER}")
        b, a = (own[name][1].flatten(1) for name in names)
        if a.shape[0] != b.shape[1] or getattr(module, "groups", 1) != 1:
            raise FrankenlensError(
                f"{self.folder}: lora_B of {path} is {list(b.shape)} and lora_A {list(a.shape)}, which make no product "
                f"(a grouped convolution?): {_MERGE}."
            )
        turned = lookup or hasattr(module, "nf")  # GPT-2's Conv1D, too, keeps its weight as [in, out]
        self._require_settings(path, told, own, a.shape[0])
        update = LowRank(*((a.T, b.T) if turned else (b, a)), self._scaling(path, told, a.shape[0]))
        weight = f"{path}.weight"
        stored = in_.tensors.get(in_.ties.get(weight, weight))
        if stored is None or stored.matrix != update.shape:
            shape = "not there" if stored is None else list(stored.shape)
            raise FrankenlensError(
                f"{self.folder}: its update of {path} is {list(update.shape)}, and {weight} of {in_.folder} is "
                f"{shape}; is it the adapter of another model?"
            )
        self.updates[weight] = update
        if "lora_B.bias" in own:
            self.offsets[f"{path}.bias"] = own["lora_B.bias"][1] * update.scaling
        if "lora_magnitude_vector" in own:
            if not isinstance(module, nn.Linear):
                raise FrankenlensError(f"{self.folder}: DoRA of {path}, a {type(module).__name__}: {_MERGE}.")
            self.magnitudes[weight] = own["lora_magnitude_vector"][1].flatten()

    def _require_base(self, name: str, in_: Checkpoint) -> None:
        """PEFT saves embeddings beside the update of them: they must be IN's."""
        given, own = self.replaced.pop(name), in_.read(in_.ties.get(name, name))
        if given.shape != own.shape or not torch.equal(given.to(own.dtype), own):
            raise FrankenlensError(
                f"{self.folder}: {name} is saved with the adapter, and is not that of {in_.folder}; it is the adapter "
                f"of another model, or of one whose vocabulary was resized: {_MERGE}."
            )

    def _require_settings(self, path: str, told: str, own: Mapping[str, Any], rank: int) -> None:
        """What the settings say of a module is what its file holds, without which it would be another update."""
        wanted = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
        for setting, part in wanted.items():
            if bool(self._config.get(setting)) != (part in own):
                there = "is not in its file" if part not in own else "is in its file"
                raise FrankenlensError(
                    f"{self.folder}: its setting {setting} is {shown(self._config.get(setting))}, and {part} of {path} "
                    f"{there}; they are of two saves, or one was cut: save the adapter again, whole."
                )
        said = self._pattern("rank_pattern", "r", path, told)
        if said != rank:
            raise FrankenlensError(
                f"{self.folder}: its settings give {path} the rank {shown(said)}, and its file {rank}, so that the "
                "scaling (alpha / r) is not known; they are of two saves: save the adapter again, whole."
            )

    def _pattern(self, table: str, default: str, path: str, told: str) -> Any:
        """A setting of a module, as PEFT looks it up."""
        pattern = self._config.get(table) or {}
        for name in (path, told):  # patterns may be in older names
            for one, value in pattern.items():
                if re.match(rf"(.*\.)?({one})$", name):
                    return value
        return self._config.get(default, 8)

    def _scaling(self, path: str, told: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", "lora_alpha", path, told)
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _require_biases(self, model: nn.Module) -> None:
        """The biases that were trained beside the matrices, all or those of the modules."""
        which = self._config.get("bias", "none")
        named = [name for name, _ in model.named_parameters()]
        if which == "lora_only":
            own = {f"{name.rpartition('.')[0]}.bias" for name in self.updates}
            wanted = [name for name in named if name in own]
        else:
            wanted = [name for name in named if "bias" in name] if which == "all" else []
        if lacking := [name for name in wanted if name not in self.replaced]:
            raise FrankenlensError(
                f"{self.folder}: its settings say that biases were trained (bias={which!r}), and {len(lacking)} of "
                f"them are not in its file: {', '.join(lacking[:SHOWN])}. {GATHER}"
            )

    def _require_complete(self, model: nn.Module) -> None:
        """Every module that the settings name by a plain list or pattern must be in the file."""
        targets, config = self._config.get("target_modules"), self._config
        if targets in (None, "all-linear") or config.get("exclude_modules"):
            return
        if config.get("layers_to_transform") is not None:
            return
        saved = config.get("modules_to_save") or ()
        lacking = [
            path
            for path, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding)) and f"{path}.weight" not in self.updates
            if is_target(targets, path) and not any(is_target([one], path) for one in saved)
        ]
        if lacking:
            raise FrankenlensError(
                f"{self.folder}: its settings name {len(lacking)} modules that are not in its file: "
                f"{', '.join(lacking[:SHOWN])}. {GATHER}"
            )
        for one in saved:
            if not any(
                is_target([one], name.rpartition(".")[0]) or f".{one}." in name for name in self.replaced
            ):
                raise FrankenlensError(
                    f"{self.folder}: its settings name {one} (modules_to_save), which is not in its file. {GATHER}"
                )

    def _require_whole_weights(self, in_: Checkpoint) -> None:
        tied = {**in_.ties, **{source: name for name, source in in_.ties.items()}}
        for name in self.changed:
            path = name.rpartition(".")[0]
            if name in tied:
                raise FrankenlensError(
                    f"{self.folder}: the adapter changes {path}, whose weight is tied to "
                    f"{tied[name].rpartition('.')[0]}; merged, it would change both. Untie them in IN first, and save "
                    "that as IN (model.config.tie_word_embeddings = False, and a parameter of its own for each)."
                )
            wanted = in_.tensors.get(name)
            given = self.offsets.get(name, self.replaced.get(name))
            if wanted is None or (given is not None and tuple(given.shape) != wanted.shape):
                what = "no parameter" if wanted is None else f"{list(wanted.shape)} there"
                raise FrankenlensError(
                    f"{self.folder}: {name} is {what} in {in_.folder}; is it the adapter of another model, or of one "
                    "whose vocabulary was resized?"
                )


def is_target(targets: Any, path: str) -> bool:
    """Whether an adapter's `target_modules`, a pattern or a list of names, name a module, as PEFT reads them."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == one or path.endswith(f".{one}") for one in targets)


def _require_lora(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FrankenlensError(
            f"{folder}: a PEFT adapter of type {shown(kind)}, whose update is not read from its matrices, as LoRA's "
            f"is: {_MERGE}."
        )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        raise FrankenlensError(
            f"{folder}: init_lora_weights is {shown(init)}, which changes the weights of IN as well, by a "
            f"decomposition that is made anew at every loading: {_MERGE}."
        )
    for name, value in config.items():
        if name not in _UNDERSTOOD and value not in (None, False, 0, "", [], {}):
            raise FrankenlensError(
                f"{folder}: its setting {name} is {shown(value)}, which makes it something else than W + s B A: "
                f"{_MERGE}."
            )
