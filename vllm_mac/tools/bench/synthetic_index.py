"""A synthetic decode step of `rule: index`: keys and queries by which a few tokens of each row matter.

Keys spread out less and less from one direction to the next, as those of models do, and queries alike in all. Each
head's logits are normal; how far they reach decides how many tokens weigh more than `WEIGHTY` times the average one.

Letters: `B` rows, `H` query heads, `K` KV heads, `D` head size, `N` directions of the index.
"""

import math
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_mac import key_index, lookup
from vllm_mac.capabilities import refused_index_size
from vllm_mac.config import MacConfig
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.key_index import Maps
from vllm_mac.state import Geometry, IndexRule, Rows
from vllm_mac.tools.bench import BenchError
from vllm_mac.tools.bench.synthetic_step import DecodeStep, Shape, compare

if TYPE_CHECKING:
    from vllm_mac.kernels.lookup_work import LookupWork

# About what a group's heads chose of 30,000 tokens of a real model, at the default tolerance.
CHOSEN, WEIGHTY = 0.13, 0.7
SHARPEST = 8.0  # of logits, a standard deviation; short rows reach it
LAST_SPREAD = 0.02  # of keys in the last direction, as a share of the first one's
STAGES = ("weigh", "look", "merge")  # the kernels of a step, in order


@dataclass(slots=True)
class IndexLayer:
    """query, out: `[B, H, D]`. kv: `[blocks, K, page, 2 D]` with its index, made by `maps`. counts: added to."""

    query: Tensor
    kv: Tensor
    maps: Maps
    out: Tensor
    counts: Tensor


@dataclass(slots=True)
class IndexStep(DecodeStep):
    """A step of `rule: index`; its layers are `IndexLayer`s. work: of all layers."""

    rule: IndexRule
    work: "LookupWork"

    def read_whole(self, whole: bool) -> None:
        """Have the rows read whole, as if their requests had asked for it, or looked up."""
        self.ring.fill_(OPTED_OUT if whole else -1)

    def decode(self, layer: IndexLayer, stages: int = len(STAGES)) -> None:
        """Launch the first `stages` kernels of a layer's step."""
        from vllm_mac.kernels.lookup import launches

        layout, result = self.shape.page_layout, (layer.out, layer.counts)
        step = launches(self.rows(), layer.query, layer.kv, layout, layer.maps, self.rule, self.work, result)
        for _ in islice(step, stages):
            pass

    def rows(self) -> Rows:
        """What the rows do, one token each."""
        return Rows(self.position, self.ring, self.position, self.position, self.block_table)

    @property
    def looked_up(self) -> bool:
        """Whether the rows are looked up rather than read whole."""
        return self.shape.context >= self.rule.min_context and int(self.ring[0]) != OPTED_OUT


def check_options(config: MacConfig, head_size: int, page: int) -> None:
    """Raises BenchError where keys or pages of this size have no index."""
    if page not in (16, 32, 64):
        raise BenchError(f"page: {page}, choose 16, 32 or 64 with rule: index")
    if reason := refused_index_size(config.index_size, head_size):
        raise BenchError(reason)


def sharpness(group: int, context: int) -> float:
    """The standard deviation of logits with which half of `CHOSEN` to all of it weighs enough in a head of the group.

    With a deviation of `d` a token `z` deviations above the mean weighs `e^(d z)`. The average is over the `z` that are
    found among as many tokens as the rule samples; the few that lie farther out would weigh most, taken together.
    """
    normal = NormalDist()
    wanted = normal.inv_cdf((1 - CHOSEN) ** (1 / group))  # a head's tokens above it are chosen
    top = normal.inv_cdf(1 - lookup.SAMPLE / max(context, 2 * lookup.SAMPLE))
    low, high = 1.0, SHARPEST
    for _ in range(40):
        d = (low + high) / 2
        average = d * d / 2 + math.log(max(normal.cdf(top - d), 1e-300))  # its logarithm
        low, high = (d, high) if (math.log(WEIGHTY) + average) / d < wanted else (low, d)
    return low


