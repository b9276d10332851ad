"""Which settings of TRL's `GRPOConfig` the shared-prefix trainer follows; every other one is refused by name.

`experiments.triple.shared_prefix` computes log-probabilities and entropies and leaves the loss to TRL, so what TRL does
with them (clipping, aggregation, KL, masks) is TRL's own code. What would change how they are computed, or who computes
them, is followed there or refused here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hooks.errors import FrankenlensError

IN_THE_LOG_PROBABILITIES = frozenset({"temperature", "bf16", "fp16"})
"""What the trainer itself does, as TRL does it."""

BY_TRL = frozenset(
    # the loss, from log-probabilities and entropies
    "beta num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos "
    "vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights "
    "multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy "
    "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold "
    "use_bias_correction_kl "
    # models and rows
    "learning_rate model_init_kwargs trust_remote_code disable_dropout remove_unused_columns num_generations "
    "num_generations_eval max_completion_length shuffle_dataset pad_to_multiple_of generation_batch_size "
    "steps_per_generation ds3_gather_for_generation "
    # sampling by transformers
    "top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty cache_implementation "
    "max_tool_calling_iterations "
    # logs
    "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo".split()
)
"""What TRL does around the log-probabilities, whoever computes them."""

_OWN_FORWARD = "it changes or replaces the model's own forward, and a shared prefix is run through its parts"
_ONE_PROCESS = "a shared prefix is run on one device, in one process"
_SAMPLING = "completions are sampled by transformers here"
_OFF = (None, False, 0, 0.0, "", (), [], {})

REFUSED: Mapping[str, str] = {
    "use_vllm": _SAMPLING,
    "use_transformers_continuous_batching": _SAMPLING,
    "use_transformers_paged": _SAMPLING,
    "router_aux_loss_coef": "router logits of a packed row are not those of its samples alone",
    "use_liger_kernel": _OWN_FORWARD,
    "use_liger_loss": _OWN_FORWARD,
    "torch_compile": _OWN_FORWARD,
    "cast_lm_head_to_fp32": _OWN_FORWARD,
    "neftune_noise_alpha": "its noise is scaled by the length of a row, and a packed row holds several samples",
    "deepspeed": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "parallelism_config": _ONE_PROCESS,
}
"""Settings that the trainer does not follow, and why. They are refused where they are on."""

WITH_A_REFUSED_ONE = frozenset({"transformers_continuous_batching_config"})
"""Settings that mean nothing without a refused one, as all that begin with `vllm_` do."""


def require_followed(given: Mapping[str, Any]) -> None:
    """Refuse settings that the shared-prefix trainer would drop without a word.

    Args:
        given: name in `GRPOConfig` to value; all of them, or those that were given.

    Raises:
        FrankenlensError: names the first setting, its value, why it cannot be followed, and what to do; also one that
            only a TRL newer than this knows, where it is not at its default.
    """
    for name, value in given.items():
        if name in REFUSED and not _is_off(value):
            raise FrankenlensError(_message(name, value, REFUSED[name]))
    for name, value in given.items():
        if name in unknown_settings() and value != _default(name):
            raise FrankenlensError(
                _message(
                    name, value, "it is newer than the shared-prefix loss, which was not checked with it"
                )
            )


def unknown_settings() -> frozenset[str]:
    """Settings of the installed TRL's own that are neither followed nor refused here."""
    from transformers import TrainingArguments
    from trl import GRPOConfig

    own = {field.name for field in dataclasses.fields(GRPOConfig)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)}
    known = IN_THE_LOG_PROBABILITIES | BY_TRL | WITH_A_REFUSED_ONE | set(REFUSED)
    return frozenset(name for name in own - known if not name.startswith("vllm_"))


def require_one_device(args: Any) -> None:
    """Refuse several processes or devices, which `accelerate launch` decides and no setting names.

    Raises:
        FrankenlensError: says how many there are.
    """
    for number, what in ((args.world_size, "processes"), (args.n_gpu, "devices")):
        if number > 1:
            raise FrankenlensError(
                f"there are {number} {what}, and {_ONE_PROCESS}: launch it as one process with one visible device, or "
                "train with TRL's own GRPOTrainer (of `frankenlens freeze`: give --train and --data)."
            )


def _message(name: str, value: Any, why: str) -> str:
    return (
        f"{name} is {value!r}, which the shared-prefix loss does not follow: {why}. Leave it at {_default(name)!r}, or "
        "train with TRL's own GRPOTrainer, which runs every sample alone (of `frankenlens freeze`: give --train and "
        "--data)."
    )


def _default(name: str) -> Any:
    from trl import GRPOConfig

    for field in dataclasses.fields(GRPOConfig):
        if field.name == name:
            made = field.default_factory
            return made() if made is not dataclasses.MISSING else field.default
    return None


def _is_off(value: Any) -> bool:
    return any(value is off or (type(value) is type(off) and value == off) for off in _OFF)
