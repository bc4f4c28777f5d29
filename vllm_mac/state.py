"""The values of a decode step: plain data, which kernels and engines take instead of argument lists.

`Geometry` is the same in every layer and step of a decoder, `LayerState` in every step of a layer, and `Rows` and
`Seeds` in every layer of a step. What a kernel is compiled for follows from them.

Letters: `B` rows of a batch, `T` tokens, `H` query heads, `K` KV heads, `D` head size, `R` rings, `W` window.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_mac.config import MacConfig
from vllm_mac.key_index import FP8, Lessons, Maps, Moments, moments_of, sampled_keys
from vllm_mac.rope import Rotary

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


MOST_PARTS = 4  # each reads the KV again


def most_together(group: int, head_size: int) -> int:
    """Tokens of a row that one program of the index's kernels takes, with the heads of a group each: registers hold no more."""
    return (32 if head_size <= 128 else 8) // group


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that all layers of a decoder share.

    max_rows: most rows of a batch. max_blocks: most KV pages of one row. dtype: of queries and KV. fp8: whether KV is
    `key_index.FP8` instead, by index only. scale: factor of the scores. The first `sink` tokens and the last `band` tokens of a row are in no summary. at_once: most tokens of a
    row that are decoded in one step, more than one by index only; kernels take `together` of them at once, in `parts`.

    Raises ValueError where `heads` is no multiple of `kv_heads`, and for a dtype that the kernels do not read.
    """

    max_rows: int
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    max_blocks: int
    dtype: torch.dtype
    band: int
    sink: int
    scale: float
    at_once: int = 1
    fp8: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads}, choose a multiple of kv_heads ({self.kv_heads})")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype}, choose one of {list(DTYPES)}")

    @property
    def kv_dtype(self) -> torch.dtype:
        return FP8 if self.fp8 else self.dtype

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def parts(self) -> int:
        """Parts of a row that decodes several tokens. To the kernels each is a row, with the same pages."""
        return -(-self.at_once // max(most_together(self.group, self.head_size), 1))

    @property
    def together(self) -> int:
        """Tokens of a part, at most."""
        return -(-self.at_once // self.parts)

    @property
    def prefix_start(self) -> int:
        """The first token of the prefix that a miss engine reads: `sink` rounded up to a whole page.

        The prefix of position `m` is `[prefix_start, m+1-band)`.
        """
        return -(-self.sink // self.page_size) * self.page_size


@dataclass(frozen=True, slots=True)
class RingStore:
    """The rings of one layer. Uninitialised memory: `ring.RingTable` says what may be read.

    query: `[R, H, W, D]`, the pre-RoPE query that matches are judged by.
    out: `[R, H, W, D]`, output part of the summary. For both dtypes see `ring.ring_dtypes`.
    lse: `[R, H, W]` float32, natural-log LSE of the summary (`-inf` for an empty one).
    chain: `[R, H, W]` int32, hits since the exact evaluation that the summary descends from.
    """

    query: Tensor
    out: Tensor
    lse: Tensor
    chain: Tensor

    @classmethod
    def allocate(
        cls,
        rings: int,
        heads: int,
        window: int,
        head_size: int,
        dtype: torch.dtype,
        device,
        out_dtype: torch.dtype | None = None,
    ) -> "RingStore":
        """dtype: of the queries, and of the outputs unless they have `out_dtype`."""
        shape = (rings, heads, window)
        return cls(
            query=torch.empty(*shape, head_size, dtype=dtype, device=device),
            out=torch.empty(*shape, head_size, dtype=out_dtype or dtype, device=device),
            lse=torch.empty(shape, dtype=torch.float32, device=device),
            chain=torch.empty(shape, dtype=torch.int32, device=device),
        )

    @property
    def rings(self) -> int:
        return self.query.shape[0]

    @property
    def window(self) -> int:
        return self.query.shape[2]


@dataclass(frozen=True, slots=True)
class LayerState:
    """All that the steps of one layer read and write beside the KV cache. Calibration replaces it as a whole.

    config: the layer's own, with its threshold (`MacConfig.for_layer`).
    rotary: the rotation that is undone before queries are compared.
    counts: `[len(Count)]` int64, added to, see `counters.Count`.
    audited: the histograms of audited steps (`audit.histograms`), added to; None where no step is audited.
    paused: `[1]` int32, nonzero while the layer is exact over its error budget; None without a budget.
    """

    store: RingStore
    config: MacConfig
    rotary: Rotary
    counts: Tensor
    audited: Tensor | None = None
    paused: Tensor | None = None

    @property
    def variant(self) -> tuple:
        """What layers of one decoder may differ in so that their kernels are compiled apart: rings and rotation."""
        cos_sin = self.rotary.cos_sin
        turned = None if cos_sin is None else (cos_sin.dtype, cos_sin.shape[-1], self.rotary.is_neox)
        return self.store.query.dtype, self.store.out.dtype, turned


@dataclass(frozen=True, slots=True)
class IndexRule:
    """What `lookup` decides by. tolerance: shares of the average token from which on a token is read. scale: factor of
    the scores. The first `sink` and the last `band` tokens are read always, and all of a row below `min_context`."""

    tolerance: float
    band: int
    sink: int
    min_context: int
    scale: float

    @classmethod
    def of(cls, config: MacConfig, scale: float) -> "IndexRule":
        """What a layer of this configuration decides by."""
        return cls(config.tolerance, config.band, max(config.sink, 16), config.min_context, scale)


@dataclass(frozen=True, slots=True)
class IndexState:
    """All that the steps of one layer read and write beside the KV cache, where it decodes by the index of keys.

    maps: `key_index.Maps`. counts: `[len(Count)]` int64, added to, see `counters.Count`.
    """

    maps: Maps
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Learning:
    """The row that the maps are learned from: its tokens `[begin, end)` of the batch, the last of `length`.

    blocks: `[*]` int32, its block table. before: what was learned until now. moments: by layer, what it is to learn.
    keys: by tokens of a page, where the keys lie that teach.
    """

    begin: int
    end: int
    length: int
    blocks: Tensor
    before: Lessons
    moments: dict[str, Moments] = field(default_factory=dict)
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, maps: Maps, query: Tensor, kv: Tensor) -> None:
        """Note what a layer is to learn. query: `[N, H, D]` of the whole batch. kv: `[blocks, K, P, 2 D]`."""
        page = kv.shape[2]
        if page not in self.keys:
            self.keys[page] = sampled_keys(self.blocks, self.length, page)
        self.moments[name] = moments_of(maps, query[self.begin : self.end], kv, self.keys[page])


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of a decode step do. Kernels take int32, PyTorch int64.

    position: `[B]`, the position of the first token that each row decodes; its KV is in the cache. -1: padding.
    ring: `[B]`, the ring that it reads and records in. -1: none; `counters.OPTED_OUT`: none, by its request's wish; by index
        `counters.PREFILLED` and `IN_SMALL_STEP` too.
    first: `[B]`, the oldest position of the ring that it may read, see `ring.RingTable.assign`.
    slack: `[B]` float32, the most that `(1 - threshold)^2` may be, see `limits.limit`; 1 where the layer's own counts.
    block_table: `[B, *]` int32, the pages of each row; last dimension contiguous. With as many rows as `position` over
        `Geometry.parts`, each is for so many rows that follow one another; those without tokens are padding.
    begin: `[B + 1]`, where the tokens of each row begin among the queries, which follow one another; None for one token each.
        Of several tokens all but the first are speculated, and KV of all of them is in the cache. By index only.
    """

    position: Tensor
    ring: Tensor
    first: Tensor
    slack: Tensor
    block_table: Tensor
    begin: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Seeds:
    """The prefilled tokens of a step that rings record. At most `window` tokens of a row, each position once.

    token: `[T]` int32, index of each token in the batch. row: `[T]` int32, its row; -1: nothing is recorded.
    position: `[T]` int32. ring: `[B]` int32, the ring of each row; below 0: nothing is recorded.
    block_table: `[B, *]` int32, last dimension contiguous.
    """

    token: Tensor
    row: Tensor
    position: Tensor
    ring: Tensor
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row's tokens `[start, start + n)`, prefilled or verifying speculated ones, as PyTorch takes them.

    ring: the ring that records them, below 0 for none. blocks: the row's block table.
    """

    start: int
    ring: int
    blocks: Tensor
