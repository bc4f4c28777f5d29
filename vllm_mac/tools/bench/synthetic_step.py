"""A synthetic decode step: queries, KV and rings in which the real match finds a given share of hits.

Each head of each row and layer hits independently, with the given rate and from a seed. For a hit, one entry of the
head's ring is planted near its query, at a random lag. All other entries are unrelated queries, far beyond the
threshold. The match sees the data and nothing else.

Letters: `B` rows, `H` query heads, `K` KV heads, `D` head size, `W` window.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_mac import audit, paged
from vllm_mac.config import MacConfig
from vllm_mac.counters import Count
from vllm_mac.key_index import PageLayout
from vllm_mac.ring import narrow, ring_dtypes
from vllm_mac.rope import Rotary
from vllm_mac.state import LayerState, RingStore, Rows
from vllm_mac.tools.bench import BenchError

LAGS = ("geometric", "uniform", "constant")
NEAR = 0.25  # distance of a planted query as a share of the threshold's limit; other queries are sqrt(2) an element off


@dataclass(frozen=True, slots=True)
class Shape:
    """One decode step. context: tokens in each row's cache, the decoded one included.

    directions: of the index that each page ends with; 0 for pages without one.
    """

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_size: int
    page: int
    dtype: torch.dtype
    directions: int = 0

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} heads, batch {self.batch}, {self.context} tokens"

    @property
    def row_pages(self) -> int:
        return -(-self.context // self.page)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        # Page 0 belongs to no row, as in vLLM. The layout is vLLM's default, token-major.
        return 1 + self.batch * self.row_pages, self.page, self.kv_heads, 2 * self.head_size

    @property
    def page_layout(self) -> PageLayout:
        return PageLayout(self.kv_heads, self.head_size, self.page, self.directions, self.dtype.itemsize)

    @property
    def cache_elements(self) -> int:
        if not self.directions:
            return math.prod(self.cache_shape)
        return self.cache_shape[0] * self.page_layout.padded_bytes // self.dtype.itemsize

    def exact_bytes(self) -> int:
        """Bytes that exact decoding of one layer moves: all KV, queries and outputs."""
        kv = self.batch * self.context * self.kv_heads * 2 * self.head_size
        return (kv + 2 * self.batch * self.heads * self.head_size) * self.dtype.itemsize


class Rope(nn.Module):
    """The part of vLLM's rotary embedding that `Rotary` needs."""

    def __init__(self, positions: int, head_size: int, dtype: torch.dtype, device):
        super().__init__()
        angle = 500000.0 ** -(torch.arange(0, head_size, 2, device=device, dtype=torch.float64) / head_size)
        angle = torch.arange(positions, device=device, dtype=torch.float64)[:, None] * angle
        self.cos_sin_cache = torch.cat((angle.cos(), angle.sin()), -1).to(dtype)
        self.rotary_dim, self.is_neox_style = head_size, True


@dataclass(slots=True)
class Layer:
    """kv: `[blocks, K, page, 2 D]`. source: `[B, H]` int64 on the CPU, the position planted near each head's query, -1 for
    none. counts, audited: what the kernels add to; audited is None where nothing is audited."""

    query: Tensor
    kv: Tensor
    store: RingStore
    out: Tensor
    counts: Tensor
    audited: Tensor | None
    source: Tensor


@dataclass(slots=True)
class DecodeStep:
    """What exact engines read of a step. position, ring: `[B]` int32. block_table: `[B, *]` int32.

    layers: each has at least query, kv and out, see `Layer`.
    """

    shape: Shape
    config: MacConfig
    position: Tensor
    ring: Tensor
    block_table: Tensor
    layers: list

    @property
    def scale(self) -> float:
        return self.shape.head_size**-0.5


@dataclass(slots=True)
class Step(DecodeStep):
    """A step of `rule: match`; its layers are `Layer`s."""

    first: Tensor
    rotary: Rotary

    def state(self, layer: Layer) -> LayerState:
        return LayerState(layer.store, self.config, self.rotary, layer.counts, layer.audited)

    def rows(self) -> Rows:
        """As `paged` takes them."""
        slack = torch.ones_like(self.position, dtype=torch.float32)
        return Rows(self.position.long(), self.ring.long(), self.first.long(), slack, self.block_table)

    @property
    def audited(self) -> bool:
        """Whether to time audited steps. With a share below 1, the steps that are not audited are timed."""
        return self.config.audit == 1


