"""MAC-Attention over paged KV for a whole batch, in PyTorch: what CPUs run, and an oracle of the GPU kernels.

The same method as `reference`, head for head, on vLLM's block tables. Arithmetic is float32
whatever the KV cache and the rings are stored in.

Letters: `B` rows, `H` query heads, `K` KV heads, `G = H / K`, `D` head size, `W` window,
`T` KV tokens gathered for a row. Positions are 0-based, intervals half-open, LSE natural log.

kv: `[blocks, K, block_size, 2 D]`, any strides; keys are `[..., :D]`, values `[..., D:]`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_mac.config import MacConfig
from vllm_mac.limits import limit, relief
from vllm_mac.reference import Partial, merge, split
from vllm_mac.ring import narrow
from vllm_mac.state import Chunk, RingStore, Rows

# Scores of one block of queries are held at once; this many keeps them within some 64 MB.
SCORES_AT_ONCE = 1 << 24


class Decoded(NamedTuple):
    """One decode step of a batch.

    out: `[B, H, D]` float32. hit: `[B, K]` bool. source: `[B, H]` int64, position matched by
    each head or -1. read: `[B, K]` int64, KV tokens read for each KV head.
    """

    out: Tensor
    hit: Tensor
    source: Tensor
    read: Tensor


def gather(kv: Tensor, blocks: Tensor, token: Tensor, heads: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values `[K, T, D]` (float32) at the positions `token` `[T]` of one row.

    blocks: the row's block table. heads: KV heads to gather, all by default.
    """
    if heads is None:
        heads = torch.arange(kv.shape[1], device=kv.device)
    block = blocks[token // kv.shape[2]].to(torch.int64)
    rows = kv[block, heads[:, None], token % kv.shape[2]]
    return rows.float().chunk(2, dim=-1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, token: Tensor, start: Tensor, stop: Tensor, scale: float
) -> Partial:
    """Partial attention of many queries, each over its own interval.

    query: `[K, n, D]`; key and value: `[K, T, D]`, the KV of the positions `token` `[T]`.
    start, stop: positions that broadcast to `[K, n]`; a query sees the tokens of
    `[start, stop)`. Returns out `[K, n, D]` and lse `[K, n]`.
    """
    hidden = (token < start[..., None]) | (token >= stop[..., None])
    score = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scale)
    score = score.masked_fill_(hidden, -torch.inf)
    lse = torch.logsumexp(score, -1)
    # An empty interval has lse -inf; subtracting 0 there keeps its weights at 0.
    weight = torch.exp(score - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return Partial(weight @ value, lse)


def match(rows: Rows, pre_query: Tensor, store: RingStore, config: MacConfig, rest_lse: Tensor) -> Tensor:
    """`[B, H]` position whose summary each head may reuse, or -1 (`reference.match`).

    rows: integers are int64. pre_query: `[B, H, D]` float32. rest_lse: `[B, H]`, over band and sink.
    """
    position, ring, first = rows.position, rows.ring, rows.first
    window, d = config.window, pre_query.shape[-1]
    index = torch.clamp(ring, min=0)
    distance = ((pre_query[:, :, None] - store.query[index].float()) ** 2).sum(-1)
    slot = torch.arange(window, device=ring.device)
    # The latest position before `position` that falls into each slot.
    p = position[:, None] - 1 - (position[:, None] - 1 - slot) % window
    usable = (ring[:, None] >= 0) & (p >= first[:, None]) & (p + 1 - config.band > config.sink)
    usable &= position[:, None] + 1 >= config.min_context
    size = (pre_query**2).sum(-1, keepdim=True) if config.distance == "relative" else float(d)
    bound = limit(size, config, rows.slack[:, None, None])
    usable = usable[:, None] & (distance < bound * relief(0.0, config))
    if config.max_chain is not None:
        usable &= store.chain[index] < config.max_chain
    age = torch.where(distance < bound, (position[:, None] - p).float()[:, None] / window, 1.0)
    score = torch.where(usable, distance + config.lag_weight * age * bound, torch.inf)
    best = score.amin(-1, keepdim=True)
    source = torch.where(usable & (score == best), p[:, None], -1).amax(-1)  # the later of equals
    at = (torch.clamp(source, min=0) % window)[..., None]
    lse = torch.gather(store.lse[index], -1, at)
    allowed = bound * relief(torch.sigmoid(lse - rest_lse[..., None]), config)
    accepted = torch.gather(distance, -1, at) < allowed
    return torch.where(accepted[..., 0], source, -1)


def decode(
    rows: Rows, query: Tensor, pre_query: Tensor, kv: Tensor, store: RingStore, config: MacConfig, scale: float
) -> Decoded:
    """Decode one token of each row and record it in the row's ring, where it has one.

    rows: integers are int64. query and pre_query: `[B, H, D]`, after and before RoPE. Rows without a ring are exact.
    """
    count, heads, d = query.shape
    position, ring = rows.position, rows.ring
    kv_heads = kv.shape[1]
    query, pre_query = query.float(), pre_query.float()
    grouped = query.view(count, kv_heads, -1, d)
    empty = torch.full_like(grouped[..., 0], -torch.inf)
    prefix = Partial(torch.zeros_like(grouped), empty)
    rest = band_and_sink(position, query, kv, rows.block_table, config, scale)
    source = match(rows, pre_query, store, config, rest.lse)
    hit = (source >= 0).view(count, kv_heads, -1).all(-1)

    reused = source.view(count, kv_heads, -1)
    read = torch.zeros_like(hit, dtype=torch.int64)
    for b, m in enumerate(position.tolist()):
        sink_end, band_start = split(m, config)
        for reuse in (True, False):
            some = (hit[b] == reuse).nonzero()[:, 0]
            if not len(some):
                continue
            # Where the keys that the prefix part must still read begin, for each head.
            begin = reused[b, some] + 1 - config.band if reuse else torch.full_like(reused[b, some], sink_end)
            read[b, some] = m + 1 - begin.amin(-1) + sink_end
            token = torch.arange(int(begin.amin()), band_start)
            if not len(token):
                continue
            key, value = gather(kv, rows.block_table[b], token, some)
            stop = begin.new_tensor(band_start)
            prefix.out[b, some], prefix.lse[b, some] = attend(grouped[b, some], key, value, token, begin, stop, scale)

    by_head = lambda x: Partial(x.out.view(count, heads, d), x.lse.view(count, heads))
    head_hit = hit.repeat_interleave(heads // kv_heads, 1)
    index, head = torch.clamp(ring, min=0)[:, None], torch.arange(heads, device=query.device)
    slot = torch.clamp(source, min=0) % config.window
    found = Partial(store.out[index, head, slot].float(), store.lse[index, head, slot])
    # Rings hold uninitialised memory: select, do not multiply.
    found = Partial(torch.where(head_hit[..., None], found.out, 0.0), torch.where(head_hit, found.lse, -torch.inf))
    summary = merge(by_head(prefix), found)
    out = merge(summary, rest).out

    chain = torch.where(head_hit, store.chain[index, head, slot] + 1, 0)
    kept = pre_query
    if config.reuse == "anchored":
        kept = torch.where(head_hit[..., None], store.query[index, head, slot].float(), pre_query)
    _record(store, ring, position, kept, summary, chain, config.window)
    return Decoded(out, hit, source, read)


def band_and_sink(
    position: Tensor, query: Tensor, kv: Tensor, block_table: Tensor, config: MacConfig, scale: float
) -> Partial:
    """Attention of each row's query over what every step reads: out `[B, H, D]`, lse `[B, H]`.

    position, query, block_table: as for `decode`.
    """
    rows, heads, d = query.shape
    grouped = query.float().view(rows, kv.shape[1], -1, d)
    rest = Partial(torch.zeros_like(grouped), torch.full_like(grouped[..., 0], -torch.inf))
    for b, m in enumerate(position.tolist()):
        sink_end, band_start = split(m, config)
        token = torch.arange(m + 1, device=query.device)
        token = torch.cat((token[:sink_end], token[band_start:]))
        key, value = gather(kv, block_table[b], token)
        zero, stop = token.new_tensor(0), token.new_tensor(m + 1)
        rest.out[b], rest.lse[b] = attend(grouped[b], key, value, token, zero, stop, scale)
    return Partial(rest.out.view(rows, heads, d), rest.lse.view(rows, heads))


def exact(position: Tensor, query: Tensor, kv: Tensor, block_table: Tensor, wanted: Tensor, scale: float) -> Tensor:
    """Full attention of the KV groups `wanted` `[B, K]`, `[B, H, D]` float32; 0 for the others.

    position, query, block_table: as for `decode`.
    """
    rows, kv_heads = wanted.shape
    grouped = query.float().view(rows, kv_heads, -1, query.shape[2])
    out = torch.zeros_like(grouped)
    for b, m in enumerate(position.tolist()):
        some = wanted[b].nonzero()[:, 0]
        token = torch.arange(m + 1, device=query.device)
        zero, end = token.new_tensor(0), token.new_tensor(m + 1)
        key, value = gather(kv, block_table[b], token, some)
        out[b, some] = attend(grouped[b, some], key, value, token, zero, end, scale).out
    return out.view_as(query)


def prefill(
    chunk: Chunk,
    query: Tensor,
    pre_query: Tensor | None,
    kv: Tensor,
    store: RingStore,
    config: MacConfig,
    scale: float,
) -> Tensor:
    """Exact causal attention of one row's chunk; records its last `window` positions.

    query `[n, H, D]`; pre_query `[n, H, D]`, or None where the chunk has no ring. Returns `[n, H, D]` float32.
    """
    n, start = len(query), chunk.start
    token = torch.arange(start + n)
    position = token[start:]
    keys = *gather(kv, chunk.blocks, token), token
    out = causal(query, *keys, start, scale)
    if chunk.ring >= 0:
        kept = slice(max(n - config.window, 0), n)
        position = position[kept]
        sink_end = torch.clamp(position + 1, max=config.sink)
        band_start = torch.maximum(position + 1 - config.band, sink_end)
        summary = _attend_heads(query[kept], *keys, sink_end, band_start, scale)
        chain = torch.zeros(summary.lse.shape, dtype=torch.int32)
        rings = torch.full_like(position, chunk.ring)
        _record(store, rings, position, pre_query[kept], summary, chain, config.window)
    return out


def causal(query, key, value, token, start: int, scale: float) -> Tensor:
    """Causal attention of queries `[n, H, D]` from position `start` on, `[n, H, D]` float32, by PyTorch's own kernel."""
    n, heads, _ = query.shape
    key, value = (x.repeat_interleave(heads // len(x), 0) for x in (key, value))
    block = max(1, SCORES_AT_ONCE // (heads * len(token)))
    out = []
    for i in range(0, n, block):
        q = query[i : i + block].float().transpose(0, 1)
        seen = start + min(i + block, n)  # later keys are hidden from the whole block
        visible = token[:seen] <= token[start + i : seen, None]
        out.append(F.scaled_dot_product_attention(q, key[:, :seen], value[:, :seen], attn_mask=visible, scale=scale))
    return torch.cat(out, 1).transpose(0, 1)


def _attend_heads(query, key, value, token, start, stop, scale: float) -> Partial:
    """`attend` for queries `[n, H, D]` and intervals `[n]`, in blocks of bounded memory."""
    n, heads, d = query.shape
    kv_heads = len(key)
    block = max(1, SCORES_AT_ONCE // (heads * len(token)))
    parts = []
    for i in range(0, n, block):
        j = min(i + block, n)
        seen = slice(0, int(stop[i:j].max()))  # later keys are hidden from the whole block
        q = query[i:j].float().view(j - i, kv_heads, -1, d).transpose(0, 1)
        group = q.shape[2]
        low, high = start[i:j].repeat_interleave(group), stop[i:j].repeat_interleave(group)
        part = attend(q.reshape(kv_heads, -1, d), key[:, seen], value[:, seen], token[seen], low, high, scale)
        parts.append(
            Partial(
                part.out.view(kv_heads, j - i, group, d).transpose(0, 1).reshape(j - i, heads, d),
                part.lse.view(kv_heads, j - i, group).transpose(0, 1).reshape(j - i, heads),
            )
        )
    return Partial(*map(torch.cat, zip(*parts)))


def _record(
    store: RingStore, ring: Tensor, position: Tensor, query: Tensor, summary: Partial, chain: Tensor, window: int
) -> None:
    """Write one entry per row with a ring; query and summary.out `[B, H, D]`, chain `[B, H]`."""
    rows = (ring >= 0).nonzero()[:, 0]
    r, slot = ring[rows], position[rows] % window
    store.query[r, :, slot] = narrow(query[rows], store.query.dtype)
    store.out[r, :, slot] = summary.out[rows].to(store.out.dtype)
    store.lse[r, :, slot] = summary.lse[rows]
    store.chain[r, :, slot] = chain[rows].to(store.chain.dtype)
