"""Who writes traces: the opened model here, or an engine that is installed beside it, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hooks import HookedVLM
from hooks.errors import FrankenlensError
from hooks.extras import MissingPackage
from interp.pair.elsewhere.given import collapsed
from interp.pair.generation import greedy
from interp.prompts import Prompt
from interp.results.store import Store


@dataclass(frozen=True)
class Continuation:
    """What was written after a prompt.

    Attributes:
        ids: its tokens, the one that ends the turn included.
        finish: "stop" where it ended its turn, "length" where it was cut off.
    """

    ids: tuple[int, ...]
    finish: str


@runtime_checkable
class Writer(Protocol):
    """Continues prompts greedily."""

    def write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Continuation]:
        """What is written after each of these prompts, at most so many tokens."""
        ...


@dataclass(frozen=True)
class Here:
    """The opened model, by transformers.

    Attributes:
        vlm: the model.
        batch_size: prompts at a time.
        keep: where finished batches are kept.
    """

    vlm: HookedVLM
    batch_size: int = 32
    keep: Store | None = None

    def write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Continuation]:
        """Greedy text (`interp.pair.generation.greedy`)."""
        written = greedy(self.vlm, prompts, max_new_tokens, self.batch_size, True, self.keep)
        return [_ended(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]


@dataclass(frozen=True)
class Vllm:
    """vLLM, where it is installed: `pip install vllm`, which brings a PyTorch of its own choice.

    Prompts are given as token ids, with one placeholder for an image and its pixels, so that no template stands between
    what is asked there and here; tokens that no answer holds are held back as `greedy` does.

    Attributes:
        model: the checkpoint, a folder or a repository id.
        engine: arguments of `vllm.LLM`, such as tensor_parallel_size.
    """

    model: str
    engine: dict[str, Any] = field(default_factory=dict)

    def write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Continuation]:
        """Greedy text of vLLM.

        Raises:
            FrankenlensError: vLLM is not installed, or gave other than one reply to each prompt.
        """
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingPackage(
                "writing traces with vLLM needs vllm, not installed here: pip install 'frankenlens[vllm]', which "
                "brings a PyTorch of its own choice, so best in an environment of its own; what is written there is "
                "read here (--traces)"
            ) from error
        builder = prompts[0].builder
        special = set(builder.tokenizer.all_special_ids) & set(builder.suppressed_ids)
        settings = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop_token_ids=list(builder.end_ids),
            skip_special_tokens=False,
            logit_bias=dict.fromkeys(sorted(special), -100.0) or None,
        )
        outputs = vllm.LLM(model=self.model, **self.engine).generate([_request(p) for p in prompts], settings)
        if len(outputs) != len(prompts):
            raise FrankenlensError(f"vLLM gave {len(outputs)} replies to {len(prompts)} prompts")
        return [_ended(p, list(o.outputs[0].token_ids)) for p, o in zip(prompts, outputs, strict=True)]


def _request(prompt: Prompt) -> dict[str, Any]:
    ids = prompt.ids[: prompt.n_prompt_tokens]
    request: dict[str, Any] = {"prompt_token_ids": list(collapsed(ids, prompt))}
    if prompt.example.images:
        request["multi_modal_data"] = {"image": list(prompt.example.images)}
    return request


def _ended(prompt: Prompt, ids: Sequence[int]) -> Continuation:
    return Continuation(tuple(ids), "stop" if ids and ids[-1] in prompt.builder.end_ids else "length")
