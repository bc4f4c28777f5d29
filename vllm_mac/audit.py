"""Audits: how far reused attention is from exact attention, counted, and what follows from it.

In an audited decode step the KV groups that hit are computed exactly as well. In any other step so are those of
requests that asked for it (`per_request`); they count in the same histograms. Each of their heads
adds one to three histograms of its layer: of the error `|out - exact| / |exact|` (L2 over the head
size), of the lag `position - source` of its match, and of the length of its chain, which is the
number of hits since the exact evaluation that it descends from, itself included.

A histogram has one bucket more than edges: bucket `i` counts values in `(edges[i-1], edges[i]]`,
the last one those above all edges.

Letters: `B` rows, `H` query heads, `K` KV heads, `D` head size, `R` rings, `W` window.
"""

import logging
import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from vllm_mac.state import LayerState, Rows

logger = logging.getLogger("vllm.mac")

# Powers of sqrt(2), to three digits. What is at most the first edge is rounding in any dtype.
ERROR_EDGES = tuple(float(f"{2 ** (k / 2):.3g}") for k in range(-27, 5))
# 1, 2, 3, 4, 6, 8, 12 and so on, to the longest window.
COUNT_EDGES = tuple(sorted({2.0**k for k in range(17)} | {3.0 * 2**k for k in range(15)}))
BUCKETS = len(ERROR_EDGES) + 1

# In decode steps: how often layers are judged, and how long one is exact when it first goes so.
EVERY, RETRY = 256, 1024
# The fewest audited heads to judge a layer by, and how often in a row it must be above its budget.
LEAST, STRIKES = 256, 2


def quantile(edges: Sequence[float], counts: Sequence[int], q: float) -> float | None:
    """The value that the share `q` of a histogram's entries is at most, from 0 to 1.

    Interpolated in the logarithm within its bucket, so right to within the bucket; the first edge
    for anything in the first bucket, infinity for the last, None without entries.
    """
    rank, below = q * sum(counts), 0
    if not any(counts):
        return None
    for i, count in enumerate(counts):
        if count and below + count >= rank:
            if i == 0:
                return edges[0]
            if i == len(edges):
                return math.inf
            return edges[i - 1] * (edges[i] / edges[i - 1]) ** max((rank - below) / count, 0.0)
        below += count
    return math.inf  # rank above the sum by rounding


class Schedule:
    """Which decode steps are audited: one of each stretch of `1 / share` steps, drawn at random.

    Drawn, since text with a period could hide from every n-th step; with a fixed seed, so that
    all workers of an engine audit the same steps.
    """

    def __init__(self, share: float):
        """share: above 0, at most 1."""
        self._share = Fraction(str(share))
        self._draw = random.Random(0)
        self._step = self._end = self._stretches = 0
        self._chosen = -1

    def take(self) -> bool:
        """Whether the next step is audited."""
        if self._step == self._end:
            self._stretches += 1
            self._end = math.ceil(self._stretches / self._share)
            self._chosen = self._draw.randrange(self._step, self._end)
        self._step += 1
        return self._step - 1 == self._chosen


