"""Batches whose keys are indexed, and what decoding by the index gives, written plainly in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from support.devices import DEVICE
from vllm_mac import lookup
from vllm_mac.counters import OPTED_OUT
from vllm_mac.key_index import FP8, Maps, Moments, PageLayout, Scales, directions, learn
from vllm_mac.state import Geometry, IndexRule, Rows


@dataclass
class Case:
    """A batch: `lengths` tokens per row (0: a padded row). opted_out: rows whose request wants exact decoding.
    sharp: factor of the queries, so of all logits. tokens: of each row, how many it decodes, its last ones; () for one each.
    parts: rows that follow one another and are of one request, which has pages once, see `Geometry.parts`. scales: of keys
    and values, for a cache in FP8; () for one in `dtype`."""

    lengths: tuple = (300, 40, 0, 700)
    kv_heads: int = 2
    group: int = 3
    d: int = 64
    n: int | None = None
    page: int = 16
    dtype: torch.dtype = torch.float32
    head_major: bool = True
    tolerance: float = 1.5
    sink: int = 16
    band: int = 64
    min_context: int = 128
    ready: bool = True
    opted_out: tuple = ()
    sharp: float = 1.5
    seed: int = 0
    tokens: tuple = ()
    parts: int = 1
    scales: tuple = ()

    @property
    def requests(self) -> list[int]:
        """Tokens of each."""
        return [max(self.lengths[row : row + self.parts]) for row in range(0, len(self.lengths), self.parts)]

    @property
    def kv_dtype(self) -> torch.dtype:
        return FP8 if self.scales else self.dtype


class Batch:
    """Inputs of a case. Free pages, free slots and what is not indexed yet are NaN."""

    def __init__(self, case: Case):
        c, draw = case, torch.Generator().manual_seed(case.seed)
        self.case, item, rows = case, case.kv_dtype.itemsize, len(case.lengths)
        self.layout = PageLayout(c.kv_heads, c.d, c.page, c.n or directions(c.d), item)
        self.rule = IndexRule(c.tolerance, c.band, c.sink, c.min_context, c.d**-0.5)
        used = [-(-n // c.page) for n in c.requests]
        blocks = sum(used) + 2
        raw = torch.full((blocks, self.layout.padded_bytes // item), math.nan).to(c.kv_dtype)
        order = torch.randperm(blocks - 1, generator=draw) + 1  # block 0 is never used
        table = torch.zeros(len(used), max(max(used), 1), dtype=torch.int32)
        for row, count in enumerate(used):
            table[row, :count], order = order[:count].int(), order[count:]
        self.kv = self.pages(raw.to(DEVICE))
        # A few directions matter more, and keys lie around a mean, as those of models do.
        turn = torch.randn(c.d, c.d, generator=draw) * torch.linspace(2, 0.1, c.d) * 2 / math.sqrt(c.d)
        keys = []
        for row, n in enumerate(c.requests):
            for i in range(used[row]):
                count = min(c.page, n - i * c.page)
                x = torch.randn(c.kv_heads, count, 2 * c.d, generator=draw)
                x[..., : c.d] = x[..., : c.d] @ turn + 1
                self.kv[table[row, i], :, :count] = self.held(x).to(DEVICE)
                keys.append(x[..., : c.d])
        heads, counts = c.kv_heads * c.group, c.tokens or (1,) * rows
        self.first = torch.tensor((0, *counts)).cumsum(0).tolist()  # of each row's queries
        self.query = (torch.randn(sum(counts), heads, c.d, generator=draw) * c.sharp).to(c.dtype).to(DEVICE)
        self.maps = Maps.allocate(c.kv_heads, c.d, self.layout.directions, c.dtype, DEVICE, scales_of(c))
        if c.ready:
            assert learn([self.maps], [Moments.of(self.query, torch.cat(keys, 1).to(DEVICE))], making=True) == [True]
        self.table = table.to(DEVICE)
        self.position = torch.tensor(
            [n - max(count, 1) for n, count in zip(c.lengths, counts, strict=True)], dtype=torch.int32, device=DEVICE
        )
        self.exact = torch.tensor([row in c.opted_out for row in range(rows)], device=DEVICE)
        self.complete = [int(table[row, i]) for row, n in enumerate(c.requests) for i in range(n // c.page)]

    def pages(self, raw: Tensor) -> Tensor:
        """The cache `[blocks, K, P, 2 D]` in memory of `[blocks, *]`, as the case lays it out."""
        c, body = self.case, raw[:, : self.layout.kv_bytes // raw.itemsize]
        if c.head_major:
            return body.unflatten(1, (c.kv_heads, c.page, 2 * c.d))
        return body.unflatten(1, (c.page, c.kv_heads, 2 * c.d)).transpose(1, 2)

    def held(self, x: Tensor) -> Tensor:
        """Keys and values `[..., 2 D]` as the cache holds them."""
        if not self.case.scales:
            return x.to(self.case.dtype)
        scale = torch.tensor(self.case.scales).repeat_interleave(self.case.d)
        return (x.to(self.case.dtype).float() / scale).clamp(-448, 448).to(FP8)

    def write(self) -> "Batch":
        """Index the complete pages."""
        lookup.write_pages(self.kv, torch.tensor(self.complete, dtype=torch.int64), self.layout, self.maps)
        return self

    def geometry(self, **changes) -> Geometry:
        c = self.case
        keys = {
            "max_rows": len(c.requests), "heads": c.group * c.kv_heads, "kv_heads": c.kv_heads, "head_size": c.d,
            "page_size": c.page, "max_blocks": self.table.shape[1], "dtype": c.dtype, "band": c.band, "sink": c.sink,
            "scale": self.rule.scale, "fp8": bool(c.scales),
        }  # fmt: skip
        return Geometry(**keys | changes)

    def rows(self) -> Rows:
        ring = torch.where(self.exact, OPTED_OUT, -1).int()
        begin = torch.tensor(self.first, dtype=torch.int32, device=DEVICE) if self.case.tokens else None
        return Rows(self.position, ring, self.position, self.position, self.table, begin)

    def decode(self) -> lookup.Looked:
        """What `lookup.decode` gives."""
        return lookup.decode(self.rows(), self.query, self.kv, self.layout, self.maps, self.rule)

    def row(self, row: int) -> "Row":
        return Row(self, row)


def scales_of(case: Case) -> Scales | None:
    """What maps know of the case's cache: scales that float32 rounds."""
    return Scales(*(torch.tensor(scale, device=DEVICE) for scale in case.scales)) if case.scales else None