def make_step(shape: Shape, config: MacConfig, pool: Tensor, layers: int, seed: int) -> Step:
    """Layers whose KV caches lie one after the other in `pool` (flat, filled).

    Each layer has its own queries and rings, so that no layer finds its data in the GPU's caches. KV caches repeat
    where the pool holds fewer than `layers`.
    """
    device = pool.device
    draw = torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=draw, device=device)
    rows, m = shape.batch, shape.context - 1
    each = shape.cache_elements
    caches = [pool[i * each : (i + 1) * each].view(shape.cache_shape).transpose(1, 2) for i in range(len(pool) // each)]
    pages = torch.randperm(rows * shape.row_pages, generator=draw, device=device) + 1
    ints = lambda value: torch.full((rows,), value, dtype=torch.int32, device=device)
    made = []
    for i in range(layers):
        query_dtype, out_dtype = ring_dtypes(config, shape.dtype)
        store = RingStore.allocate(rows, shape.heads, config.window, shape.head_size, query_dtype, device, out_dtype)
        # Summaries weigh more than the keys that are read, as with long prefixes, so that no unrelated query is near
        # enough. They do not weigh so much that an error in the keys that are read would not show.
        store.out.normal_(0, 0.1, generator=draw)
        store.lse.normal_(math.log(config.band) + 2, 0.5, generator=draw)
        query = normal(rows, shape.heads, shape.head_size).to(shape.dtype)
        counts = torch.zeros(len(Count), dtype=torch.int64, device=device)
        audited = audit.histograms(shape.heads, device) if config.audit else None
        source = torch.full((rows, shape.heads), -1)  # `plant` sets it
        made.append(
            Layer(query, caches[i % len(caches)], store, torch.full_like(query, math.nan), counts, audited, source)
        )
    # The step writes to the slot of the oldest position. That slot is out of reach, else the second replay of a step
    # would find its own query there.
    first = ints(max(m - config.window + 1, 0))
    ring = torch.randperm(rows, generator=draw, device=device).to(torch.int32)
    if shape.context < config.min_context:
        ring.fill_(-1)  # such rows have no ring
    table = pages.view(rows, -1).to(torch.int32)
    rotary = Rotary(Rope(shape.context, shape.head_size, shape.dtype, device))
    return Step(shape, config, ints(m), ring, table, made, first, rotary)


def draw_lags(size: tuple[int, ...], law: str, mean: int, most: int, draw: torch.Generator) -> Tensor:
    """Lags of at least 1, with this mean before they are clipped to `most`."""
    if law == "constant":
        lags = torch.full(size, mean)
    elif law == "uniform":
        lags = torch.randint(1, 2 * mean, size, generator=draw)
    elif law == "geometric":
        chance = torch.rand(size, generator=draw, dtype=torch.float64)
        lags = 1 + (torch.log1p(-chance) / math.log1p(-1 / mean)).long() if mean > 1 else torch.ones(size).long()
    else:
        raise BenchError(f"lags: {law!r}, choose from {', '.join(LAGS)}")
    return lags.clamp(max=most)


def plant(step: Step, rate: float, law: str, mean_lag: int, seed: int) -> None:
    """Fill the rings of all layers so that heads hit with this rate. law, mean_lag: as in `draw_lags`."""
    shape, config = step.shape, step.config
    m = shape.context - 1
    # Hits and lags are drawn on the CPU, so that they are the same on every machine.
    choose = torch.Generator().manual_seed(seed)
    noise = torch.Generator(step.ring.device).manual_seed(seed)
    size = (shape.batch, shape.heads)
    for layer in step.layers:
        store = layer.store
        # Drawn in the dtype of the outputs: PyTorch draws no float8.
        store.query.copy_(torch.empty_like(store.out).normal_(generator=noise))
        store.chain.zero_()
        hits = torch.rand(size, generator=choose) < rate
        lags = draw_lags(size, law, mean_lag, max(1, min(config.window - 1, m - config.band - config.sink)), choose)
        source = torch.where(hits, m - lags, -1)
        row, head = hits.nonzero(as_tuple=True)
        slot = (source[row, head] % config.window).to(store.query.device)
        row, head = row.to(slot.device), head.to(slot.device)
        near = step.rotary.undo(layer.query, step.position.long())[row, head]
        off = NEAR * math.sqrt(2.0) * (1.0 - config.threshold)
        near = near + off * torch.randn(near.shape, generator=noise, device=near.device)
        store.query[step.ring[row].long(), head, slot] = narrow(near, store.query.dtype)
        # Shorter sequences try no match.
        layer.source = source if shape.context >= config.min_context else torch.full_like(source, -1)


def check_planting(step: Step) -> None:
    """Raises BenchError unless the method's own match, in PyTorch, finds exactly the planted entries."""
    for i, layer in enumerate(step.layers):
        rows = step.rows()
        pre_query = step.rotary.undo(layer.query, rows.position)
        rest = paged.band_and_sink(rows.position, layer.query, layer.kv, rows.block_table, step.config, step.scale)
        found = paged.match(rows, pre_query, layer.store, step.config, rest.lse)
        wrong = int(torch.ne(found.cpu(), layer.source).sum())
        if wrong:
            raise BenchError(
                f"{step.shape}: {wrong} of {found.numel()} heads of layer {i} match another entry than the planted one; "
                "the data do not suit this threshold, mass_floor or head size"
            )


@dataclass(frozen=True, slots=True)
class Realised:
    """What a planted step does: means over its layers.

    heads_matched, groups_hit: shares of heads with a match, and of KV groups whose heads all have one.
    lag: mean lag of matched heads. group_lag: mean over groups that hit of their largest lag, which decides how much is
    read. Both are None without a match. step_bytes: bytes that one layer must move.
    """

    heads_matched: float
    groups_hit: float
    lag: float | None
    group_lag: float | None
    step_bytes: float


def expected_counts(step: Step, layer: Layer) -> list[int]:
    """The counters of one step of a layer, see `counters.Count`."""
    shape, config = step.shape, step.config
    grouped = layer.source.view(shape.batch, shape.kv_heads, -1)
    hit = (grouped >= 0).all(-1)
    everything = torch.full_like(hit, shape.context, dtype=torch.int64)
    begin = grouped.amin(-1) + 1 - config.band
    read = int(torch.where(hit, shape.context - begin + config.sink, everything).sum())
    heads_hit = int(hit.sum()) * grouped.shape[-1]
    rest = layer.source.numel() - heads_hit
    missed = Count.SHORT_CONTEXT if shape.context < config.min_context else Count.MISS
    counts = {Count.HIT: heads_hit, missed: rest, Count.READ: read, Count.SKIPPED: int(everything.sum()) - read}
    return [counts.get(count, 0) for count in Count]


def realised(step: Step) -> Realised:
    shape, config = step.shape, step.config
    m = shape.context - 1
    source = torch.stack([layer.source for layer in step.layers])
    grouped = source.view(*source.shape[:2], shape.kv_heads, -1)
    hit = (grouped >= 0).all(-1)
    mean = lambda x: float(x.double().mean())
    mean_or_none = lambda x: mean(x) if x.numel() else None
    read = sum(expected_counts(step, layer)[Count.READ] for layer in step.layers) / len(step.layers)
    store = step.layers[0].store
    query, out = (part.dtype.itemsize * shape.head_size for part in (store.query, store.out))
    heads = shape.batch * shape.heads
    ringed = shape.context >= config.min_context
    searched = min(config.window, m) if ringed else 0
    # Read: the ring's queries, and on a hit an entry of query, output, LSE and chain. Written: such an entry.
    rings = heads * (searched * query + (ringed + float(hit.double().mean())) * (query + out + 8))
    rows = 2 * heads * shape.head_size * shape.dtype.itemsize
    return Realised(
        heads_matched=mean(source >= 0),
        groups_hit=mean(hit),
        lag=mean_or_none(m - source[source >= 0]),
        group_lag=mean_or_none(m - grouped.amin(-1)[hit]),
        step_bytes=read * 2 * shape.head_size * shape.dtype.itemsize + rings + rows,
    )


def exact_reference(step: DecodeStep, layer) -> Tensor:
    """Exact attention of one layer, `[B, H, D]` float32."""
    shape = step.shape
    token = torch.arange(shape.context, device=layer.query.device)
    zero, end = token.new_tensor(0), token.new_tensor(shape.context)
    out = []
    for row in range(shape.batch):
        key, value = paged.gather(layer.kv, step.block_table[row], token)
        query = layer.query[row].float().view(shape.kv_heads, -1, shape.head_size)
        out.append(paged.attend(query, key, value, token, zero, end, step.scale).out.view(shape.heads, -1))
    return torch.stack(out)


def reference(step: Step, layer: Layer) -> Tensor:
    """The method on one layer, `[B, H, D]` float32. Does not change the layer's rings."""
    store = layer.store
    copy = RingStore(store.query.clone(), store.out.clone(), store.lse.clone(), store.chain.clone())
    rows = step.rows()
    pre_query = step.rotary.undo(layer.query, rows.position)
    with torch.device(layer.query.device):  # `paged` makes its indices on the default device
        return paged.decode(rows, layer.query, pre_query, layer.kv, copy, step.config, step.scale).out


def compare(name: str, step: DecodeStep, got: Tensor, wanted: Tensor) -> float:
    """The largest relative error of a head's output. Raises BenchError where rounding does not explain it.

    Weights, the partial results of prefix and tail, and the output are each rounded to the dtype at most once, by at
    most half its spacing: four roundings.
    """
    bound = 4 * torch.finfo(step.shape.dtype).eps / 2
    error = (got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    worst = float(error.max())
    if not worst <= bound:  # NaN too
        row, head = divmod(int(torch.nan_to_num(error, math.inf).argmax()), step.shape.heads)
        raise BenchError(
            f"{step.shape}: {name} is wrong: relative error {worst:.3g} at row {row}, head {head}; rounding to "
            f"{step.shape.dtype} allows {bound:.3g}. No speed is reported."
        )
    return worst
