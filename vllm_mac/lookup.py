"""Decoding by the index of keys, over paged KV, in PyTorch: what CPUs run, and the oracle of the GPU kernels.

For a query at position `m` of a row, with the `n = m + 1` tokens `[0, n)`:

1. *Match.* The first and the last tokens are near: `[0, sink)` and `[m + 1 - band, m + 1)`, both widened to whole tiles of
   `TILE` tokens. Of the others the index estimates the logits `s`. The near tokens' exact logits and the estimates of a
   sample of the others give `Z`, about the sum of all `e^logit`. A token is chosen where `e^s / Z >= tolerance / n` in any
   head of the KV group: where its share of the attention is `tolerance` times an average token's. The sample, every
   `SAMPLE`-th span of `SPAN` tokens, costs little. Where it misses much of the attention `Z` is too small, and more is read.
2. *Amend.* The near and the chosen tokens are attended to exactly.
3. *Complete.* What is left of each page weighs the sum of its `e^s`, and has the page's mean value.

Nothing is carried from one query to another, so no error adds up. A row is exact while it has fewer than `min_context`
tokens, before maps are ready, where its request asked for it, and on GPUs in a step that has too little to read.

A row that verifies speculated tokens decodes several at once, and reads its KV once for all of them. The first one's
`n` decides whether the row is looked up, and which tokens are near: what comes after the indexed ones, of which each
token attends to those up to itself. Each token has its own `n` and `Z`. What any head chooses for any of the tokens,
all attend to, so a token may attend to more than it would alone, never to less.

Letters as in `key_index` and `paged`; arithmetic is float32, LSE natural log.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_mac.counters import OPTED_OUT
from vllm_mac.key_index import Maps, PageLayout, encode, estimate
from vllm_mac.paged import gather
from vllm_mac.state import IndexRule, Rows

TILE, SPAN = 64, 128  # tokens; every page size of GPUs divides both. Spans are the kernels' units of work, of
# which a thread has 32 tokens
SAMPLE = 8  # one span of so many is in the sample


class Looked(NamedTuple):
    """One decode step of a batch.

    out: `[N, H, D]` float32. read: `[B, K]` int64, KV tokens read, the index among them. looked: `[B]` bool, whether the row was
    looked up rather than read whole.
    """

    out: Tensor
    read: Tensor
    looked: Tensor


def near_edges(n: int, rule: IndexRule, page: int = TILE) -> tuple[int, int]:
    """`(begin, end)` of the indexed tokens of a row of `n`, in tokens; equal where all are near."""
    tile = max(TILE, page)
    begin = -(-rule.sink // tile) * tile
    end = max((n - rule.band) // tile * tile, begin)
    return begin, end


def write_pages(kv: Tensor, pages: Tensor, layout: PageLayout, maps: Maps) -> None:
    """Index the pages `[n]`, whose tokens are all written."""
    codes, means = layout.views(kv)
    for page in pages.tolist():
        key, value = kv[page].chunk(2, -1)
        code, mean = encode(key, value, maps)
        codes[page], means[page] = code, mean.to(means.dtype)


def decode(rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule) -> Looked:
    """Decode the tokens of each row.

    rows: position, ring (`OPTED_OUT` or less for a row that is read whole), block_table and begin are read. query: `[N, H, D]`
    after RoPE. kv: `[blocks, K, P, 2 D]`.
    """
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    count = len(rows.position)
    parts = max(count // max(len(rows.block_table), 1), 1)  # rows that have their pages in common
    read = torch.zeros(count, layout.kv_heads, dtype=torch.int64, device=query.device)
    looked = torch.zeros(count, dtype=torch.bool, device=query.device)
    codes, means = layout.views(kv)
    first = list(range(count + 1)) if rows.begin is None else rows.begin.tolist()
    for row, m in enumerate(rows.position.tolist()):
        queries = query[first[row] : first[row + 1]].float()
        if m < 0 or not len(queries):
            continue
        # The heads of a group are those of its first token, then those of the next.
        grouped = queries.unflatten(1, (layout.kv_heads, -1)).transpose(0, 1).flatten(1, 2)  # [K, T G, D]
        own = m + 1 + torch.arange(len(queries), device=kv.device).repeat_interleave(grouped.shape[1] // len(queries))
        n, last = m + 1, m + len(queries)
        begin, end = near_edges(n, rule, layout.page)
        if rows.ring[row] <= OPTED_OUT or n < rule.min_context or not maps.ready.item():
            end = begin
        looked[row] = end > begin
        blocks = rows.block_table[row // parts].long()
        key, value = gather(kv, blocks, torch.arange(last, device=kv.device))
        key, value = maps.keys(key), maps.values(value)
        logit = grouped @ key.transpose(1, 2) * rule.scale  # [K, T G, last]
        logit.masked_fill_(torch.arange(last, device=kv.device) >= own[:, None], -torch.inf)
        chosen = torch.ones(layout.kv_heads, last, dtype=torch.bool, device=kv.device)
        left = logit.new_zeros(*logit.shape[:2], 0)
        if end > begin:
            pages = blocks[begin // layout.page : end // layout.page]
            code = codes[pages].transpose(0, 1).flatten(1, 2)
            s = estimate(grouped, code, maps) * rule.scale
            token = torch.arange(begin, end, device=kv.device)
            some = s[..., token // SPAN % SAMPLE == 0]
            if some.shape[-1]:
                some = some + math.log((end - begin) / some.shape[-1])
            total = torch.logsumexp(torch.cat((logit[..., :begin], some, logit[..., end:]), -1), -1, keepdim=True)
            share = (s - total).exp()
            chosen[:, begin:end] = (share >= rule.tolerance / own[:, None]).any(1)
            left = torch.where(chosen[:, None, begin:end], -torch.inf, s)
        seen = logit.masked_fill(~chosen[:, None], -torch.inf)
        weight = torch.softmax(torch.cat((seen, left), -1), -1)
        result = weight[..., :last] @ value
        if end > begin:
            of_page = weight[..., last:].unflatten(-1, (-1, layout.page)).sum(-1)  # [K, T G, pages]
            result += of_page @ maps.values(means[pages]).transpose(0, 1)
        # The index counts as the tokens that have as many bytes.
        index = (end - begin) * layout.index_bytes // layout.kv_bytes
        out[first[row] : first[row + 1]] = result.unflatten(1, (len(queries), -1)).transpose(0, 1).flatten(1, 2)
        read[row] = chosen.sum(-1) + index
    return Looked(out, read, looked)
