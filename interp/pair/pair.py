"""IN and RL (and Base): models that may exchange activations and weights, checked when they are put together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from hooks import HookedVLM
from hooks.errors import FrankenlensError, nearest, one_line
from hooks.extras import require_installed
from hooks.processors import load_processor, tokenizer_of
from hooks.resident import Turns
from hooks.stored.layouts import borrowed, places
from hooks.whereabouts import require_checkpoint
from interp.pair.adapter import LOST, ROUNDING, is_adapter, merge_adapter, read_adapter
from interp.pair.agreement import (
    Difference,
    entering,
    model_differences,
    processor_differences,
    template_differences,
    tokenizer_differences,
)
from interp.pair.resident import open_in_memory_of
from interp.prompts import PromptBuilder
from interp.prompts.roles import TraceFormat

SHOWN = 5  # differences that the message of a refusal lists
_SPOKEN = {"rl": "RL", "base": "Base"}


class Pair:
    """The instruction-tuned model IN, the model RL that reinforcement learning made of it, and perhaps their Base.

    Arguments:
        in_: IN, opened.
        rl: RL, opened.
        base: the model that IN was made from, opened.
        trace_format: what delimits reasoning and answer in what they generate.
        template: a Jinja chat template to use instead of the processor's; theirs may then differ.
        system: a system message for every prompt.
        accept: differences that are taken as they are, by the names that the refusal gives them, such as
            `text_config.sliding_window`; IN's processor and template then make the prompts of all.

    Attributes:
        builder: makes prompts for all of them (with IN's processor).
        differences: by model, in what it is not alike to IN: spelled in two ways, or accepted.
        borrowed: by model, which settings its folder lacked and whose were taken.
        turns: how IN and RL share one memory, where they do (`from_pretrained(one_resident=True)`).

    Raises:
        FrankenlensError: architecture, vocabulary, processor or chat template differ in what enters the forward pass
            (`interp.pair.agreement`); says in what. Or a name in `accept` that is no difference.
    """

    def __init__(
        self,
        in_: HookedVLM,
        rl: HookedVLM,
        base: HookedVLM | None = None,
        trace_format: TraceFormat | None = None,
        template: str | None = None,
        system: str | None = None,
        accept: Sequence[str] = (),
        instruction: str = "",
    ) -> None:
        self.in_, self.rl, self.base = in_, rl, base
        self.borrowed: dict[str, str] = {}
        self.turns: Turns | None = None
        others = {name: other for name, other in self.models.items() if name != "in"}
        self.differences: dict[str, list[Difference]] = {
            name: _differences(in_, other, _SPOKEN[name], not template) for name, other in others.items()
        }
        for name, found in self.differences.items():
            if left := entering(found, accept):
                refuse_pair(_SPOKEN[name], left)
        _require_known(accept, [one for found in self.differences.values() for one in found])
        processor = _processor(in_, "IN")
        trace_format = _with_ends(trace_format or TraceFormat(), self.models, tokenizer_of(processor))
        self.builder = PromptBuilder(processor, trace_format, template, system, in_.n_logits, instruction)

    @classmethod
    def from_pretrained(
        cls,
        in_path: str | Path,
        rl_path: str | Path,
        base: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device_map: str | dict | None = None,
        trace_format: TraceFormat | None = None,
        template: str | None = None,
        system: str | None = None,
        accept: Sequence[str] = (),
        instruction: str = "",
        one_resident: bool = False,
        **kwargs: Any,
    ) -> Pair:
        """Load the models: folders or repository ids, safetensors or shards as trainers leave them.

        Shards (`hooks.stored.layouts`) are opened with config.json and tokenizer from beside them, or with IN's.

        Arguments:
            rl_path: a checkpoint, a step of a run (`global_step_100` of verl, say), or the folder of a PEFT adapter,
                which is merged into a second copy of IN; the merged model computes what the adapted one does, on the
                prompt that IN was opened with.
            one_resident: keep RL as the entries in which it differs from IN, in IN's memory (`hooks.resident`): the
                same numbers in about half of the memory, where RL changed few of them. Whoever is in use is in memory,
                and changing over takes time (`pair.turns`). RL is a folder then, and no adapter.
            dtype, device_map, kwargs: passed to `HookedVLM.from_pretrained` for every model.
            trace_format, template, system, accept, instruction: see the class.

        Raises:
            FrankenlensError: a model cannot be loaded, or they are no pair.
            MissingPackage: RL is an adapter, and peft is not installed.

        Example:
            >>> pair = fl.Pair.from_pretrained(fl.embedded.path("in"), fl.embedded.path("rl"))
            >>> sorted(pair.models), pair.in_.n_layers
            (['in', 'rl'], 9)
        """
        for one in (in_path, rl_path, *([] if base is None else [base])):
            require_checkpoint(one)  # all of them before the first is loaded
        loading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, **kwargs}
        tensors = _adapter_of(rl_path, one_resident)
        in_ = HookedVLM.from_pretrained(in_path, **loading)
        prompts = {"trace_format": trace_format, "template": template, "system": system}
        prompts |= {"accept": accept, "instruction": instruction, "one_resident": one_resident}
        return cls._beside(in_, in_path, rl_path, base, tensors, loading, **prompts)

    @classmethod
    def beside(
        cls,
        in_: HookedVLM,
        in_path: str | Path,
        rl_path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device_map: str | dict | None = None,
        trace_format: TraceFormat | None = None,
        template: str | None = None,
        system: str | None = None,
        accept: Sequence[str] = (),
        instruction: str = "",
        one_resident: bool = False,
        **kwargs: Any,
    ) -> Pair:
        """A pair of an IN that is open already and a checkpoint that is loaded now, as several of one run are.

        Arguments:
            in_: IN, opened; it stays open when this fails.
            in_path: where it was loaded from.
            rl_path, dtype, device_map, trace_format, template, system, accept, instruction, one_resident, kwargs: as in
                `from_pretrained`; how IN was loaded.

        Raises:
            FrankenlensError: RL cannot be loaded, or the two are no pair.
            MissingPackage: RL is an adapter, and peft is not installed.
        """
        require_checkpoint(rl_path)
        loading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, **kwargs}
        prompts = {"trace_format": trace_format, "template": template, "system": system}
        prompts |= {"accept": accept, "instruction": instruction, "one_resident": one_resident}
        tensors = _adapter_of(rl_path, one_resident)
        return cls._beside(in_, in_path, rl_path, None, tensors, loading, **prompts)

    @classmethod
    def _beside(
        cls,
        in_: HookedVLM,
        in_path: str | Path,
        rl_path: str | Path,
        base: str | Path | None,
        tensors: Mapping[str, torch.Tensor] | None,
        loading: dict[str, Any],
        *,
        template: str | None,
        accept: Sequence[str],
        one_resident: bool,
        **prompts: Any,
    ) -> Pair:
        """RL, and Base, loaded beside IN; `tensors` are RL's where it is an adapter."""
        loading, lost, turns = {"settings": in_path, **loading}, [], None
        if one_resident:
            opened = open_in_memory_of(in_, rl_path, **loading)
            rl, turns, lost = opened.vlm, opened.turns, opened.differences
        elif tensors is not None:
            own = HookedVLM.from_pretrained(in_path, **{**loading, "settings": None, "check": False})
            check = loading.get("check", True)
            rl, lost = _with_adapter(own, Path(rl_path), tensors, check, not template, accept)
        else:
            rl = _opened(in_, rl_path, "RL", loading, not template, accept)
        opened_base = None if base is None else _opened(in_, base, "Base", loading, not template, accept)
        names = [one for one in accept if one not in {loss.name for loss in lost}]
        pair = cls(in_, rl, opened_base, template=template, accept=names, **prompts)
        pair.differences["rl"] += lost
        pair.turns = turns
        given = {"rl": rl_path} if base is None else {"rl": rl_path, "base": base}
        pair.borrowed = {name: told for name, path in given.items() if (told := borrowed(path, in_path))}
        return pair

    @property
    def models(self) -> dict[str, HookedVLM]:
        """The models by name: `in`, `rl`, and `base` where there is one."""
        models = {"in": self.in_, "rl": self.rl}
        return models if self.base is None else {**models, "base": self.base}

    @property
    def processor(self) -> Any:
        """The processor that prompts are made with."""
        return self.builder.processor

    @property
    def trace_format(self) -> TraceFormat:
        """What delimits reasoning and answer, with the tokenizer's own end of turn."""
        return self.builder.trace_format

    def provenance(self) -> dict[str, Any]:
        """Where the models come from, and a hash of all weights of each; for a result's attributes.

        What is not alike to IN, though the two are a pair, stands beside it: spelled in two ways, or accepted.
        """
        return {name: self._of(name, vlm) for name, vlm in self.models.items()}

    def _of(self, name: str, vlm: HookedVLM) -> dict[str, Any]:
        unlike = self.differences.get(name, [])
        kinds = {"spelled_otherwise": False, "accepted": True}
        return {
            "name_or_path": getattr(vlm.model, "name_or_path", ""),
            "class": type(vlm.model).__name__,
            "dtype": str(vlm.model.dtype),
            "weights_sha256": weights_sha256(vlm.model),
            **({"settings": self.borrowed[name]} if name in self.borrowed else {}),
            **{kind: lines for kind, enters in kinds.items() if (lines := _lines(unlike, enters))},
        }

    def close(self) -> None:
        """Close every model; memory that two had is IN's again."""
        if self.turns is not None:
            self.turns.end()
        for vlm in self.models.values():
            vlm.close()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor of the state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A copy: NumPy's view of a graft's tensor would end its sharing memory with the donor's (hooks.swapped.like).
        flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _adapter_of(path: str | Path, one_resident: bool) -> Mapping[str, torch.Tensor] | None:
    """The tensors of a PEFT adapter; None of anything else."""
    if not is_adapter(path):
        return None
    if one_resident:
        raise FrankenlensError(
            f"{path} is an adapter, which changes every entry of its matrices: with one model in memory, nothing would "
            "be saved. Merge it into a checkpoint, or open two models."
        )
    require_installed("an RL checkpoint that is a PEFT adapter", "peft")
    return read_adapter(Path(path))


def _processor(vlm: HookedVLM, name: str) -> Any:
    if tokenizer_of(vlm.processor) is None:
        raise FrankenlensError(
            f"{name} has no processor (tokenizer and images; of a text-only model, its tokenizer), so no prompt "
            "can be made: open it as "
            "HookedVLM(model, processor), with the processor of the model it was made from."
        )
    return vlm.processor


def _with_ends(trace_format: TraceFormat, models: Mapping[str, HookedVLM], tokenizer: Any) -> TraceFormat:
    """The format with every end of turn that a model's generation settings name."""
    ends = list(trace_format.end_of_turn)
    for vlm in models.values():
        ids = getattr(vlm.model.generation_config, "eos_token_id", None)
        known = [ids] if isinstance(ids, int) else list(ids or ())
        ends += [token for token in tokenizer.convert_ids_to_tokens(known) if token is not None]
    return replace(trace_format, end_of_turn=tuple(dict.fromkeys(ends)))


def _differences(in_: HookedVLM, other: HookedVLM, name: str, templates: bool) -> list[Difference]:
    processors = _processor(in_, "IN"), _processor(other, name)
    found = model_differences(in_.model, other.model, in_.opening)
    if type(in_.model) is not type(other.model):
        return found
    return [*found, *processor_differences(*processors, templates)]


def _lines(differences: Sequence[Difference], enters: bool) -> list[str]:
    return [str(one) for one in differences if one.enters == enters]


def _require_known(accepted: Sequence[str], found: Sequence[Difference]) -> None:
    """A name that was accepted is that of a difference, and of one that can be."""
    names = [one.name for one in found]
    for name in accepted:
        if name not in names:
            have = ", ".join(names[:SHOWN]) or "none"
            raise FrankenlensError(
                f"accept names {name!r}, which is no difference of these models; they have: {have}. "
                f"{nearest(name, names)}".strip()
            )


def _opened(
    in_: HookedVLM,
    path: str | Path,
    name: str,
    loading: dict[str, Any],
    templates: bool,
    accept: Sequence[str],
) -> HookedVLM:
    """A model of the pair; where it does not open and its processor is another, that is what is said."""
    try:
        return HookedVLM.from_pretrained(path, **loading)
    except FrankenlensError:
        try:
            _, words = places(path, loading.get("settings"))
            other = load_processor(words, trust_remote_code=bool(loading.get("trust_remote_code")))
            differences = entering(processor_differences(_processor(in_, "IN"), other, templates), accept)
        except FrankenlensError:
            differences = []  # then the reason is the first one
        if differences:
            refuse_pair(name, differences)
        raise


def refuse_pair(name: str, differences: Sequence[Difference]) -> None:
    """Refuse two models in the words of their first differences.

    Raises:
        FrankenlensError: always.
    """
    lines = "\n  ".join(str(one) for one in differences[:SHOWN])
    more = f"\n  … and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    accept = " ".join(repr(one.name) for one in differences if one.can_be_accepted)
    taken = (
        f"\nTo take a difference as it is, name it: accept=[{accept.replace(' ', ', ')}]" if accept else ""
    )
    raise FrankenlensError(
        f"IN and {name} are no pair; they differ in (IN's and {name}'s):\n  {lines}{more}\n"
        "A pair shares architecture, vocabulary, processor and chat template: compare a checkpoint with the one it was "
        f"trained from, loaded with the same dtype and with the same processor files.{taken}"
    )


def _with_adapter(
    vlm: HookedVLM,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    check: bool,
    templates: bool,
    accept: Sequence[str],
) -> tuple[HookedVLM, list[Difference]]:
    """`vlm` with the adapter's update merged into its weights, opened anew; and what was lost of it, if that counts."""
    _require_adapter_tokenizer(vlm, folder, templates, accept)
    vlm.close()
    merged = merge_adapter(vlm.model, folder, tensors, vlm.opening, accept)
    merged.model.name_or_path = str(folder)
    text = f"rounding: the weights of the merged model hold all but {merged.lost:.2%} of the adapter's update"
    lost = [Difference(ROUNDING, text, enters=merged.lost > LOST)] if merged.lost else []
    return HookedVLM(merged.model, vlm.processor, inputs=vlm.opening, check=check), lost


def _require_adapter_tokenizer(vlm: HookedVLM, folder: Path, templates: bool, accept: Sequence[str]) -> None:
    """An adapter's folder may hold the tokenizer it was trained with; then it must be IN's."""
    if not os.path.isfile(folder / "tokenizer_config.json"):
        return
    own, tokenizer = _processor(vlm, "IN"), _own_tokenizer(folder)
    differences = tokenizer_differences(tokenizer_of(own), tokenizer)
    if templates and tokenizer.chat_template is not None:
        differences += template_differences(own, tokenizer)
    if differences := entering(differences, accept):
        refuse_pair("the adapter", differences)


def _own_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside an adapter; none of its code is run."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its files can make transformers and tokenizers raise anything
        raise FrankenlensError(
            f"{folder}: the tokenizer beside the adapter cannot be read: {one_line(error)}. Delete its files there "
            "if it is IN's, or put IN's in their place."
        ) from error
