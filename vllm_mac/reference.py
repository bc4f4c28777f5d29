"""MAC-Attention for one sequence and one KV group, written as the formulas read.

Source: MAC-Attention: a Match-Amend-Complete Scheme for Fast and Accurate Attention
Computation, MLSys 2026, arXiv 2604.00235. This file is the oracle that `paged` (batched, on
any device) and the GPU kernels are tested against; it favours reading over speed.

Letters: `d` head size, `G` query heads that share one KV head, `T` tokens in the sequence.
Positions are 0-based and intervals half-open. Every LSE is a natural-log log-sum-exp of
scaled scores. Tensors may be float32 or float64; the result keeps that dtype.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_mac.config import MacConfig
from vllm_mac.limits import limit, relief


class Partial(NamedTuple):
    """Partial softmax attention: normalised output and its log-sum-exp.

    out: `[..., d]`. lse: `[...]`, natural log, `-inf` for an empty interval.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Entry:
    """What the ring holds for one position `p` of one query head.

    query: `[d]`, pre-RoPE query that later queries are compared with: the one of `p` itself,
        or, with anchored reuse, of the miss that `p`'s summary descends from.
    summary: `S_p`, attention of the query at `p` over `[sink, p+1-band)`.
    chain: hits between `S_p` and the exact evaluation it descends from (0: exact itself).
    """

    query: Tensor
    summary: Partial
    chain: int


Ring = dict[int, Entry]
"""One query head's ring: position -> entry, for at most the last `window` positions."""


class Step(NamedTuple):
    """Result of one decode step of a KV group.

    out: `[G, d]`. hit: whether every head of the group reused a summary. source: position
    reused by each head, -1 where nothing matched. read: KV tokens read for the group.
    """

    out: Tensor
    hit: bool
    source: list[int]
    read: int


def attend(query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, scale: float) -> Partial:
    """`A(q, [start, stop))`: partial attention of one query over part of one KV head.

    query `[d]`, key and value `[T, d]`; `scale` multiplies the scores (usually `d**-0.5`).
    """
    if stop <= start:
        return Partial(torch.zeros_like(query), query.new_tensor(-torch.inf))
    score = key[start:stop] @ query * scale
    lse = torch.logsumexp(score, 0)
    return Partial(torch.exp(score - lse) @ value[start:stop], lse)


def merge(a: Partial, b: Partial) -> Partial:
    """`a (+) b`: the partial attention over the union of two disjoint intervals.

    out `[..., d]`, lse `[...]`. Associative and commutative; an empty side (`-inf`) is the
    neutral element, and two empty sides give `(0, -inf)`, never NaN.
    """
    lse = torch.logaddexp(a.lse, b.lse)
    # exp(-inf - -inf) is NaN: subtract 0 instead where both sides are empty.
    base = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    weight_a, weight_b = torch.exp(a.lse - base), torch.exp(b.lse - base)
    return Partial(weight_a[..., None] * a.out + weight_b[..., None] * b.out, lse)


def split(m: int, config: MacConfig) -> tuple[int, int]:
    """Where the three intervals of position `m` meet: `(sink_end, band_start)`.

    `[0, sink_end)` is the sink, `[sink_end, band_start)` the prefix that the summary covers
    and `[band_start, m+1)` the band. Short sequences have an empty prefix.
    """
    sink_end = min(config.sink, m + 1)
    return sink_end, max(m + 1 - config.band, sink_end)


