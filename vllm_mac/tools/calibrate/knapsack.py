"""The fewest reads within a budget of divergence, where what the layers cost adds up.

Small divergences of the next token add up over layers: the logits' change is the sum of the changes that the
layers cause by themselves, to first order, and divergence is that change squared, whose mixed terms are as
often negative. So each layer is measured by itself, and the sum is checked by a run of all together.

Knows neither vLLM nor torch.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to run one layer. read: share of its KV tokens. cost: divergence. threshold: None for exact."""

    threshold: float | None
    read: float
    cost: float


def hull(options: Sequence[Option]) -> list[Option]:
    """Options in the order of falling reads, each step of which buys less for its cost than the one before."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.read)):
        if kept and option.read >= kept[-1].read:
            continue
        while len(kept) > 1 and _worth(kept[-1], option) >= _worth(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _worth(a: Option, b: Option) -> float:
    """Reads saved by going from `a` to `b`, for its cost."""
    return (a.read - b.read) / max(b.cost - a.cost, 1e-12)


def path(layers: Sequence[Sequence[Option]]) -> list[tuple[Option, ...]]:
    """Choices of one option for each layer, from the one of least cost to that of fewest reads.

    Each differs from the one before in one layer, the one where the cost buys the most. That is the best
    for the cost it has, but between two neighbours something better may lie.
    """
    hulls = [hull(options) for options in layers]
    at = [0] * len(hulls)
    found = [tuple(h[0] for h in hulls)]
    while steps := [
        (_worth(h[i], h[i + 1]), layer) for layer, (h, i) in enumerate(zip(hulls, at, strict=True)) if i + 1 < len(h)
    ]:
        _, layer = max(steps)
        at[layer] += 1
        found.append(tuple(h[i] for h, i in zip(hulls, at, strict=True)))
    return found


def within(choices: list[tuple[Option, ...]], budget: float) -> int:
    """Index of the last choice on a path whose costs add up to at most `budget`; 0 where none does."""
    return max((i for i, choice in enumerate(choices) if sum(o.cost for o in choice) <= budget), default=0)


def saving(choices: list[tuple[Option, ...]], share: float) -> int | None:
    """Index of the first choice on a path that saves `share` of the reads of layers of one size, or None."""
    return next((i for i, choice in enumerate(choices) if sum(1 - o.read for o in choice) >= share * len(choice)), None)
