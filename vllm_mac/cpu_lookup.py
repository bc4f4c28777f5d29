"""Decoding by the index of keys on a CPU: the steps of one layer, in PyTorch, with their counters.

Knows `lookup` and plain values, not vLLM. `lookup_decoder` is the same on GPUs.
"""

import torch
from torch import Tensor

from vllm_mac import lookup, paged
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.key_index import PageLayout
from vllm_mac.state import Chunk, IndexRule, IndexState, Rows


def write(layer: IndexState, slots: Tensor | None, kv: Tensor, layout: PageLayout) -> None:
    """Index the pages of which `slots` `[n]` holds the last slot, after keys and values were written; without slots all."""
    if slots is None:
        return lookup.write_pages(kv, torch.arange(len(kv)), layout, layer.maps)
    last = slots[(slots >= 0) & (slots % layout.page == layout.page - 1)]
    lookup.write_pages(kv, last // layout.page, layout, layer.maps)


def prefill(chunk: Chunk, query: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Exact attention of one row's chunk. query: `[n, H, D]`, after RoPE. Returns the like."""
    token = torch.arange(chunk.start + len(query))
    return paged.causal(query, *paged.gather(kv, chunk.blocks, token), token, chunk.start, scale).to(query.dtype)


def decode(layer: IndexState, rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, rule: IndexRule) -> Tensor:
    """The tokens of each row. query: `[N, H, D]`, after RoPE. rows: as in `lookup.decode`. Returns `[N, H, D]`."""
    looked = lookup.decode(rows, query, kv, layout, layer.maps, rule)
    tokens = torch.ones_like(rows.position) if rows.begin is None else rows.begin.diff()
    heads = tokens * query.shape[1]
    exact, short = rows.ring == OPTED_OUT, rows.position + 1 < rule.min_context
    ready = bool(layer.maps.ready)
    able = heads[~exact & ~short].sum()
    for counter, number in (
        (Count.HIT, able * ready),
        (Count.NO_MAPS, able * (not ready)),
        (Count.SHORT_CONTEXT, heads[~exact & short].sum()),
        (Count.REQUEST, heads[exact].sum()),
        (Count.READ, looked.read.sum()),
        (Count.SKIPPED, ((rows.position + tokens)[:, None] - looked.read).clamp(min=0).sum()),
    ):
        layer.counts[counter] += number
    return looked.out.to(query.dtype)