class Row:
    """One row of a batch, in float64 on the CPU. Letters as in `vllm_mac.lookup`; `C` columns: the heads of a group for its
    first token, then for the next.

    n: its tokens, those that it decodes included. own: `[C, 1]`, tokens up to each column's own. begin, end: its indexed
    tokens; equal where it is read whole. logit: `[K, C, n]`, -inf for later tokens. estimate: `[K, C, end - begin]`.
    share: the like, of the estimated attention. direction: `[K, C, N]`, what the codes are multiplied with.
    """

    def __init__(self, batch: Batch, row: int):
        c, layout = batch.case, batch.layout
        queries = batch.query[batch.first[row] : batch.first[row + 1]].cpu().double()
        self.batch, self.tokens, first = batch, len(queries), int(batch.position[row]) + 1
        self.n = n = first + self.tokens - 1
        table = batch.table[row // c.parts].cpu()
        scale, blocks, token = c.d**-0.5, table.tolist(), torch.arange(n)
        page, slot = table.long()[token // c.page], token % c.page
        self.begin = self.end = math.ceil(c.sink / 64) * 64
        if c.ready and first >= c.min_context and row not in c.opted_out:
            self.end = max((first - c.band) // 64 * 64, self.begin)
        codes, means = (x.cpu() for x in layout.views(batch.kv))
        kv = batch.kv.cpu()[page, :, slot].transpose(0, 1).double()
        key_scale, value_scale = c.scales or (1.0, 1.0)
        self.key, self.value = kv[..., : c.d] * key_scale, kv[..., c.d :] * value_scale
        self.query = queries.unflatten(1, (c.kv_heads, c.group)).permute(1, 0, 2, 3).flatten(1, 2)  # [K, C, D]
        self.own = (first + torch.arange(self.tokens)).repeat_interleave(c.group)[:, None]
        self.logit = torch.einsum("kgd,ktd->kgt", self.query, self.key) * scale
        self.logit.masked_fill_(token >= self.own, -math.inf)
        self.mean = means[blocks[: n // c.page]].transpose(0, 1).double() * value_scale  # [K, pages, D]
        maps = [x.cpu().double() for x in (batch.maps.to_query, batch.maps.mean)]
        direction = torch.einsum("kgd,kdn->kgn", self.query, maps[0])
        self.estimate = self.logit[..., :0]
        if self.end > self.begin:
            packed = codes[page[self.begin : self.end], :, slot[self.begin : self.end]].transpose(0, 1)
            self.code = torch.cat((packed % 16, packed // 16), -1).double() - 7.5  # [K, T, N]
            self.direction, self.constant = direction, torch.einsum("kgd,kd->kg", self.query, maps[1])[..., None]
            self.estimate = self.estimated(direction)
        self.share = self.shares(self.estimate)

    def shares(self, estimate: Tensor) -> Tensor:
        """Each indexed token's share of the attention, by these estimated logits."""
        peak = self.logit.amax(-1, keepdim=True)
        near = torch.cat((self.logit[..., : self.begin], self.logit[..., self.end :]), -1)
        sampled = [t - self.begin for t in range(self.begin, self.end) if t // 128 % 8 == 0]
        total = (near - peak).exp().sum(-1, keepdim=True)
        if sampled:
            total += (estimate[..., sampled] - peak).exp().mean(-1, keepdim=True) * (self.end - self.begin)
        return (estimate - peak).exp() / total

    def estimated(self, direction: Tensor) -> Tensor:
        """Logits `[K, C, end - begin]` by the codes."""
        return (torch.einsum("kgn,ktn->kgt", direction, self.code) + self.constant) * self.batch.case.d**-0.5

    @property
    def chosen(self) -> Tensor:
        """`[K, n]` bool, the tokens that are read."""
        chosen = torch.ones(len(self.key), self.n, dtype=torch.bool)
        chosen[:, self.begin : self.end] = (self.share >= self.batch.case.tolerance / self.own).any(1)
        return chosen

    @property
    def index_tokens(self) -> int:
        """As how many tokens of one KV head reading the index counts."""
        return (self.end - self.begin) * self.batch.layout.index_bytes // self.batch.layout.kv_bytes

    def attention(self, chosen: Tensor, estimate: Tensor | None = None, size: bool = False) -> Tensor:
        """The output `[T, H, D]` float64 of its `T` tokens where these tokens `[K, n]` are read.

        estimate: in place of the row's own. size: of the absolute values instead of the values.
        """
        page, out = self.batch.case.page, torch.zeros_like(self.query)
        value, mean = (self.value.abs(), self.mean.abs()) if size else (self.value, self.mean)
        estimate = self.estimate if estimate is None else estimate
        peak = self.logit.amax(-1, keepdim=True)
        weight = torch.where(chosen[:, None], (self.logit - peak).exp(), 0)
        total = weight.sum(-1, keepdim=True)
        out += weight @ value
        left = torch.where(chosen[:, None, self.begin : self.end], 0, (estimate - peak).exp())
        for first in range(self.begin, self.end, page):
            weight = left[..., first - self.begin : first + page - self.begin].sum(-1, keepdim=True)
            total += weight
            out += weight * mean[:, first // page, None]
        return (out / total).unflatten(1, (self.tokens, -1)).permute(1, 0, 2, 3).flatten(1, 2)