def match(m: int, pre_query: Tensor, ring: Ring, config: MacConfig, rest_lse: Tensor) -> int:
    """Position whose summary the head may reuse at position `m`, or -1.

    pre_query: `[d]`, before RoPE. rest_lse: LSE over what is read anyway, band and sink. Candidates
    are entries of `[m-window, m)` with a non-empty prefix, at most `max_chain - 1` hits deep, under the
    distance limit of a summary without mass. Among them the smallest
    `distance^2 / limit + lag_weight * lag / window` wins, and the later of equals, with `limit` that of a
    summary that has all the mass; one that is not under it counts as `window` old, so that it never wins
    over one that is. It is reused when its distance is under the limit of its own mass, its share of
    the softmax beside the rest.
    """
    if m + 1 < config.min_context:
        return -1
    size = float((pre_query**2).sum()) if config.distance == "relative" else pre_query.shape[-1]
    bound = limit(size, config)
    best, best_score = -1, torch.inf
    for p in range(m - 1, max(m - config.window, 0) - 1, -1):
        entry = ring.get(p)
        if entry is None or p + 1 - config.band <= config.sink:
            continue
        if config.max_chain is not None and entry.chain >= config.max_chain:
            continue
        distance = float(((pre_query - entry.query) ** 2).sum())
        if distance >= bound * relief(0.0, config):
            continue
        # Both terms multiplied by the limit, which may be 0.
        age = (m - p) / config.window if distance < bound else 1.0
        score = distance + config.lag_weight * age * bound
        if score < best_score:
            best, best_score, best_distance = p, score, distance
    if best < 0:
        return -1
    mass = float(torch.sigmoid(ring[best].summary.lse - rest_lse))
    return best if best_distance < bound * relief(mass, config) else -1


def decode(
    m: int,
    query: Tensor,
    pre_query: Tensor,
    key: Tensor,
    value: Tensor,
    rings: list[Ring],
    config: MacConfig,
    scale: float,
) -> Step:
    """Decode position `m` of one KV group and record it in the group's rings (in place).

    query and pre_query: `[G, d]`, after and before RoPE. key and value: `[T, d]`, `T > m`.
    A request with a stricter threshold of its own is decoded with that in `config`. The group hits only when all its
    heads match: its keys are read once for all of them, so one miss pays for the whole group, and the whole group is
    then exact.
    """
    sink_end, band_start = split(m, config)
    rests = []
    for q in query:
        band = attend(q, key, value, band_start, m + 1, scale)
        rests.append(merge(band, attend(q, key, value, 0, sink_end, scale)))
    heads = zip(pre_query, rings, rests, strict=True)
    source = [match(m, pre, ring, config, rest.lse) for pre, ring, rest in heads]
    hit = min(source) >= 0
    outs = []
    for q, pre, ring, p, rest in zip(query, pre_query, rings, source, rests, strict=True):
        if hit:
            amend = attend(q, key, value, p + 1 - config.band, band_start, scale)
            summary = merge(ring[p].summary, amend)
            origin = ring[p].query if config.reuse == "anchored" else pre
            chain = ring[p].chain + 1
        else:
            summary = attend(q, key, value, sink_end, band_start, scale)
            origin, chain = pre, 0
        outs.append(merge(summary, rest).out)
        record(ring, m, Entry(origin, summary, chain), config)
    first = min(source) + 1 - config.band if hit else sink_end
    return Step(torch.stack(outs), hit, source, m + 1 - first + sink_end)


def seed(
    start: int,
    query: Tensor,
    pre_query: Tensor,
    key: Tensor,
    value: Tensor,
    rings: list[Ring],
    config: MacConfig,
    scale: float,
) -> None:
    """Record the last `window` positions of a prefill chunk that starts at `start` (in place).

    query and pre_query: `[n, G, d]`, after and before RoPE. key and value: `[T, d]` with
    `T >= start + n`. Prefill attention itself stays exact; only its summaries are kept.
    """
    n = query.shape[0]
    for i in range(max(n - config.window, 0), n):
        sink_end, band_start = split(start + i, config)
        for g, ring in enumerate(rings):
            summary = attend(query[i, g], key, value, sink_end, band_start, scale)
            record(ring, start + i, Entry(pre_query[i, g], summary, 0), config)


def record(ring: Ring, m: int, entry: Entry, config: MacConfig) -> None:
    """Put the entry of position `m` into a head's ring and drop what left the window."""
    ring[m] = entry
    for p in [p for p in ring if p <= m - config.window]:
        del ring[p]
