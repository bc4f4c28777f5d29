"""MAC's decoding of the end of one prompt in one layer, under many candidates at once, in PyTorch.

Under teacher forcing, decoding has the same queries, keys and values as the prefill of the prompt, so nothing is
generated. The simulation follows `reference` step by step: rings seeded by the positions before, chains of hits with
their amended summaries in the ring's dtype, groups that hit only when all their heads match.

Letters: `T` tokens, `n` positions at the end of the prompt that have queries, `S` steps (the last of
them), `W = n - S` window, `H` query heads, `K` KV heads, `G = H / K`, `D` head size, `C` candidates,
`P` pairs of band and sink. Arithmetic is in the dtype of the keys given, float32 or float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_mac import limits
from vllm_mac.paged import attend
from vllm_mac.reference import Partial, merge
from vllm_mac.ring import narrow
from vllm_mac.tools.calibrate.bins import BINS, EDGES
from vllm_mac.tools.calibrate.grid import Candidate

SCORES_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}
STATE_BYTES = 2 << 30  # state of the candidates that are simulated together


class Layer(NamedTuple):
    """The inputs of one layer for one prompt.

    query, pre_query: `[n, H, D]` after and before RoPE, of the last n positions.
    key, value: `[K, T, D]`. scale: of the scores. Where the error of the layer's output is wanted, project: the layer's
    `W_O` without a bias, from `[S, H D]` to `[S, M]`; residual: `[n]`, the squared norm of the residual stream.
    """

    query: Tensor
    pre_query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    project: Callable[[Tensor], Tensor] | None = None
    residual: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Every step of every candidate. A source is the position of a head's match, or -1.

    error: `[C, H, S]` relative error `|o - o*| / |o*|` of heads that hit, 0 elsewhere.
    hit: `[C, K, S]` bool. source: `[C, H, S]` int64. chain: `[C, H, S]` hits since the exact read.
    read: `[C]` int64, KV tokens read over all steps and KV heads.
    out: `[C, H, S, D]`, or None unless it is wanted.
    """

    error: Tensor
    hit: Tensor
    source: Tensor
    chain: Tensor
    read: Tensor
    out: Tensor | None


class Parts(NamedTuple):
    """Exact attention by intervals, for each pair of band and sink (`P`).

    summary: over the prefix of each of the n positions, `[P, H, n, D]`. rest: over band and sink of
    each step, `[P, H, S, D]`. exact: over everything, `[H, S, D]`.
    """

    summary: Partial
    rest: Partial
    exact: Tensor


