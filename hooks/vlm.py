"""HookedVLM: an unchanged Hugging Face vision-language model with its hook points open."""

import copy
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hooks.anatomy.drawing import drawn
from hooks.anatomy.structure import tells_its_parts_apart
from hooks.anatomy.watching import has_pixels
from hooks.cache import ActivationCache, Keeper
from hooks.capabilities import missing
from hooks.engine import Hook, HookContext, HookFunction, hook_by_keyword
from hooks.errors import FrankenlensError, nearest, shown
from hooks.exclusive import exclusively
from hooks.layout import laid_out
from hooks.loading import load_model
from hooks.memory import require_room_for_cache
from hooks.nnsight.traceable import Traceable
from hooks.opening import (
    STRUCTURES,
    Taken,
    as_table,
    device_of,
    on_device,
    structure_key,
    taken_for,
    watched,
    weightless,
)
from hooks.points import HookPoint
from hooks.positions import At, check_at
from hooks.processors import image_token_of, is_visual, load_processor
from hooks.refusals import (
    refuse_adapted,
    refuse_checkpointing,
    refuse_foreign,
    refuse_inference_weights,
)
from hooks.selfcheck import opening_inputs, self_check, undisturbed, zero_every_point
from hooks.selfcheck_taken import holds
from hooks.standing import Standing
from hooks.stored.layouts import places
from hooks.unopened import unopened_anatomy

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
_EXPERT = re.compile("[0-9]{1,6}")
FwdHooks = Sequence[tuple[str | Callable[[str], bool], HookFunction]]


