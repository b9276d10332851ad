"""RL once more from a user's own IN, on their own questions."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from experiments.retraining.recipe import Outcome, frozen_or_not, require_kept
from experiments.settings import DataSettings, PairSettings, load_examples
from experiments.triple.evaluate import write_json
from experiments.triple.resuming import train_from_last
from experiments.triple.rl import RL, require_grpo
from hooks import FrankenlensError, HookedVLM
from hooks.loading import load_model
from hooks.processors import load_processor, tokenizer_of
from interp.pair.generation import greedy
from interp.pair.pair import Pair, weights_sha256
from interp.prompts import Prompt, PromptBuilder
from interp.questions.examples import Example, cluster_of
from interp.questions.grading import judge, reference_fault
from interp.results.whole import read_record, write_record


@dataclass(frozen=True, eq=False)
class OwnRecipe:
    """GRPO on a user's own questions with TRL's trainer, rewarded for the right answer in the declared form.

    Attributes:
        in_path: IN, a folder or repository id.
        rl: steps, prompts, samples, lr, save_every; the rest of it belongs to the other recipe.
        trl: further arguments of `GRPOConfig`.
        builder: makes prompts and reads replies.
        train_on: questions, all with images or all without.
        prompts: what is measured.
        max_new_tokens, batch_size, dtype, device_map: as in `PairSettings`; "auto" trains in float32, as
            bfloat16 weights would round small updates away.
        left_out: reason to number of questions left out of either.
    """

    in_path: str
    rl: RL
    trl: Mapping[str, Any]
    builder: PromptBuilder
    train_on: Sequence[Example]
    prompts: Sequence[Prompt]
    max_new_tokens: int
    batch_size: int
    dtype: str
    device_map: str | None
    left_out: Mapping[str, int]

    @property
    def definition(self) -> str:
        """In words."""
        rl = self.rl
        return (
            f"GRPO (TRL) from IN on {len(self.train_on)} questions: {rl.steps} steps of {rl.prompts} prompts x "
            f"{rl.samples} samples a process, peak learning rate {rl.lr:g}, reward = right answer; greedy accuracy on "
            f"{len(self.prompts)} other questions"
        )

    @property
    def tasks(self) -> list[str]:
        """The task of every question."""
        return [prompt.example.task for prompt in self.prompts]

    @property
    def clusters(self) -> list[str]:
        """See `Recipe`."""
        return [cluster_of(prompt.example) for prompt in self.prompts]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Every task, and all together."""
        names = tuple(dict.fromkeys(self.tasks))
        return {"all": names} | ({name: (name,) for name in names} if len(names) > 1 else {})

    def train(self, addresses: Sequence[str], seed: int, unfinished: Path, folder: Path) -> None:
        """See `Recipe`."""
        dtype = "float32" if self.dtype == "auto" else self.dtype
        model = load_model(self.in_path, dtype)
        with frozen_or_not(model, addresses) as frozen:
            trainer = self._trainer(model, seed, unfinished)
            train_from_last(trainer, unfinished)
            temporary = folder.with_name(folder.name + ".tmp")
            model.config.use_cache = True  # the trainer switched it off
            trainer.save_model(str(temporary))  # gathers what is sharded
            if not trainer.is_world_process_zero():
                return
            write_json(trainer.state.log_history, unfinished / "log.json")
            self.builder.processor.save_pretrained(temporary)
            require_kept(frozen, unfinished, load_model(temporary, dtype, "cpu"))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)

    def measure(self, checkpoint: Path | HookedVLM, kept: Path) -> Outcome:
        """See `Recipe`."""
        record = self.recorded(checkpoint, kept, [p.example.id for p in self.prompts], self._answers)
        return Outcome(np.array(record["right"], dtype=float), record["unreadable"])

    def recorded(
        self,
        checkpoint: Path | HookedVLM,
        kept: Path,
        questions: Any,
        measured: Callable[[HookedVLM], dict[str, Any]],
    ) -> dict[str, Any]:
        """What was measured of a checkpoint, not again where `kept` has it of these weights, questions and limit.

        Args:
            checkpoint: a folder, or a model that is open and stays so.
            kept: JSON file of the record.
            questions: which they are, as JSON has it.
            measured: makes the record.
        """
        own = not isinstance(checkpoint, HookedVLM)
        vlm = checkpoint
        if not isinstance(vlm, HookedVLM):
            vlm = HookedVLM.from_pretrained(vlm, dtype=self.dtype, device_map=self.device_map, check=False)
        about = {
            "weights": weights_sha256(vlm.model),
            "questions": questions,
            "max_new_tokens": self.max_new_tokens,
        }
        record = read_record(kept)
        if record is None or record["about"] != about:
            record = {"about": about, **measured(vlm)}
            write_record(kept, record)
        if own:
            vlm.close()
        return record

    def _answers(self, vlm: HookedVLM) -> dict[str, Any]:
        written = greedy(vlm, self.prompts, self.max_new_tokens, self.batch_size, progress=True)
        answers = [self._read(ids, p) for ids, p in zip(written, self.prompts, strict=True)]
        grades = [judge(a, p.example) for a, p in zip(answers, self.prompts, strict=True)]
        right = [None if g.right is None else float(g.right) for g in grades]
        unreadable = float(np.mean([answer is None for answer in answers]))
        return {"right": right, "answers": answers, "unreadable": unreadable, "why": [g.why for g in grades]}

    def _read(self, ids: Sequence[int], prompt: Prompt) -> str | None:
        trace_format = self.builder.trace_format
        opened = trace_format.reasoning is not None and prompt.prompt_text.rstrip().endswith(
            trace_format.reasoning[0]
        )
        return trace_format.parse(self.builder.decode(ids), opened).answer

    def _trainer(self, model: PreTrainedModel, seed: int, unfinished: Path) -> Any:
        require_grpo()
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        template = self.builder.build(self.train_on[0])

        def right_answer(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
            found = zip(completion_ids, row, strict=True)
            return [
                float(judge(self._read(ids, template), self.train_on[at]).right or 0) for ids, at in found
            ]

        rl, gpu = self.rl, torch.cuda.is_available()
        arguments: dict[str, Any] = dict(
            output_dir=str(unfinished),
            seed=seed,
            use_cpu=not gpu,
            bf16=gpu,
            max_steps=rl.steps,
            per_device_train_batch_size=rl.samples,
            gradient_accumulation_steps=rl.prompts,
            num_generations=rl.samples,
            max_completion_length=self.max_new_tokens,
            learning_rate=rl.lr,
            logging_steps=5,
            save_steps=rl.save_every,
            save_total_limit=2,
            report_to=[],
        )
        if not self.trl.get("use_vllm"):
            arguments["generation_kwargs"] = {"suppress_tokens": list(self.builder.suppressed_ids) or None}
        builder = self.builder
        system = [] if builder.system is None else [{"role": "system", "content": builder.system}]
        rows: list[dict[str, Any]] = [
            {
                "prompt": [*system, {"role": "user", "content": builder.instruction + e.question}],
                "row": at,
            }
            | ({"images": list(e.images)} if e.images else {})
            for at, e in enumerate(self.train_on)
        ]
        processor: Any = load_processor(self.in_path)
        processor.chat_template = builder.template  # that of the prompts that are measured
        # as TRL loads it; its multimodal tensors go wrong otherwise
        tokenizer_of(processor).padding_side = "left"
        return GRPOTrainer(
            model=model,
            reward_funcs=cast(Any, right_answer),
            args=GRPOConfig(**{**arguments, **self.trl}),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
        )


def own_recipe(
    pair: Pair,
    in_path: str,
    rl: RL,
    trl: Mapping[str, Any],
    train: DataSettings,
    measure: DataSettings,
    config: PairSettings,
) -> OwnRecipe:
    """The recipe for two sets of questions.

    Args:
        train, measure: the questions; `measure.n` counts those of each task.
        config: the rest of the settings.
        pair, in_path, rl, trl: see `OwnRecipe`.

    Raises:
        FrankenlensError: a file cannot be read, or nothing in it can be used.
    """
    train_on, left_out = usable(pair, train, "training")
    measured, refused = usable(pair, measure, "test")
    every = [prompt.example for prompt in train_on]
    # TRL trains on questions with images or on questions without: one without among the others is left out
    with_image = [example for example in every if example.images] or every
    prompts: list[Prompt] = []
    for task in dict.fromkeys(prompt.example.task for prompt in measured):
        prompts += [prompt for prompt in measured if prompt.example.task == task][: measure.n]
    left_out |= refused
    left_out[f"test questions beyond the first {measure.n} of a task (--n)"] = len(measured) - len(prompts)
    left_out["training questions without an image"] = len(train_on) - len(with_image)
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not prompts or not with_image:
        raise FrankenlensError(f"no question is left to {'train' if prompts else 'measure'} on: {left_out}")
    return OwnRecipe(
        in_path,
        rl,
        trl,
        pair.builder,
        with_image,
        prompts,
        config.max_new_tokens,
        config.batch_size,
        config.dtype,
        config.device_map,
        left_out,
    )


def usable(pair: Pair, data: DataSettings, what: str) -> tuple[list[Prompt], dict[str, int]]:
    """Prompts of the questions that can be asked and graded, and reason -> number of the others.

    Args:
        pair: builds the prompts.
        data: the questions; all of them are read, whatever its n.
        what: they are for, in the reasons.
    """
    examples, dropped = load_examples(replace(data, n=sys.maxsize), seed=0)
    left_out = {f"{what} {reason}": count for reason, count in dropped.items()}
    prompts = []
    for example in tqdm(examples, desc=f"{what} prompts", delay=1):
        why = reference_fault(example)
        try:
            prompts += [] if why else [pair.builder.build(example)]
        except FrankenlensError as error:
            why = str(error).partition(": ")[2] or str(error)
        if why:
            left_out[f"{what}: {why}"] = left_out.get(f"{what}: {why}", 0) + 1
    return prompts, left_out