def exact_parts(layer: Layer, pairs: list[tuple[int, int]], steps: int) -> Parts:
    """Exact attention over the intervals of `pairs`. Each key is read once, except where bands or sinks differ.

    Every prefix must be non-empty at the first of the n positions.
    """
    n, heads, d = layer.query.shape
    kv_heads, tokens, _ = layer.key.shape
    widest, deepest = max(band for band, _ in pairs), max(sink for _, sink in pairs)
    if tokens - n + 1 - widest <= deepest:
        raise ValueError(f"{tokens} tokens leave no prefix for {n} positions with band {widest} and sink {deepest}")
    block = max(1, min(128, SCORES_AT_ONCE[layer.key.device.type] // (heads * tokens)))
    token = torch.arange(tokens, device=layer.key.device)
    blocks = []
    for i in range(0, n, block):
        q = layer.query[i : i + block].to(layer.key.dtype)
        size = len(q)
        q = q.view(size, kv_heads, -1, d).permute(1, 2, 0, 3).reshape(kv_heads, -1, d)
        position = tokens - n + i + torch.arange(size, device=q.device)
        end = position.repeat(heads // kv_heads) + 1
        # Keys that all queries of the block have in their prefix, whatever the pair.
        low, high = deepest, tokens - n + i + 1 - widest

        def part(first: int, last: int, start, stop, q=q) -> Partial:
            keys = slice(first, last)
            as_tensor = lambda x: x if isinstance(x, Tensor) else torch.tensor(x, device=q.device)
            return attend(
                q, layer.key[:, keys], layer.value[:, keys], token[keys], as_tensor(start), as_tensor(stop), layer.scale
            )

        core = part(low, high, low, high)
        last = tokens - n + i + size
        near = {band: (part(high, last, high, end - band), part(high, last, end - band, end)) for band, _ in pairs}
        far = {sink: (part(0, deepest, sink, deepest), part(0, deepest, 0, sink)) for _, sink in pairs}
        summaries = [merge(merge(core, near[band][0]), far[sink][0]) for band, sink in pairs]
        rests = [merge(near[band][1], far[sink][1]) for band, sink in pairs]
        blocks.append([
            Partial(
                torch.stack([part.out.view(heads, size, d) for part in some]),
                torch.stack([part.lse.view(heads, size) for part in some]),
            )
            for some in (summaries, rests)
        ])  # fmt: skip
    summary, rest = (Partial(*(torch.cat(x, 2) for x in zip(*some))) for some in zip(*blocks))
    rest = Partial(*(x[:, :, n - steps :] for x in rest))
    whole = merge(Partial(*(x[0][:, n - steps :] for x in summary)), Partial(*(x[0] for x in rest)))
    return Parts(summary, rest, whole.out)


def distances(pre_query: Tensor, stored: Tensor, steps: int) -> Tensor:
    """Squared distance of each step's query from every stored one: `[H, S, n]`, from `[n, H, D]` twice.

    Computed with products in float64, whose cancellation error is far below the rounding of float32.
    """
    stored = stored.transpose(0, 1).double()
    wanted = pre_query[len(pre_query) - steps :].transpose(0, 1).double()
    norms = (wanted**2).sum(-1)[:, :, None] + (stored**2).sum(-1)[:, None]
    return torch.baddbmm(norms, wanted, stored.transpose(1, 2), alpha=-2).clamp_(min=0).to(pre_query.dtype)


def simulate(
    layer: Layer,
    candidates: list[Candidate],
    steps: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    keep_out: bool = False,
    parts: Parts | None = None,
    distance: Tensor | None = None,
) -> Trace:
    """Decode the last `steps` positions under each candidate.

    dtypes: of a ring's queries and outputs. Every context must have `min_context` tokens or more. keep_out: also return
    the outputs. parts, distance: results of `exact_parts` for the candidates' sorted pairs of band and sink, and of
    `distances`, if the caller has them.
    """
    n, heads, d = layer.query.shape
    kv_heads, tokens, _ = layer.key.shape
    group, window, count, dtype, device = (
        heads // kv_heads,
        n - steps,
        len(candidates),
        layer.key.dtype,
        layer.key.device,
    )
    pairs = pairs_of(candidates)
    parts = parts or exact_parts(layer, pairs, steps)
    pre = layer.pre_query.to(dtype)
    if distance is None:
        distance = distances(pre, narrow(pre, dtypes[0]).to(dtype), steps)

    settings = [candidate.setting for candidate in candidates]
    per = lambda values, kind: torch.tensor(list(values), dtype=kind, device=device)
    # `[C, 1]` or `[C, 1, 1]`, to go with `[C, H]` and `[C, H, W]`.
    pair = per((pairs.index((s.band, s.sink)) for s in settings), torch.int64)[:, None]
    band_sink = per((s.band + s.sink for s in settings), torch.int64)[:, None]
    anchored = per((s.reuse == "anchored" for s in settings), torch.bool)[:, None]
    cap = per((s.max_chain or steps + 1 for s in settings), torch.int32)[:, None, None]
    strict = per((2.0 * limits.tightness(c.threshold) for c in candidates), dtype)[:, None]
    relative = per((s.distance == "relative" for s in settings), torch.bool)[:, None]
    slot = torch.arange(window, device=device)
    lag_share = (window - slot).to(dtype) / window
    lag_weight = per((s.lag_weight for s in settings), dtype)[:, None, None]
    norm = (pre[window:] ** 2).sum(-1)  # [S, H]
    floor = per((torch.nan if s.mass_floor is None else s.mass_floor for s in settings), dtype)[:, None]
    relief = lambda mass: torch.nan_to_num(((1 + floor) / (mass + floor)) ** 2, nan=1.0)  # as `limits.relief`
    loosest = relief(0.0)[..., None]

    # Candidates of one band share the keys of their amends.
    by_band: dict[int, list[int]] = {}
    for i, setting in enumerate(settings):
        by_band.setdefault(setting.band, []).append(i)
    amends = [_Amend(layer, band, window, steps, per(rows, torch.int64)) for band, rows in by_band.items()]

    # Rings, but for all n positions: position tokens - n + i is at i.
    origin = torch.arange(n, device=device).expand(count, heads, n).clone()
    chain = torch.zeros(count, heads, n, dtype=torch.int32, device=device)
    stored = torch.zeros(count, heads, steps, d, dtype=dtypes[1], device=device)
    stored_lse = torch.zeros(count, heads, steps, dtype=dtype, device=device)
    seeds = parts.summary.out.to(dtypes[1])

    error = torch.zeros(count, heads, steps, dtype=dtype, device=device)
    hits = torch.zeros(count, kv_heads, steps, dtype=torch.bool, device=device)
    sources = torch.full((count, heads, steps), -1, dtype=torch.int64, device=device)
    read = torch.zeros(count, dtype=torch.int64, device=device)
    outs = torch.zeros(count, heads, steps, d, dtype=dtype, device=device) if keep_out else None
    head = torch.arange(heads, device=device)
    row = torch.arange(count, device=device)[:, None]
    size_of = parts.exact.norm(dim=-1).clamp(min=torch.finfo(dtype).tiny)
    for i in range(steps):
        entries = slice(i, i + window)
        apart = torch.gather(distance[:, i].expand(count, heads, n), 2, origin[:, :, entries])
        limit = (strict * torch.where(relative, norm[i], float(d)))[..., None]
        usable = (apart < limit * loosest) & (chain[:, :, entries] < cap)
        age = torch.where(apart < limit, lag_share, 1.0)
        score = torch.where(usable, apart + lag_weight * age * limit, torch.inf)
        best = score.amin(-1, keepdim=True)
        found = torch.where(score == best, slot, -1).amax(-1)  # the later of equals
        at = found + i  # unused where nothing matched, but within bounds
        deep = chain[row, head, at]
        later = (at - window).clamp(min=0)
        old = Partial(
            torch.where((deep > 0)[..., None], stored[row, head, later], seeds[pair, head, at]).to(dtype),
            torch.where(deep > 0, stored_lse[row, head, later], parts.summary.lse[pair, head, at]),
        )
        rest = Partial(parts.rest.out[pair, head, i], parts.rest.lse[pair, head, i])
        near = torch.gather(apart, 2, found[..., None].clamp(min=0))[..., 0]
        near = near < limit[..., 0] * relief(torch.sigmoid(old.lse - rest.lse))
        matched = (best[..., 0] < torch.inf) & near
        hit = matched.view(count, kv_heads, group).all(-1)
        hit_head = hit.repeat_interleave(group, 1)
        added = Partial(torch.empty_like(old.out), torch.empty_like(old.lse))
        lag = window - found
        for amend in amends:
            amend.run(i, lag, added)
        new = merge(old, added)
        out = merge(new, rest).out
        wrong = (out - parts.exact[:, i]).norm(dim=-1) / size_of[:, i]

        error[:, :, i] = torch.where(hit_head, wrong, 0.0)
        hits[:, :, i] = hit
        sources[:, :, i] = torch.where(matched, found + tokens - n + i, -1)
        if outs is not None:
            outs[:, :, i] = torch.where(hit_head[..., None], out, parts.exact[:, i])
        farthest = lag.view(count, kv_heads, group).amax(-1)
        length = tokens - steps + i + 1
        read += torch.where(hit, farthest + band_sink, length).sum(1)
        # A missed group's summaries are exact: those of `seeds`.
        chain[:, :, window + i] = torch.where(hit_head, deep + 1, 0)
        inherited = torch.where(anchored, origin[row, head, at], window + i)
        origin[:, :, window + i] = torch.where(hit_head, inherited, window + i)
        stored[:, :, i] = new.out.to(dtypes[1])
        stored_lse[:, :, i] = new.lse
    return Trace(error, hits, sources, chain[:, :, window:], read, outs)


def pairs_of(candidates: list[Candidate]) -> list[tuple[int, int]]:
    """Band and sink of the candidates, each pair once, sorted."""
    return sorted({(candidate.setting.band, candidate.setting.sink) for candidate in candidates})


class _Amend:
    """Attention over the keys between a match and the step, for the candidates of one band.

    A lag is the number of keys before the band that count, the newest first. So one running sum over these keys gives the
    result for every lag and every candidate. All terms are positive, so no digits cancel; float64 can hold scores that
    are 700 below the largest.
    """

    def __init__(self, layer: Layer, band: int, window: int, steps: int, rows: Tensor):
        kv_heads, tokens, _ = layer.key.shape
        self.rows, self.window, self.steps = rows, window, steps
        # The `window` keys before the band, for all steps; each step takes a slice, newest first.
        keys = slice(tokens - steps + 1 - band - window, tokens - band)
        query = layer.query[window:].to(layer.key.dtype).transpose(0, 1)
        score = query.unflatten(0, (kv_heads, -1)) @ layer.key[:, keys].transpose(1, 2)[:, None] * layer.scale
        self.score = score.flip(-1).double()  # [K, G, S, W + S - 1]
        self.value = layer.value[:, keys].flip(1).transpose(1, 2).double().contiguous()  # [K, D, W + S - 1]

    def run(self, i: int, lag: Tensor, into: Partial) -> None:
        """Step `i`: attention over the newest `lag` `[C, H]` keys; the result goes to the rows of `into`."""
        seen = slice(self.steps - 1 - i, self.steps - 1 - i + self.window)
        score = self.score[:, :, i, seen]
        largest = score.amax(-1, keepdim=True)
        weight = (score - largest).exp()
        value = (weight[:, :, None] * self.value[:, None, :, seen]).cumsum(-1).flatten(0, 1)  # [H, D, W]
        total = weight.cumsum(-1).clamp(min=torch.finfo(torch.float64).tiny)
        lse = (total.log() + largest).flatten(0, 1)  # [H, W]
        head = torch.arange(len(lse), device=lag.device)
        last = (lag[self.rows] - 1).clamp(max=self.window - 1)
        out = value[head, :, last] / total.flatten(0, 1)[head, last][..., None]
        into.out[self.rows], into.lse[self.rows] = out.to(into.out.dtype), lse[head, last].to(into.lse.dtype)


def tally(trace: Trace, tokens: int) -> dict[str, np.ndarray]:
    """Counts of one layer and prompt, which can be added up. First dimension: candidates.

    bins `[C, BINS]`: heads that hit by error. heads `[C, H]`: steps in which a head hit. matched `[C]`:
    heads with a match, in whatever group. error, lag, chain `[C]`: sums over heads that hit.
    longest `[C]`: longest chain. read, full `[C]`: KV tokens read, and those of full attention.
    steps `[C]`: heads times steps.
    """
    count, heads, steps = trace.error.shape
    kv_heads = trace.hit.shape[1]
    hit = trace.hit.repeat_interleave(heads // kv_heads, 1)
    # An error that is not finite counts as the largest.
    error = torch.nan_to_num(trace.error.double(), nan=torch.inf)
    edges = torch.as_tensor(EDGES, device=error.device)
    place = torch.bucketize(error, edges, right=True) + BINS * torch.arange(count, device=error.device)[:, None, None]
    bins = torch.bincount(place[hit], minlength=count * BINS).view(count, BINS)
    position = torch.arange(tokens - steps, tokens, device=error.device)
    lag = torch.where(hit, position - trace.source, 0)
    chain = trace.chain.to(torch.int64)
    full = kv_heads * int((position + 1).sum())
    over = lambda x: x.sum((1, 2))
    found = {
        "bins": bins, "heads": hit.sum(2), "matched": over(trace.source >= 0), "error": over(error), "lag": over(lag),
        "chain": over(chain), "longest": chain.amax((1, 2)), "read": trace.read,
        "full": torch.full((count,), full), "steps": torch.full((count,), heads * steps),
    }  # fmt: skip
    return {name: value.cpu().numpy() for name, value in found.items()}


def measure(layer: Layer, candidates: list[Candidate], steps: int, dtypes: tuple[torch.dtype, torch.dtype]) -> dict:
    """`tally` of all candidates, in batches whose state fits STATE_BYTES."""
    n, heads, d = layer.query.shape
    tokens, pre = layer.key.shape[1], layer.pre_query.to(layer.key.dtype)
    window = n - steps
    each = heads * (steps * (d * dtypes[1].itemsize + 40) + n * 12 + window * 32)
    if layer.project is not None:
        each += heads * steps * d * layer.key.dtype.itemsize
    room = max(1, STATE_BYTES // each)
    distance = distances(pre, narrow(pre, dtypes[0]).to(pre.dtype), steps)
    found: list[dict[str, np.ndarray]] = []
    known, parts = [], None
    for i in range(0, len(candidates), room):
        some = candidates[i : i + room]
        if parts is None or pairs_of(some) != known:
            known = pairs_of(some)
            parts = exact_parts(layer, known, steps)
        trace = simulate(layer, some, steps, dtypes, layer.project is not None, parts, distance)
        found.append(
            tally(trace, tokens) | (output_error(layer, trace, parts.exact) if layer.project is not None else {})
        )
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def output_error(layer: Layer, trace: Trace, exact: Tensor) -> dict[str, np.ndarray]:
    """Counts, `[C]`: output, the sum over steps of `|W_O (o - o*)|^2 / |r|^2` with the residual `r`; positions, the steps.

    exact: `[H, S, D]`, and the trace with its `out`.
    """
    if layer.residual is None or layer.project is None or trace.out is None:
        raise ValueError("the layer has no W_O and residual, or the trace no outputs")
    residual = layer.residual[-exact.shape[1] :].double()
    sums = []
    for out in trace.out:
        wrong = layer.project((out - exact).transpose(0, 1).flatten(1))  # [S, M]
        sums.append(((wrong.double() ** 2).sum(-1) / residual).sum().item())
    return {"output": np.array(sums), "positions": np.full(len(sums), exact.shape[1])}