class HookedVLM(Traceable):
    """A Hugging Face VLM with named hook points; no weight is converted, no `forward` is replaced.

    At opening, the model is watched on one small prompt (`hooks.anatomy`), and a self-check proves for this very model
    that every listed point fires, that writing all points' own values back changes nothing, that the logits have a
    non-zero gradient at each, and that the stream is the sum of what its blocks were seen to add. A point that cannot
    be proved is listed in `absent` with the reason and is not offered; it costs no other. `print(vlm)` draws the rest.

    Attributes:
        model: the user's model.
        processor: its processor (None if not given).
        anatomy: where its parts are.
        hook_points: the points on offer, by name, in the order of the forward pass.
        image_token_id: the placeholder of image tokens; None where there is none.
        absent: name → reason of the points that this architecture ignores, or that could not be proved.
        opening: the prompt that it was watched on; empty for a model without weights.

    Args:
        model: a Hugging Face model with logits: image-text-to-text, causal, or encoder-decoder; of what `torch.compile`
            returned, the model that it wraps.
        processor: its processor, or its tokenizer; the vision side is seen only with an image, so a model that has one
            needs its processor, or `inputs`.
        inputs: processor tensors to watch it on, instead of a small random prompt.
        check: False skips the self-check; then nothing is known about points that do not act.

    Raises:
        FrankenlensError: it does not run on the prompt, or the residual stream of its decoder cannot be read and
            written; the model is left as it was.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        own: Any = getattr(model, "_orig_mod", model)
        self.model: PreTrainedModel = own
        self.processor = processor
        with exclusively(own, "the opening"):
            self._open(own, processor, inputs, check)

    def _open(
        self, model: PreTrainedModel, processor: Any, inputs: Mapping[str, Any] | None, check: bool
    ) -> None:
        self.image_token_id = image_token_of(model, processor)
        self._closed = False
        refuse_adapted(model)
        bare = weightless(model)
        if check:
            refuse_inference_weights(model)
        if bare and check:
            raise FrankenlensError(
                f"{type(model).__name__} has no weights (they are on the meta device), so it does not run and nothing "
                "can be proved; load them, or open it with check=False to see its points."
            )
        given = {} if bare else on_device(model, inputs or opening_inputs(model, processor))
        self.opening: Mapping[str, Any] = given
        if bare:
            self._take(as_table(unopened_anatomy(model, processor)))
            return
        key = structure_key(model, given, self.image_token_id) if check else None
        if not self._is_what_it_is_taken_for(given, key):
            self._watch(given, check, key)

    def _take(self, taken: Taken) -> None:
        """Open the model as what it is taken for."""
        self.anatomy = taken.anatomy
        packed = frozenset(
            site.module
            for tower in self.anatomy.towers.values()
            for block in tower.blocks
            for site in block.sites
            if tower.packed
        )
        inner = "" if self.anatomy.entry_key == "" else self.anatomy.entry
        self._standing = Standing(self.model, packed, inner)
        self.hook_points: dict[str, HookPoint] = dict(taken.points)
        self.absent: dict[str, str] = dict(taken.absent)

    def _is_what_it_is_taken_for(self, given: Mapping[str, Any], key: Hashable | None) -> bool:
        """Open it as what is known of its structure or its type, if it proves to be that."""
        taken = None if key is None else taken_for(self.model, given, key)
        if taken is None:
            return False
        self._take(taken)
        dead = holds(self, given, taken.proved)
        if dead is None:
            return False
        if not taken.proved:
            STRUCTURES.keep(key, replace(taken, points=dict(self.hook_points), proved=True))
        self._leave_out(dead)
        return True

    def _watch(self, given: Mapping[str, Any], check: bool, key: Hashable | None) -> None:
        """Find its parts by watching it, and keep the points whose tensors are what they are said to be."""
        self._take(as_table(watched(self.model, given, self.image_token_id)))
        with undisturbed(self.model):
            self.hook_points, odd = laid_out(self, given)
        self.absent |= odd
        if check:
            checked = self_check(self, given)
            if key is not None and checked.by_structure is not None and tells_its_parts_apart(self.model):
                points = {n: p for n, p in self.hook_points.items() if n not in checked.by_structure}
                absent = self.absent | checked.by_structure
                taken = Taken(self.anatomy, points, absent, proved=True)
                # Running a model may leave marks on it: it is known before and after.
                for one in (key, structure_key(self.model, given, self.image_token_id)):
                    STRUCTURES.keep(one, taken)
            self._leave_out(checked.absent)

    def _leave_out(self, absent: Mapping[str, str]) -> None:
        self.absent |= absent
        self.hook_points = {name: p for name, p in self.hook_points.items() if name not in absent}

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device_map: str | dict | None = None,
        trust_remote_code: bool = False,
        check: bool = True,
        processor: ProcessorMixin | PreTrainedTokenizerBase | Literal["auto"] | None = "auto",
        inputs: Mapping[str, Any] | None = None,
        settings: str | Path | None = None,
        **kwargs: Any,
    ) -> "HookedVLM":
        """Load model and processor from a folder or a repository id, and open it.

        A folder holds safetensors, or shards as a trainer left them (`hooks.stored.layouts`).

        Args:
            path_or_id: folder of a checkpoint, or a repository id on the hub.
            dtype: "auto" keeps the checkpoint's own.
            device_map: as in transformers and accelerate.
            trust_remote_code: run code that comes with the checkpoint.
            check, inputs: see the class.
            processor: "auto" loads that of the checkpoint, of a text-only one its tokenizer; None: there is none.
            settings: folder or repository of the model that it was trained from: config.json, tokenizer and processor
                are taken there where shards of a trainer have none beside them.
            kwargs: passed to `from_pretrained` of the class of transformers that has the model.

        Raises:
            FrankenlensError: no such checkpoint, no weights that are read, no processor, missing weights, unknown
                architecture.
        """
        if isinstance(processor, str):
            _, where = places(path_or_id, settings)
            processor = load_processor(where, trust_remote_code=trust_remote_code)
        model = load_model(path_or_id, dtype, device_map, trust_remote_code, settings, **kwargs)
        return cls(model, processor, inputs=inputs, check=check)

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        return device_of(self.module(self.anatomy.embed) if self.anatomy.embed else self.model)

    @property
    def n_layers(self) -> int:
        """Decoder blocks."""
        return len(self.anatomy.text.blocks)

    @property
    def n_heads(self) -> int:
        """Query heads of a decoder block (the largest number, where blocks differ)."""
        return max((block.n_heads for block in self.anatomy.text.blocks), default=0)

    @property
    def d_model(self) -> int:
        """Width of the decoder's residual stream."""
        return self.anatomy.text.width

    @property
    def n_logits(self) -> int:
        """How many token ids the model has logits for; often more than its tokenizer has words."""
        weight = getattr(self.module(self.anatomy.unembed), "weight", None) if self.anatomy.unembed else None
        return int(self.model.config.get_text_config().vocab_size if weight is None else weight.shape[0])

    @property
    def _embedding(self) -> Tensor:
        return self.model.get_parameter(f"{self.anatomy.embed}.weight")

    def can(self, capability: str) -> bool:
        """Whether the model has what an analysis needs, e.g. "head result"; `hooks.capabilities` lists the names.

        Raises:
            FrankenlensError: there is no such capability.
        """
        return not missing(self.anatomy, self.hook_points, capability)

    def require(self, capability: str, analysis: str) -> None:
        """Refuse an analysis that needs what this model does not have.

        Raises:
            FrankenlensError: one sentence that says what it lacks, and where.
        """
        if lacks := missing(self.anatomy, self.hook_points, capability):
            raise FrankenlensError(
                f"{analysis} needs what {type(self.model).__name__} does not have: {lacks}."
            )

    def __deepcopy__(self, memo: dict) -> "HookedVLM":
        """The model copied and opened as this one was; hooks that stand stay where they are."""
        self.require_open()
        memo[id(self)] = new = copy.copy(self)
        with self._standing.exclusive("a copy"):
            new.model = copy.deepcopy(self.model, memo)
        new.processor = copy.deepcopy(self.processor, memo)
        new._standing = Standing(new.model, self._standing.packed, self._standing.clock.inner)
        return new

    def __copy__(self) -> "HookedVLM":
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce__(self) -> NoReturn:
        raise FrankenlensError(
            "a HookedVLM is not pickled: save the model (vlm.model.save_pretrained) and open it again, in each process."
        )

    def __str__(self) -> str:
        return f"{self!r}\n{drawn(self.anatomy)}"

    def __repr__(self) -> str:
        state = (
            "closed" if self._closed else f"{len(self.hook_points)} hook points, {len(self.absent)} absent"
        )
        return (
            f"HookedVLM({type(self.model).__name__}, {self.n_layers} layers x {self.n_heads} heads, {state})"
        )

    def __call__(self, inputs: Mapping[str, Any], **kwargs: Any) -> Any:
        """Run the model on processor tensors, with whatever hooks are on. Returns Hugging Face's own output."""
        self.require_open()
        run: Any = self.model
        with self._standing.exclusive("a run"):
            return run(**self._to_device(inputs), **kwargs)

    def run_with_cache(
        self, inputs: Mapping[str, Any], names_filter: NamesFilter = None, **kwargs: Any
    ) -> tuple[Any, ActivationCache]:
        """Run once and keep the named activations (detached copies; one copy where two names are of the same tensor,
        as `hook_resid_post` of a block and `hook_resid_pre` of the next).

        Args:
            inputs: processor tensors.
            names_filter: a name, names, a predicate on names, or None for every point but `mlp.hook_expert_out`, which
                holds as many streams as there are experts: name it, or a few of them (`...hook_expert_out.5`).

        Returns:
            Hugging Face's output, and the cache.

        Raises:
            FrankenlensError: there is no memory for it (`hooks.memory`), before anything runs.
        """
        refuse_foreign(kwargs)
        keep, names = Keeper(), self.names(names_filter)
        if names_filter is None:
            names = [name for name in names if self.hook_points[name].place != "expert_out"]
        require_room_for_cache(self, inputs, map(self.point, names))
        layer = self._hooks_of([(name, keep) for name in names])
        with self.attached(layer):
            output = self(inputs, **kwargs)
        _require_fired(layer)
        return output, ActivationCache({name: keep.kept[name] for name in names}, self)

    def run_with_hooks(self, inputs: Mapping[str, Any], fwd_hooks: FwdHooks = (), **kwargs: Any) -> Any:
        """Run once with hook functions `fn(activation, hook)`, which return a new value, None, or edit in place.

        Raises:
            FrankenlensError: a hook did not fire, or gradient checkpointing would run the backward pass without it.
        """
        refuse_foreign(kwargs)
        if fwd_hooks:
            refuse_checkpointing(self.model)
        layer = self._hooks_of(fwd_hooks)
        with self.attached(layer):
            output = self(inputs, **kwargs)
        _require_fired(layer)
        return output

    def generate(
        self, inputs: Mapping[str, Any], fwd_hooks: FwdHooks = (), *, at: At = "all", **kwargs: Any
    ) -> Any:
        """Hugging Face's `generate` under hooks, which act on the prefill and on every decoding step (KV cache on).

        A step has one token, so that `activation[:, 0]` is the first of the prompt and then every new one;
        `hook.positions` says which tokens a function is shown, and `at` narrows them.

        Args:
            inputs: processor tensors.
            fwd_hooks: as in `run_with_hooks`.
            at: "all"; "prompt" or "generated" tokens alone; or positions in the whole sequence (padding included, the
                first generated token stands at the prompt's length). Functions are then shown these tokens only, and
                only at steps that have some; points without an axis of decoder tokens are not narrowed.
            kwargs: as in `model.generate`.

        Returns:
            What `model.generate` returns: token ids [batch pos], or its output object if that is asked for.

        Raises:
            FrankenlensError: a hook did not fire, or `at` is neither a known word nor positions.
        """
        self.require_open()
        layer = [replace(hook, at=check_at(at)) for hook in self._hooks_of(fwd_hooks)]
        ids = None if getattr(self.model.config, "is_encoder_decoder", False) else inputs.get("input_ids")
        with self.attached(layer):
            self._standing.clock.begin(None if ids is None else ids.shape[1])
            model: Any = self.model
            with self.exclusive("a generation"):
                output = model.generate(**self._to_device(inputs), **kwargs)
        _require_fired(layer)
        return output

    @contextmanager
    def hooks(self, fwd_hooks: FwdHooks = ()) -> Iterator["HookedVLM"]:
        """Keep hook functions on for the length of the context; contexts nest, outer hooks act first."""
        self.require_open()
        with self.attached(self._hooks_of(fwd_hooks)):
            self._standing.clock.begin(None)
            yield self

    def names(self, wanted: NamesFilter = None) -> list[str]:
        """The hook names that a filter selects.

        Raises:
            FrankenlensError: an unknown or an absent name, or a predicate that selects nothing.
        """
        if wanted is None:
            return list(self.hook_points)
        if callable(wanted) and not isinstance(wanted, type):
            selected = [name for name in self.hook_points if wanted(name)]
            if not selected:
                raise FrankenlensError(
                    "the names filter selects no hook point; `vlm.hook_points` lists them."
                )
            return selected
        if not isinstance(wanted, Iterable) or isinstance(wanted, bytes):
            raise FrankenlensError(
                f"{shown(wanted)} names no hook points; give a name, a list of names, or a function of a name."
            )
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in names:
            if isinstance(name, str) and name in self.absent:
                raise FrankenlensError(
                    f"{name} is absent in {type(self.model).__name__}: {self.absent[name]}"
                )
            self.point(name)
        return names

    def point(self, name: str) -> HookPoint:
        """The hook point of a name; `blocks.3.mlp.hook_expert_out.5` is that of one expert alone, [batch pos d_model].

        Raises:
            FrankenlensError: there is none of that name.
        """
        if not isinstance(name, str):
            raise FrankenlensError(
                f"{shown(name)} is no hook point, which has a name; `vlm.hook_points` lists them."
            )
        whole, _, expert = name.rpartition(".")
        if (
            whole in self.hook_points
            and self.hook_points[whole].place == "expert_out"
            and _EXPERT.fullmatch(expert)
        ):
            point = self.hook_points[whole]
            if point.experts is not None and int(expert) < point.experts.n_experts:
                return point.of_expert(int(expert))
        if name not in self.hook_points:
            unseen = name.startswith(("vision.", "projector.")) and not self.anatomy.vision.blocks
            hint = (
                "Its vision side was not seen: the prompt that it was opened with holds no image. Give its processor, "
                "or inputs= with an image."
                if unseen and is_visual(self.model.config)
                else nearest(name, self.hook_points)
            )
            raise FrankenlensError(f"{shown(name)} is no hook point of this model. {hint}".strip())
        return self.hook_points[name]

    def verify(self, inputs: Mapping[str, Any] | None = None, progress: bool = True) -> dict[str, float]:
        """The long self-check: zero every point in turn.

        Args:
            inputs: a prompt with an image, as tensors; by default a small random one.
            progress: show a bar.

        Returns:
            name → largest change of a logit.

        Raises:
            FrankenlensError: zeroing a point changes nothing.
        """
        self.require_open()
        given = inputs if inputs is not None else opening_inputs(self.model, self.processor)
        return zero_every_point(self, self._to_device(given), progress)

    def module(self, path: str) -> nn.Module:
        """The module at a path of the anatomy."""
        return self.model.get_submodule(path)

    def image_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch pos"]:
        """The tokens of a batch that stand for images, on the model's device."""
        ids = inputs["input_ids"].to(self.device)
        return (
            torch.zeros_like(ids, dtype=torch.bool)
            if self.image_token_id is None
            else ids == self.image_token_id
        )

    def has_image(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a batch holds an image."""
        return has_pixels(inputs) or bool(self.image_mask(inputs).any())

    def readout(self, stream: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
        """Logits of a residual stream as it stands behind the last block.

        Raises:
            FrankenlensError: no final norm or no unembedding was found in this model.
        """
        self.require("lens", "reading logits off a residual stream")
        return self.unembed(self.module(self.anatomy.final_norm)(stream))

    def unembed(self, normed: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
        """Logits of what the final norm gives out.

        Raises:
            FrankenlensError: no final norm or no unembedding was found in this model.
        """
        self.require("lens", "reading logits off a residual stream")
        return self.anatomy.after_unembedding(self.module(self.anatomy.unembed)(normed))

    def close(self) -> None:
        """Take every hook away. The model is the user's again, exactly as it was; this object refuses further runs."""
        self._standing.clear()
        self._closed = True

    def _hooks_of(self, fwd_hooks: FwdHooks) -> list[Hook]:
        if isinstance(fwd_hooks, str) or not isinstance(fwd_hooks, Iterable):
            raise FrankenlensError(f"{shown(fwd_hooks)} are no hooks; give a list of pairs (name, function).")
        fwd_hooks = list(fwd_hooks)
        for one in fwd_hooks:
            if not isinstance(one, Sequence) or isinstance(one, str) or len(one) != 2 or not callable(one[1]):
                raise FrankenlensError(
                    f"{shown(one)} is no hook; give a pair of a name and a function fn(activation, hook)."
                )
        distinct = {id(fn): fn for _, fn in fwd_hooks}
        called = {key: hook_by_keyword(fn) for key, fn in distinct.items()}
        return [
            Hook(called[id(fn)], HookContext(self.point(name)))
            for wanted, fn in fwd_hooks
            for name in self.names(wanted)
        ]

    def exclusive(self, what: str) -> AbstractContextManager[None]:
        """No other thread or task runs the model through an opened one, or changes what stands on it; contexts nest.

        Args:
            what: is done meanwhile, for the message of a refusal.

        Raises:
            FrankenlensError: another task has it; or another thread, which does not come to an end (others are waited
                for).
        """
        return self._standing.exclusive(what)

    def attached(self, layer: list[Hook]) -> AbstractContextManager[None]:
        """Keep hooks on that are made already, after those that stand; `hooks` makes them from functions."""
        return self._standing.attached(layer)

    def _to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}

    def require_open(self) -> None:
        """Raise if this HookedVLM was closed."""
        if self._closed:
            raise FrankenlensError(
                "this HookedVLM is closed; open the model again with HookedVLM(model, processor)."
            )


def _require_fired(layer: Sequence[Hook]) -> None:
    silent = [hook.context.name for hook in layer if not hook.context.calls]
    if silent:
        raise FrankenlensError(
            f"these hooks did not fire: {', '.join(silent[:5])}. Do the inputs hold an image?"
        )
