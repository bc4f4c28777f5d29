"""Decoding with MAC on a CPU: the steps of one layer, in PyTorch, with their counters and audits.

Knows `paged` and plain values, not vLLM. `decoder` is the same on GPUs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_mac import audit, paged
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.state import Chunk, LayerState, Rows


def prefill(layer: LayerState, chunk: Chunk, query: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Exact attention of one row's chunk, which its ring records. query: `[n, H, D]`, after RoPE. Returns the like."""
    position = torch.arange(chunk.start, chunk.start + len(query))
    pre_query = layer.rotary.undo(query, position) if chunk.ring >= 0 else None
    return paged.prefill(chunk, query, pre_query, kv, layer.store, layer.config, scale).to(query.dtype)


def decode(layer: LayerState, rows: Rows, audited: Tensor, query: Tensor, kv: Tensor, scale: float) -> Tensor:
    """One token of each row. query: `[B, H, D]`, after RoPE. audited: `[B]` bool. Returns `[B, H, D]`.

    rows: integers are int64.
    """
    pre_query = layer.rotary.undo(query, rows.position)
    paused = layer.paused is not None and bool(layer.paused)
    # A layer over its budget records, but may read nothing of what it recorded.
    read = replace(rows, first=rows.position) if paused else rows
    decoded = paged.decode(read, query, pre_query, kv, layer.store, layer.config, scale)
    out = decoded.out.to(query.dtype)
    count(layer, rows, decoded, paused)
    if audited.any():
        wanted = decoded.hit & audited[:, None]
        exact = paged.exact(rows.position, query, kv, rows.block_table, wanted, scale)
        own = replace(rows, position=torch.where(audited, rows.position, -1))
        audit.tally(layer, own, decoded, out, exact, audit.edges(out.device))
    return out


def count(layer: LayerState, rows: Rows, decoded: paged.Decoded, paused: bool) -> None:
    """Add a step to the layer's counters, as `kernels.hit` does."""
    length = rows.position + 1
    heads, kv_heads = decoded.source.shape[1], decoded.hit.shape[1]
    opted_out = rows.ring == OPTED_OUT
    short = ~opted_out & (length < layer.config.min_context)
    absent = ~opted_out & ~short & (rows.ring < 0)
    hits = decoded.hit.sum(1) * (heads // kv_heads)
    able = ~opted_out & ~short & ~absent
    over, tried = able & paused, able & (not paused)
    read = decoded.read.sum()
    for counter, number in (
        (Count.HIT, hits.sum()),
        (Count.MISS, (heads - hits)[tried].sum()),
        (Count.SHORT_CONTEXT, short.sum() * heads),
        (Count.NO_RING, absent.sum() * heads),
        (Count.OVER_BUDGET, over.sum() * heads),
        (Count.REQUEST, opted_out.sum() * heads),
        (Count.READ, read),
        (Count.SKIPPED, length.sum() * kv_heads - read),
    ):
        layer.counts[counter] += number
