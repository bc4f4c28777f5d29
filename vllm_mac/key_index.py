"""The index of keys: what each KV page holds beside its keys and values, and the maps that it is made with.

Letters: `K` KV heads, `G` query heads of each, `D` head size, `N` directions of the index, `P` tokens of a page.

Of each key `k` the index holds `N` codes of 4 bits. A code `c` from 0 to 15 stands for `c - 7.5`, and
`to_query^T q . (code - 7.5) + mean . q` estimates `q . k`. Of each page it holds the mean of its values.

What an FP8 cache holds, times a scale, are its keys and values. Maps and codes are of keys, means of what it holds.

The maps are the best of their rank for `q . k`. With the queries' second moment `L L^T` and the keys' covariance
`C`, both after RoPE, `B` holds the leading eigenvectors of `L^T C L`; keys are mapped by `L B`, queries by `L^-T B`.
Moments are of several texts: maps of one are good for texts like it, and coarse for others.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEVELS, HALF_LEVEL = 16, 7.5  # of a code of 4 bits
REACH = 2.8  # standard deviations of a direction that its codes reach to each side: the least error of a Gaussian
LEAST_QUERIES, GROWTH, FEW, EVERY = 64, 1.25, 16, 16  # see `Lessons`
SAMPLE, LAST = 16, 512  # every 16th key and query is sampled, of short texts 512 keys, and of queries the last 512
AT_ONCE, CORES = 1 << 20, 8  # numbers of one moment that maps are made of at once; threads that solve for them
PIECE = 256  # rows of one product of a moment
FP8 = torch.float8_e4m3fn


def directions(head_size: int, chosen: int | None = None) -> int:
    """How many directions the index has: as `chosen`, by default half the head size, 48 at least, in steps of 16."""
    return chosen or min(max(-(-head_size // 32) * 16, 48), head_size // 16 * 16)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where a page's index lies: behind its keys and values, head by head the codes, then head by head the means.

    codes: `[K, P, N / 2]` uint8 a page; the low half of byte `i` is direction `i`, the high half direction `i + N / 2`.
    means: `[K, D]` a page, in the cache's dtype; of an FP8 cache in float16, which holds all its numbers.
    itemsize: bytes of one number of the cache.
    """

    kv_heads: int
    head_size: int
    page: int
    directions: int
    itemsize: int

    @classmethod
    def of(cls, kv: Tensor, maps: "Maps") -> "PageLayout":
        """That of a layer's cache `[blocks, K, P, 2 D]`."""
        _, heads, page, width = kv.shape
        return cls(heads, width // 2, page, maps.shift.shape[1], kv.itemsize)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a page's keys and values."""
        return self.kv_heads * self.page * 2 * self.head_size * self.itemsize

    @property
    def code_bytes(self) -> int:
        """Bytes of a page's codes."""
        return self.kv_heads * self.directions // 2 * self.page

    @property
    def index_bytes(self) -> int:
        """Bytes of a page's index."""
        return self.code_bytes + self.kv_heads * self.head_size * max(self.itemsize, torch.float16.itemsize)

    @property
    def padded_bytes(self) -> int:
        """Bytes of a page with its index, a multiple of 128."""
        return -(-(self.kv_bytes + self.index_bytes) // 128) * 128

    def views(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[blocks, K, P, N / 2]` uint8 and means `[blocks, K, D]` of a cache `[blocks, K, P, 2 D]`.

        Raises ValueError where the pages of `kv` leave no room for them.
        """
        blocks, room = len(kv), kv.stride(0) * self.itemsize
        if room < self.kv_bytes + self.index_bytes and blocks > 1:
            raise ValueError(f"kv: pages {room} bytes apart, choose {self.padded_bytes} or more")
        at = kv.storage_offset() + self.kv_bytes // self.itemsize
        tail = torch.as_strided(kv, (blocks, self.index_bytes // self.itemsize), (kv.stride(0), 1), at)
        codes = tail[:, : self.code_bytes // self.itemsize].view(torch.uint8)
        means = tail[:, self.code_bytes // self.itemsize :].view(torch.float16 if kv.dtype == FP8 else kv.dtype)
        shape = self.kv_heads, self.page, self.directions // 2
        return codes.unflatten(1, shape), means.unflatten(1, (self.kv_heads, self.head_size))


def content_bytes(head_size: int, n: int, itemsize: int, least_page: int) -> int:
    """Bytes of a token of a KV head, where its part of the index counts as part of it: enough for pages of `least_page` tokens or
    more, and a multiple of 8. Pages of it are not padded, so vLLM can split blocks into pages and pads Mamba's to them."""
    mean = -(-head_size * max(itemsize, torch.float16.itemsize) // least_page)
    return -(-(2 * head_size * itemsize + n // 2 + mean) // 8) * 8


def rows(kv: Tensor, head_size: int, page: int | None = None) -> Tensor:
    """A cache as pages of plain rows `[blocks, K, P, 2 D]`, which come first in each page; what is left of it is the index's.

    kv: `[blocks, K, T, 2 D]`, or wider where rows have room for the index (`content_bytes`). page: P, where blocks of T tokens are
    several pages.
    """
    blocks, heads, tokens, wide = kv.shape
    width, page = 2 * head_size, page or tokens
    if (wide, tokens) == (width, page):
        return kv
    several, last = divmod(tokens, page)
    if last or kv.stride(3) != 1 or (several > 1 and kv.stride(0) != heads * tokens * wide):
        raise ValueError(f"kv: blocks of {tokens} tokens, {kv.stride()} apart, are no pages of {page}")
    by_head = kv.stride(1) >= kv.stride(2)
    strides = (page * width, width) if by_head else (width, heads * width)
    return kv.as_strided((blocks * several, heads, page, width), (kv.stride(0) // several, *strides, 1))


def numbers(kv: Tensor) -> Tensor:
    """A cache as numbers: vLLM has FP8 ones as bytes."""
    return kv.view(FP8) if kv.dtype == torch.uint8 else kv


@dataclass(frozen=True, slots=True)
class Scales:
    """What the numbers of an FP8 cache are multiplied with: `[]` float32 each, which vLLM writes in place."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class Maps:
    """What turns keys into codes and queries into what codes are multiplied with. Written in place by `learn`.

    to_key, to_query: `[K, D, N]` in the model's dtype; the code is `floor(to_key^T k - shift)`, from 0 to 15.
    shift: `[K, N]` float32. mean: `[K, D]` float32, the mean key.
    ready: `[1]` int32, 0 until the maps are set; nothing is estimated before.
    moments: what was learned until now, of which maps are made when that is due. scales: those of the layer's cache if it is FP8, else None.
    """

    to_key: Tensor
    to_query: Tensor
    shift: Tensor
    mean: Tensor
    ready: Tensor
    moments: "Moments"
    scales: Scales | None = None

    @classmethod
    def allocate(
        cls, kv_heads: int, head_size: int, n: int, dtype: torch.dtype, device, scales: Scales | None = None
    ) -> "Maps":
        """Maps that are not ready."""

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(kv_heads, head_size, n, dtype=dtype), zeros(kv_heads, head_size, n, dtype=dtype),
            zeros(kv_heads, n), zeros(kv_heads, head_size), zeros(1, dtype=torch.int32),
            Moments(*(zeros(kv_heads, rows, head_size) for rows in (head_size, head_size, 1))), scales,
        )  # fmt: skip

    def own(self) -> dict[str, Tensor]:
        """By name, the tensors that `learn` writes."""
        made = {name: getattr(self, name) for name in ("to_key", "to_query", "shift", "mean", "ready")}
        return made | {f"moments_{name}": getattr(self.moments, name) for name in Moments.__slots__}

    def keys(self, held: Tensor) -> Tensor:
        """Keys, float32, of what a cache holds."""
        return held.float() if self.scales is None else held.float() * self.scales.key

    def values(self, held: Tensor) -> Tensor:
        """Values, float32, of what a cache holds, or of their mean."""
        return held.float() if self.scales is None else held.float() * self.scales.value


@dataclass(frozen=True, slots=True)
class Moments:
    """Queries' second moment and keys' covariance `[K, D, D]`, mean key `[K, 1, D]`; all float32, after RoPE.

    The second moment is 1 on average on its diagonal: maps depend on its shape alone, so no text outweighs others by it.
    """

    second: Tensor
    spread: Tensor
    mean: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> "Moments":
        """query `[n, K G, D]`, key `[K, T, D]`."""
        kv_heads, _, size = key.shape
        rows = query.float().view(len(query), kv_heads, -1, size).permute(1, 0, 2, 3).flatten(1, 2)
        key = key.float()
        mean = key.mean(1, keepdim=True)
        second = _moment(rows)
        size = second.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)[:, None, None]
        return cls(second / size, _moment(key - mean), mean)

    def joined(self, other: "Moments", weight: float) -> "Moments":
        """Those of both, `other` being this share of the whole: as if the keys and queries were one text's, but for the size
        of queries."""
        between = other.mean - self.mean
        spread = self.spread.lerp(other.spread, weight) + weight * (1 - weight) * between.transpose(1, 2) @ between
        return Moments(self.second.lerp(other.second, weight), spread, self.mean.lerp(other.mean, weight))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of them."""
        return self.second, self.spread, self.mean


def _moment(x: Tensor) -> Tensor:
    """The second moment `[K, D, D]` of rows `[K, n, D]`. Piece by piece: as one product it keeps few of a GPU's SMs busy."""
    n = x.shape[1]
    whole = torch.nn.functional.pad(x, (0, 0, 0, -n % PIECE)) if n % PIECE else x
    pieces = whole.unflatten(1, (-1, PIECE))
    return (pieces.transpose(2, 3) @ pieces).sum(1) / n


def _finite(*tensors: Tensor) -> Tensor:
    """`[K]` bool, whether all numbers of each head are finite; tensors `[K, ...]`."""
    return torch.stack([x.isfinite().flatten(1).all(1) for x in tensors]).all(0)


def best_maps(moments: Moments) -> tuple[Tensor, Tensor]:
    """Maps `[K, D, D]` of keys and of queries, leading directions first: see the module's docstring.

    NaN for heads of which there are none, as their numbers are not finite or too large.
    """
    size = moments.second.shape[1]
    eye = torch.eye(size, device=moments.second.device)
    scale = moments.second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp(min=1e-12)
    lower, failed = torch.linalg.cholesky_ex(moments.second + 1e-4 * scale * eye)
    form = lower.transpose(1, 2) @ moments.spread @ lower
    found = (_finite(form) & (failed == 0))[:, None, None]
    basis = torch.where(found, _eigenvectors(torch.where(found, form, eye)), torch.nan).flip(2)
    return lower @ basis, torch.linalg.solve_triangular(lower.transpose(1, 2), basis, upper=True)


def _eigenvectors(form: Tensor) -> Tensor:
    """Eigenvectors `[n, D, D]` of symmetric matrices, by rising eigenvalues.

    A GPU solves one after the other, and the host waits: 1.4 ms each on an H200, of 128 rows. A core takes 1.1 ms, and
    there are several. Each solves with one thread, as vLLM sets it: several on one such matrix take longer.
    """
    if not form.is_cuda:
        return torch.linalg.eigh(form)[1]
    threads, before = min(len(form), CORES, len(os.sched_getaffinity(0))), torch.get_num_threads()
    parts = form.cpu().tensor_split(threads)
    if before > 1:  # the user's OMP_NUM_THREADS
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            solved = list(pool.map(lambda part: torch.linalg.eigh(part)[1], parts))
    finally:
        if before > 1:
            torch.set_num_threads(before)
    return torch.cat(solved).to(form.device)


@dataclass(frozen=True, slots=True)
class Lessons:
    """What maps have been learned from: so many texts, their tokens, and of those in the maps the longest one's.

    The first `FEW` texts teach, and then every `EVERY`-th: so maps of what a server was warmed up with do not stay, and
    learning delays few prompts. Every making of maps indexes anew all pages that were given out, so they are made after
    the 1st, 4th, 16th, 64th text that teaches, and so on. A text of `GROWTH` times the longest one's tokens teaches and
    makes them at once, since where keys lie depends on how far positions reach: RoPE turns them.

    passed: texts that came since the last one that taught.
    """

    texts: int = 0
    tokens: int = 0
    longest: int = 0
    passed: int = 0

    def worth(self, length: int) -> bool:
        """Whether a row of `length` tokens is to be learned from."""
        return self.texts < FEW or self.passed >= EVERY - 1 or length >= GROWTH * self.longest

    def weight(self, length: int) -> float:
        """The share that a row of `length` tokens has of these and its own."""
        return length / (self.tokens + length)

    def makes(self, length: int) -> bool:
        """Whether maps are made after a row of `length` tokens."""
        texts = self.texts + 1
        power_of_four = texts & (texts - 1) == 0 and texts.bit_length() % 2 == 1
        return power_of_four or length >= GROWTH * self.longest

    def after(self, length: int) -> "Lessons":
        """These and that of a row of `length` tokens."""
        longest = self.longest if self.texts else 0  # else of other weights
        longest = max(longest, length) if self.makes(length) else longest
        return Lessons(self.texts + 1, self.tokens + length, longest)

    def passing(self) -> "Lessons":
        """These, and a text that is not learned from."""
        return replace(self, passed=self.passed + 1)


def sampled_keys(blocks: Tensor, length: int, page: int) -> tuple[Tensor, Tensor]:
    """Where the keys of a row of `length` tokens lie that maps are learned from: their pages and places in these, `[T]` int64.

    blocks: the row's block table. page: tokens of a page.
    """
    token = torch.arange(0, length, min(max(length // LAST, 1), SAMPLE), device=blocks.device)
    return blocks[token // page].long(), token % page


def moments_of(maps: Maps, query: Tensor, kv: Tensor, keys: tuple[Tensor, Tensor]) -> Moments:
    """The moments of a row. Does not wait for the device: each layer of a prompt's step adds to what the host has to do.

    query: `[n, H, D]`, of the row's last tokens, after RoPE. kv: `[blocks, K, P, 2 D]`. keys: of `sampled_keys`.
    """
    page, slot = keys
    key = kv[page, :, slot, : kv.shape[3] // 2].transpose(0, 1)
    return Moments.of(sampled_queries(query), maps.keys(key))


def learn(layers: Sequence[Maps], moments: Sequence[Moments], making: bool, weight: float = 1.0) -> list[bool]:
    """Have layers of one shape learn, and make their maps where `making`. Waits for the device.

    moments: of a row, of each layer. weight: its share of all that they have learned then. Returns False for layers that
    learn nothing, and whose maps stay as they were: the numbers are not finite, or the model's dtype cannot hold the maps.
    """
    if not layers:
        return []
    heads, size, n = layers[0].to_key.shape
    at_once, learned = max(AT_ONCE // (heads * size * size), 1), []
    for i in range(0, len(layers), at_once):
        some, theirs = layers[i : i + at_once], moments[i : i + at_once]
        known, new = _together([maps.moments for maps in some]), _together(theirs)
        together = known.joined(new, weight)
        made = _made(together, n, some[0].to_key.dtype) if making else ()
        good = _finite(*together.tensors(), *made).view(-1, heads).all(1).tolist()
        for j, maps in enumerate(some):
            if good[j]:
                own = slice(j * heads, (j + 1) * heads)
                kept = (maps.to_key, maps.to_query, maps.shift, maps.mean) if making else ()
                for mine, new in zip((*maps.moments.tensors(), *kept), (*together.tensors(), *made), strict=True):
                    mine.copy_(new[own])
                if making:
                    maps.ready.fill_(1)
        learned += good
    return learned


def _together(moments: Sequence[Moments]) -> Moments:
    """Those of all layers, as if of one with all their heads."""
    return Moments(*(torch.cat(parts) for parts in zip(*(one.tensors() for one in moments), strict=True)))


def _made(moments: Moments, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`to_key`, `to_query`, `shift` and `mean` of `Maps` with `n` directions."""
    key, query = (x[..., :n] for x in best_maps(moments))
    deviation = (key * (moments.spread @ key)).sum(1, keepdim=True).clamp(min=0).sqrt()
    # The floor keeps what half-precision dtypes hold; directions below it change no logit.
    step = deviation.clamp(min=1e-4 * deviation.amax(-1, keepdim=True).clamp(min=1e-6)) * (REACH / HALF_LEVEL)
    to_key, to_query, mean = (key / step).to(dtype), (query * step).to(dtype), moments.mean[:, 0]
    shift = (mean[:, None] @ to_key.float())[:, 0] - HALF_LEVEL - 0.5  # of the map as it is rounded
    return to_key, to_query, shift, mean


def sampled_queries(query: Tensor) -> Tensor:
    """Of a chunk's queries `[n, H, D]` those that maps are learned from: the last ones, and every so many of all."""
    return torch.cat((query[-LAST:], query[::SAMPLE]))


def encode(key: Tensor, value: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
    """Codes `[K, P, N / 2]` uint8 and mean value `[K, D]` float32 of pages; key, value `[K, P, D]`, as a cache holds them."""
    code = maps.keys(key) @ maps.to_key.float() - maps.shift[:, None]
    code = code.floor().clamp(0, LEVELS - 1).nan_to_num(0).to(torch.uint8)
    low, high = code.chunk(2, 2)
    return low | (high << 4), value.float().mean(1)


def estimate(query: Tensor, codes: Tensor, maps: Maps) -> Tensor:
    """Estimated `q . k`, not scaled, `[K, G, T]`, of queries `[K, G, D]` and codes `[K, T, N / 2]`."""
    code = torch.cat((codes & 15, codes >> 4), 2).float() - HALF_LEVEL
    narrow = query.float() @ maps.to_query.float()
    return narrow @ code.transpose(1, 2) + query.float() @ maps.mean[..., None]
