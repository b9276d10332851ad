"""From images, question and trace to processor tensors with a role for every token, alone or in padded batches."""

from interp.prompts.batch import PromptBatch, collate
from interp.prompts.builder import PromptBuilder
from interp.prompts.prompt import Prompt

__all__ = ["Prompt", "PromptBatch", "PromptBuilder", "collate"]
