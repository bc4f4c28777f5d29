"""What each ring of an engine was recorded from, followed beside it from row to row."""

from dataclasses import dataclass, field


@dataclass
class Span:
    """Positions `first..last` that a ring holds, and the tokens of its request up to there."""

    first: int = 0
    last: int = -1
    tokens: list = field(default_factory=list)

    def begin(self, start: int, tokens: list, fresh: bool, window: int) -> None:
        """A row begins at `start`, after the tokens of its request before that."""
        gone = self.last + 1 - window  # positions up to there lost their slots
        if fresh or start > self.last + 1 or gone >= start:
            self.first, self.last = start, start - 1
        else:
            assert tokens[:start] == self.tokens[:start], "a ring of another request's tokens"
            self.first = max(self.first, gone)

    def end(self, stop: int, tokens: list) -> None:
        self.last, self.tokens = max(self.last, stop - 1), tokens[:stop]


class Texts:
    """The tokens of each request, followed from row to row."""

    def __init__(self, runner):
        self.runner, self.known = runner, {}

    def of(self, name: str, start: int, inputs: list[int]) -> list[int]:
        """Those up to the end of a row that begins at `start` with `inputs`."""
        text = self.known.setdefault(name, [])
        if len(text) != start:
            text[:] = text[:start] if len(text) > start else self._prompt(name, start)
        text += inputs
        return list(text)

    def _prompt(self, name: str, length: int) -> list[int]:
        states = getattr(self.runner, "req_states", None)
        if states is None:
            batch = self.runner.input_batch
            return batch.token_ids_cpu[batch.req_id_to_index[name], :length].tolist()
        return states.all_token_ids.gpu[states.req_id_to_index[name], :length].tolist()
