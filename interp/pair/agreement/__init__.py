"""Whether two models are a pair: what enters the forward pass is equal, however the files spell it; if not, in what."""

from interp.pair.agreement.difference import Difference, entering
from interp.pair.agreement.models import model_differences
from interp.pair.agreement.processors import processor_differences
from interp.pair.agreement.words import chat_template, template_differences, tokenizer_differences

__all__ = [
    "Difference",
    "chat_template",
    "entering",
    "model_differences",
    "processor_differences",
    "template_differences",
    "tokenizer_differences",
]
