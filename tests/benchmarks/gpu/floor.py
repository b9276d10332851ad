"""How much arithmetic a scan of one prompt cannot avoid, from the shapes of an opened model's matrices.

The same count as `tests.benchmarks.floor`, for any model with plain blocks: from an intervention's layer up, every
token from its first on; of the last layer keys and values of those, and all else of the one token that is read.
"""

from __future__ import annotations

from hooks import HookedVLM
from interp.plan.arithmetic import Arithmetic, attention


class Floor:
    """FLOPs of interventions on one prompt of which the last token is read.

    Args:
        vlm: the model.
        n_tokens: of the prompt.
    """

    def __init__(self, vlm: HookedVLM, n_tokens: int) -> None:
        self._arithmetic, self._n_tokens = Arithmetic(vlm), n_tokens
        self._blocks = vlm.anatomy.text.blocks
        self._d_model = vlm.d_model

    def of_residual(self, layer: int, token: int) -> int:
        """The stream before a layer, at one token."""
        return self._from(layer, token)

    def of_head(self, layer: int, token: int = 0) -> int:
        """A head's result, from a token on: through its own rows of W_O, and the MLP of its own block."""
        block, read = self._blocks[layer], layer == len(self._blocks) - 1
        tokens = 1 if read else self._n_tokens - token
        own = tokens * (2 * block.d_head * self._d_model + self._arithmetic.second(layer))
        return own + self._from(layer + 1, token)

    def _from(self, layer: int, token: int) -> int:
        """All blocks from one on, and the logits of one token."""
        tokens, keys = self._n_tokens - token, self._n_tokens
        total, last = self._arithmetic.unembedding, len(self._blocks) - 1
        total += sum(self._arithmetic.block(one, tokens, keys) for one in range(layer, last))
        return total + (self._last(tokens, keys) if layer <= last else 0)

    def _last(self, tokens: int, keys: int) -> int:
        block, layer = self._blocks[-1], len(self._blocks) - 1
        mlp, out = self._arithmetic.second(layer), self._arithmetic.row(block.out)
        keys_and_values = self._arithmetic.row(block.path) - mlp - 2 * out  # W_Q is as large as W_O
        return tokens * keys_and_values + 2 * out + mlp + attention(block.sites, 1, keys)