def make_index_step(shape: Shape, config: MacConfig, pool: Tensor, layers: int, seed: int) -> IndexStep:
    """Layers whose KV caches lie one after the other in `pool` (flat), which is filled anew.

    Each layer has its own queries. KV caches, and the maps that index them, repeat where the pool holds fewer than
    `layers`. Maps are learned from the first row, with other queries than those that are decoded.
    """
    from vllm_mac.kernels.encode import encode
    from vllm_mac.kernels.lookup_work import LookupWork

    device, layout = pool.device, shape.page_layout
    draw = torch.Generator(device).manual_seed(seed)
    rows, blocks, each = shape.batch, shape.cache_shape[0], shape.cache_elements
    pages = torch.randperm(rows * shape.row_pages, generator=draw, device=device) + 1
    table = pages.view(rows, -1).to(torch.int32)
    sharp = sharpness(shape.heads // shape.kv_heads, shape.context)
    spread = torch.linspace(1, LAST_SPREAD, shape.head_size, device=device)

    def queries(count: int) -> Tensor:
        query = torch.randn(count, shape.heads, shape.head_size, generator=draw, device=device)
        return (query * sharp / (query * spread).square().mean(-1, keepdim=True).sqrt()).to(shape.dtype)

    caches = []
    for i in range(min(layers, len(pool) // each)):
        cache = pool[i * each : (i + 1) * each]
        for part in cache.split(1 << 28):
            part.normal_(generator=draw)
        kv = cache.view(blocks, -1)[:, : layout.kv_bytes // shape.dtype.itemsize]
        kv = kv.unflatten(1, shape.cache_shape[1:]).transpose(1, 2)
        kv[..., : shape.head_size].mul_(spread.to(shape.dtype))
        maps = Maps.allocate(shape.kv_heads, shape.head_size, shape.directions, shape.dtype, device)
        keys = key_index.sampled_keys(table[0], shape.context, kv.shape[2])
        moments = key_index.moments_of(maps, queries(key_index.LAST), kv, keys)
        key_index.learn([maps], [moments], making=True)
        encode(kv, None, layout, maps)
        caches.append((kv, maps))
    made = []
    for i in range(layers):
        query, (kv, maps) = queries(rows), caches[i % len(caches)]
        counts = torch.zeros(len(Count), dtype=torch.int64, device=device)
        made.append(IndexLayer(query, kv, maps, torch.full_like(query, math.nan), counts))
    ints = lambda value: torch.full((rows,), value, dtype=torch.int32, device=device)
    rule = IndexRule.of(config, shape.head_size**-0.5)
    geometry = Geometry(
        max_rows=rows, heads=shape.heads, kv_heads=shape.kv_heads, head_size=shape.head_size, page_size=shape.page,
        max_blocks=shape.row_pages, dtype=shape.dtype, band=rule.band, sink=rule.sink, scale=rule.scale,
    )  # fmt: skip
    work = LookupWork.allocate(geometry, shape.page_layout.directions, device)
    return IndexStep(shape, config, ints(shape.context - 1), ints(-1), table, made, rule, work)


def check(step: IndexStep) -> float:
    """Compare one layer's output with the method in PyTorch, as `compare` does: the largest relative error."""
    layer, layout = step.layers[0], step.shape.page_layout
    wanted = lookup.decode(step.rows(), layer.query, layer.kv, layout, layer.maps, step.rule)
    tokens_read(step)
    return compare("MAC", step, layer.out, wanted.out)


def tokens_read(step: IndexStep) -> list[int]:
    """Decode every layer once: the KV tokens that each read, of all KV heads, the index counted.

    Raises BenchError where rows were not looked up, or not read whole, as they should have been.
    """
    shape, read = step.shape, []
    everything = shape.batch * shape.kv_heads * shape.context
    short = shape.context < step.rule.min_context
    outcome = (
        Count.HIT if step.looked_up else Count.SHORT_CONTEXT if short and int(step.ring[0]) == -1 else Count.REQUEST
    )
    for i, layer in enumerate(step.layers):
        layer.counts.zero_()
        layer.out.fill_(math.nan)
        step.decode(layer)
        got = layer.counts.tolist()
        read.append(got[Count.READ] if step.looked_up else everything)
        # A group that reads all and its index skips nothing, rather than less than nothing: at most the index is missing.
        rest, skipped = everything - read[-1], got[Count.SKIPPED]
        layout = shape.page_layout
        index = everything * layout.index_bytes // layout.kv_bytes if step.looked_up else 0
        skipped = skipped if max(rest, 0) <= skipped <= rest + index else max(rest, 0)
        wanted = {outcome: shape.batch * shape.heads, Count.READ: read[-1], Count.SKIPPED: skipped}
        wanted = [wanted.get(count, 0) for count in Count]
        if got != wanted:
            raise BenchError(f"{shape}: counters of layer {i} are {got} and should be {wanted}")
        if layer.out.isnan().any():
            raise BenchError(f"{shape}: layer {i} left a part of its output unwritten, or NaN")
    return read
