"""The tokens of a trace as they are written: what each is, and what comes next."""

from __future__ import annotations

from interp.prompts.pieces import Pieces
from interp.prompts.prompt import Prompt
from interp.prompts.roles import Role


class TraceReader:
    """Reads the tokens of one trace as they are written, and says what each is and what comes next.

    It knows nothing of what is still to come. `Prompt.roles` knows the whole trace, and has otherwise what only later
    tokens tell (`interp.prompts.scanner`): delimiters of several tokens, answers that another follows.
    """

    def __init__(self, prompt: Prompt) -> None:
        """Stands behind the prompt's own trace.

        Args:
            prompt: with or without a trace.
        """
        self._scanner, self._pieces = prompt.builder.scanner(prompt), Pieces(prompt.builder.decode)
        for token in prompt.trace_ids:
            self.feed(token)

    def feed(self, token: int) -> tuple[Role, Role]:
        """Take one token.

        Returns:
            Its role, and the role that the next token has unless it completes a delimiter.
        """
        return self._scanner.feed(self._pieces.feed(token)), self.next

    @property
    def next(self) -> Role:
        """The role that the next token has unless it completes a delimiter."""
        return self._scanner.feed("")
