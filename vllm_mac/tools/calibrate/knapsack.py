"""The fewest reads within a budget of divergence, where the costs of layers add up.

Small divergences of the next token add up over layers. To first order the change of the logits is the sum of the
changes that single layers cause. The divergence is quadratic in that change, and its mixed terms are as often negative
as positive. So each layer is measured alone, and a run of all layers together checks the sum.

Imports neither vLLM nor torch.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to run one layer. read: share of its KV tokens. cost: divergence. threshold: None for exact."""

    threshold: float | None
    read: float
    cost: float


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the convex hull, by falling reads: each step saves fewer reads for its cost than the step before."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.read)):
        if kept and option.read >= kept[-1].read:
            continue
        while len(kept) > 1 and _worth(kept[-1], option) >= _worth(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _worth(a: Option, b: Option) -> float:
    """Reads that the step from `a` to `b` saves, over its cost."""
    return (a.read - b.read) / max(b.cost - a.cost, 1e-12)


def path(layers: Sequence[Sequence[Option]]) -> list[tuple[Option, ...]]:
    """Choices of one option for each layer, from the least cost to the fewest reads.

    Each differs from the one before in one layer: the one that saves the most for its cost. No choice of the same cost
    saves more; for a cost between two neighbours there may be a better choice than the cheaper one.
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
    """Index of the last choice on a path whose costs add up to at most `budget`; 0 without one."""
    return max((i for i, choice in enumerate(choices) if sum(o.cost for o in choice) <= budget), default=0)


def saving(choices: list[tuple[Option, ...]], share: float) -> int | None:
    """Index of the first choice on a path that saves `share` of the reads, if all layers have one size; None without one."""
    return next((i for i, choice in enumerate(choices) if sum(1 - o.read for o in choice) >= share * len(choice)), None)