class Budget:
    """Whether one layer keeps to `limit`, from its audited errors. Knows numbers only.

    exact: whether the layer is to decode exactly now. p95: of the errors it was last judged by.
    until: the step from which it is tried again.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.exact, self.p95, self.until = False, None, 0
        self._seen: Sequence[int] = [0] * BUCKETS
        self._strikes, self._pause = 0, RETRY

    def judge(self, step: int, counts: Sequence[int]) -> bool:
        """Take the layer's error histogram as of decode step `step`; whether `exact` changed.

        A layer above its budget `STRIKES` times in a row goes exact, for `RETRY` steps at first
        and twice as long each further time; one that is tried again goes back at its first
        judgement above the budget. A judgement within it halves the next pause again.
        """
        if self.exact:
            if step < self.until:
                return False
            self.exact, self._seen = False, counts
            return True
        fresh = [now - before for now, before in zip(counts, self._seen, strict=True)]
        if sum(fresh) < LEAST:
            return False
        self._seen, self.p95 = counts, quantile(ERROR_EDGES, fresh, 0.95)
        if self.p95 <= self.limit:
            self._strikes, self._pause = 0, max(RETRY, self._pause // 2)
            return False
        self._strikes += 1
        if self._strikes < STRIKES:
            return False
        self._strikes = STRIKES - 1
        self.exact, self.until = True, step + self._pause
        self._pause *= 2
        return True


class Audit:
    """The audits of layers that step together, on the host: which steps, and which layers go exact.

    It never waits for the device. Counts are copied to the host beside the steps, and judged when
    they have arrived; `paused` of a layer is written in the order of the steps.
    """

    def __init__(self, layers: Mapping[str, LayerState]):
        """layers: by name, those whose steps are audited. Share and budget are those of the first one's
        configuration, which all have in common."""
        self._names, self._layers = list(layers), list(layers.values())
        config = self._layers[0].config
        self._schedule = Schedule(config.audit)
        budget = config.error_budget
        self._budgets = [] if budget is None else [Budget(budget) for _ in layers]
        self._step, self._due, self._copying = 0, EVERY, False
        on_gpu = self._layers[0].audited.is_cuda
        self._counts = torch.empty(len(layers), BUCKETS, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def begin_step(self) -> bool:
        """Whether all rows of the next decode step are audited; to be called once before each."""
        if self._budgets:
            self._watch()
        self._step += 1
        return self._schedule.take()

    def _watch(self) -> None:
        if self._copying and (self._arrived is None or self._arrived.query()):
            self._copying = False
            judged = zip(self._names, self._layers, self._budgets, self._counts.tolist(), strict=True)
            for name, layer, budget, counts in judged:
                if budget.judge(self._step, counts):
                    layer.paused.fill_(int(budget.exact))
                    _log(name, budget, self._step)
        if not self._copying and self._step >= self._due:
            self._due, self._copying = self._step + EVERY, True
            now = torch.stack([layer.audited[:-2].sum(0) for layer in self._layers])
            self._counts.copy_(now, non_blocking=True)
            if self._arrived is not None:
                self._arrived.record()


def _log(name: str, budget: Budget, step: int) -> None:
    if budget.exact:
        logger.warning(
            "MAC leaves %s exact for %d decode steps: the p95 of its audited errors is %.3g, error_budget %g",
            name, budget.until - step, budget.p95, budget.limit,
        )  # fmt: skip
    else:
        logger.info(
            "MAC serves %s again: the p95 of its audited errors was %.3g, error_budget %g",
            name, budget.p95, budget.limit,
        )  # fmt: skip


def histogram_shape(heads: int) -> tuple[int, int]:
    """Of the histograms of one layer with these query heads."""
    return heads + 2, BUCKETS


def histograms(heads: int, device) -> Tensor:
    """Empty histograms of one layer, `[H + 2, BUCKETS]` int64: errors of each query head, then
    lags, then chain lengths of all heads."""
    return torch.zeros(histogram_shape(heads), dtype=torch.int64, device=device)


def edges(device) -> Tensor:
    """`[2, BUCKETS - 1]` float32: the edges of errors, and those of lags and chain lengths."""
    return torch.tensor([ERROR_EDGES, COUNT_EDGES], dtype=torch.float32, device=device)


def tally(layer: LayerState, rows: Rows, found, out: Tensor, exact: Tensor, edges: Tensor) -> None:
    """Add the heads of a step's audited rows to a layer's histograms, after the step was recorded.

    layer: the rings' chains are read, `audited` is added to. rows: position and ring are read; position -1: the row
    is padding or not audited. found: what the step found (`paged.Decoded` or `kernels.Workspace`): `hit` `[B, K]`,
    nonzero where a group hit, of which alone heads count, and `source` `[B, H]`, position matched.
    out, exact: `[B, H, D]`, what was delivered and what exact attention gives. edges: as `edges` makes them.
    """
    counts, chain = layer.audited, layer.store.chain
    heads, window = chain.shape[1], layer.store.window
    hit, source = found.hit[: len(out)], found.source[: len(out)]
    row, head = ((hit != 0).repeat_interleave(heads // hit.shape[1], 1) & (rows.position >= 0)[:, None]).nonzero(
        as_tuple=True
    )
    true = exact[row, head].float()
    off = (out[row, head].float() - true).norm(dim=-1)
    error = torch.where(off == 0, 0.0, off / true.norm(dim=-1))
    lag = rows.position[row] - source[row, head]
    # The entry written by this step, which is one longer than the one reused.
    length = chain[rows.ring[row].long(), head, rows.position[row] % window]
    lags, chains = torch.full_like(head, heads), torch.full_like(head, heads + 1)
    for at, of, value in ((head, 0, error), (lags, 1, lag), (chains, 1, length)):
        # Not "above the edge", so that NaN is in the last bucket.
        bucket = (~(value.float()[:, None] <= edges[of])).sum(-1)
        counts.index_put_((at, bucket), counts.new_ones(()), accumulate=True)
