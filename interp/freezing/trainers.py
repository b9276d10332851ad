"""What other trainers can freeze: their own settings, where these say exactly a set of parameters, or why none do.

Each rule is what the trainer does with its setting, applied to the names of this model; a setting is given only where
it comes to the very set that is asked for. None of these trainers freezes a part of a tensor by a setting.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from interp.freezing.patterns import pattern_of

_LF_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
_LF_KEYS = {
    "freeze_vision_tower": ("visual.patch_embed", "visual.blocks", "vision_tower"),
    "freeze_multi_modal_projector": ("visual.merger", "multi_modal_projector"),
}
_IN_PARTS = "no trainer's setting freezes a part of a tensor"


@dataclass(frozen=True)
class Named:
    """The parameters of a model, and what of them is to be frozen.

    Attributes:
        every: names of all parameters, in the model's order.
        frozen: those that are frozen whole.
        parts: those of which some rows or columns are frozen.
        model_type: of the configuration.
        n_layers: of the decoder.
    """

    every: Sequence[str]
    frozen: Collection[str]
    parts: Collection[str]
    model_type: str
    n_layers: int


@dataclass(frozen=True)
class Setting:
    """How a trainer freezes what is asked for.

    Attributes:
        trainer: its name.
        given: setting to value, as its command line or YAML file takes it; empty where no setting does exactly this.
        place: where in the trainer it acts.
        note: what else is to be known, or why there is no setting.
    """

    trainer: str
    given: Mapping[str, str]
    place: str
    note: str = ""


def settings_of_trainers(named: Named) -> list[Setting]:
    """For verl, EasyR1, OpenRLHF, ms-swift and LLaMA-Factory, as of their sources in 2026."""
    return [_verl(named), _easyr1(named), _openrlhf(named), _ms_swift(named), _llama_factory(named)]


def _why_not(named: Named, what: str) -> str:
    if named.parts:
        return f"{_IN_PARTS} ({', '.join(list(named.parts)[:2])}): use freeze_hook.py with masks.safetensors"
    return f"{what}, which is not what is asked for: use freeze_hook.py"


def _visual(named: Named) -> set[str]:
    """What lies under `model.visual`, or `visual`: the projector of Qwen's models among it."""
    return {name for name in named.every if name.startswith(("model.visual.", "visual."))}


def _is(named: Named, found: Collection[str]) -> bool:
    return bool(found) and not named.parts and set(found) == set(named.frozen)


def _verl(named: Named) -> Setting:
    place = "verl/workers/fsdp_workers.py (get_vl_model_vision_tower)"
    if _is(named, _visual(named)):
        note = (
            "workers on verl/workers/engine do not read it (verl issue 2526): see there whether parameters under "
            "`visual` are still trained, and use freeze_hook.py if so"
        )
        return Setting("verl", {"actor_rollout_ref.actor.freeze_vision_tower": "True"}, place, note)
    what = "its one setting freezes all that is under `visual`, in full training"
    return Setting("verl", {}, place, _why_not(named, what))


def _easyr1(named: Named) -> Setting:
    place = "verl/workers/fsdp_workers.py (_build_model_optimizer)"
    if _is(named, _visual(named)):
        return Setting("EasyR1", {"worker.actor.model.freeze_vision_tower": "true"}, place)
    return Setting("EasyR1", {}, place, _why_not(named, "its one setting freezes all that is under `visual`"))


def _openrlhf(named: Named) -> Setting:
    place = "openrlhf/models/actor.py (Actor)"
    found = {name for name in named.every if "language_model" not in name and "lm_head" not in name}
    if _is(named, found):
        note = "before the options had dots in their names: --freeze_visual_encoder"
        return Setting("OpenRLHF", {"--actor.freeze_visual_encoder": ""}, place, note)
    what = "its one setting freezes all but `language_model` and `lm_head`"
    return Setting("OpenRLHF", {}, place, _why_not(named, what))


def _ms_swift(named: Named) -> Setting:
    place = "swift/utils/torch_utils.py (freeze_parameters: re.search over named_parameters)"
    if not named.frozen:
        return Setting("ms-swift", {}, place, _why_not(named, "it freezes whole parameters"))
    given = {
        "--freeze_parameters_regex": pattern_of(named.frozen, named.every),
        "--freeze_llm": "false",
        "--freeze_vit": "false",
        "--freeze_aligner": "false",
    }
    note = "of full training; freeze_vit and freeze_aligner are true unless they are given"
    if named.parts:
        note += f". {_IN_PARTS}: for {', '.join(list(named.parts)[:2])} use freeze_hook.py as well"
    return Setting("ms-swift", given, place, note)


def _llama_factory(named: Named) -> Setting:
    place = "src/llamafactory/model/adapter.py (_setup_freeze_tuning, _setup_full_tuning)"
    visual = any(key in name for keys in _LF_KEYS.values() for key in keys for name in named.every)
    if visual and named.model_type not in _LF_TYPES:
        note = (
            f"what it takes for the vision tower of {named.model_type} is not known here: use freeze_hook.py"
        )
        return Setting("LLaMA-Factory", {}, place, note)
    for given, found in _of_llama_factory(named, visual):
        if _is(named, found):
            return Setting("LLaMA-Factory", given, place, "in supervised training; it has no GRPO of its own")
    what = "it freezes all but the first or last n layers, or the vision tower or projector"
    return Setting("LLaMA-Factory", {}, place, _why_not(named, what))


def _of_llama_factory(named: Named, visual: bool) -> Iterator[tuple[dict[str, str], set[str]]]:
    """Its settings, and what each freezes, in its own way: by pieces of names."""
    for values in product((True, False), repeat=len(_LF_KEYS)) if visual else ():
        chosen = dict(zip(_LF_KEYS, values, strict=True))
        keys = [key for one, on in chosen.items() if on for key in _LF_KEYS[one]]
        found = {name for name in named.every if any(key in name for key in keys)}
        yield {"finetuning_type": "full"} | {one: str(on).lower() for one, on in chosen.items()}, found
    keys = [key for some in _LF_KEYS.values() for key in some] if visual else []
    for n in range(1, named.n_layers):
        for sign in (1, -1):
            layers = range(named.n_layers - n, named.n_layers) if sign > 0 else range(n)
            trained = {
                name
                for name in named.every
                if any(f".{layer}." in name for layer in layers) and not any(key in name for key in keys)
            }
            given = {"finetuning_type": "freeze", "freeze_trainable_layers": str(sign * n)}
            yield given, set(named.every) - trained
