"""Decoding by the index of keys on an NVIDIA GPU, for one group of layers.

Knows kernels and buffers, not vLLM. `cpu_lookup` is the same in PyTorch.
"""

from itertools import product

import torch
from torch import Tensor

from vllm_mac import key_index
from vllm_mac.kernels import encode as encode_kernels
from vllm_mac.kernels import lookup as lookup_kernels
from vllm_mac.kernels.encode import append, encode
from vllm_mac.kernels.lookup import look_up
from vllm_mac.kernels.lookup_work import LookupWork
from vllm_mac.key_index import Lessons, PageLayout, directions
from vllm_mac.state import Geometry, IndexRule, IndexState, Rows

KERNELS = (
    (encode_kernels, "encode_kernel"), (encode_kernels, "append_kernel"), (lookup_kernels, "weigh_kernel"),
    (lookup_kernels, "look_kernel"), (lookup_kernels, "merge_kernel"),
)  # fmt: skip


class LookupDecoder:
    """Decodes for all layers that share their block tables and shapes.

    `decode` neither allocates nor waits for the device, and may be captured in a CUDA graph. Calls must not overlap.

    position: `[R]` int32, position of the first token that each row decodes, -1 for padding. ring: `[R]` int32,
    `counters.OPTED_OUT` or less for rows that are read whole, -1 for others; written only where it changes. begin: `[R + 1]`
    int32, where each row's tokens begin, written for steps of several tokens a row. In these, rows are `Geometry.parts` of
    each request's. lessons: what maps were learned from.
    """

    def __init__(self, geometry: Geometry, rule: IndexRule, size: int | None, device: torch.device):
        """size: directions of the index, by default `key_index.directions`."""
        self.geometry, self.rule = geometry, rule
        self.names: tuple[str, ...] | None = None  # of the layers it decodes for
        self.warm = False
        self.lessons = Lessons()
        self.layout = PageLayout(
            geometry.kv_heads, geometry.head_size, geometry.page_size, directions(geometry.head_size, size),
            geometry.kv_dtype.itemsize,
        )  # fmt: skip
        rows = geometry.max_rows * geometry.parts
        self.position = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.ring = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.begin = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._steps = torch.arange(geometry.parts, dtype=torch.int32, device=device) * geometry.together
        self._work = LookupWork.allocate(geometry, self.layout.directions, device)

    def lasting(self) -> dict[str, Tensor]:
        """By name, the buffers that a step must find as the step before left them; see `decoder.Decoder.lasting`."""
        return {"ring": self.ring, "steps": self._steps}

    def rows(self, block_table: Tensor, several: bool = False) -> Rows:
        """The first rows of the decoder's buffers, for a `block_table` `[B, *]` int32.

        several: some requests decode several tokens, `Geometry.at_once` at most.
        """
        n = block_table.shape[0] * (self.geometry.parts if several else 1)
        position = self.position[:n]
        begin = self.begin[: n + 1] if several else None
        return Rows(position, self.ring[:n], position, position, block_table, begin)

    def place(self, length: Tensor, begin: Tensor | None) -> None:
        """Write where the rows of a step are. length: `[B]` int32, tokens of each request, the step's included. begin: `[B + 1]`
        int32, where each one's tokens begin among the queries; None for one each.

        The GPU may wait for this before every step: where all requests decode a token, little is done.
        """
        n, parts = len(length), self.geometry.parts
        if begin is None:
            torch.sub(length, 1, out=self.position[:n])
            return
        first, end = begin[:-1, None], begin[1:, None]
        if parts > 1:
            first = torch.minimum(first + self._steps, end)  # [B, parts]
        rows = n * parts
        self.position[:rows].view(n, parts).copy_(torch.where(first < end, length[:, None] - end + first, -1))
        self.begin[:rows].view(n, parts).copy_(first)
        self.begin[rows : rows + 1].copy_(begin[-1:])

    def write(self, layer: IndexState, slots: Tensor | None, kv: Tensor) -> None:
        """Index the pages of which `slots` `[n]` int64 holds the last slot, after keys and values were written; without slots
        all."""
        encode(kv, slots, self.layout, layer.maps)

    def append(
        self, layer: IndexState, key: Tensor, value: Tensor, slots: Tensor, kv: Tensor, several: bool = False
    ) -> None:
        """Write the tokens of each row, `[n, K, D]`, to `slots` `[n]`, and index the pages that they complete. several: as in
        `rows`."""
        at_once = self.geometry.at_once if several else 1
        append(key, value, slots, kv, self.layout, layer.maps, self._work.pdl, at_once)

    def decode(self, layer: IndexState, rows: Rows, query: Tensor, kv: Tensor, out: Tensor) -> None:
        """One layer's step. query, out: `[N, H, D]`, after RoPE. kv: `[blocks, K, page, 2 D]`, with its index."""
        look_up(rows, query, kv, self.layout, layer.maps, self.rule, self._work, (out, layer.counts))

    def warm_up(self, layer: IndexState) -> None:
        """Compile the kernels of all steps, and set up the solvers that `key_index.learn` needs; once."""
        if self.warm:
            return
        self.warm = True
        g, layout, device = self.geometry, self.layout, self.position.device
        page = torch.zeros(1, layout.padded_bytes // g.kv_dtype.itemsize, dtype=g.kv_dtype, device=device)
        kv = page[:, : layout.kv_bytes // g.kv_dtype.itemsize].unflatten(1, (g.kv_heads, g.page_size, 2 * g.head_size))
        slots = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.write(layer, slots, kv)
        token = torch.zeros(1, g.kv_heads, g.head_size, dtype=g.dtype, device=device)
        for several in sorted({False, g.at_once > 1}):
            self.append(layer, token, token, slots, kv, several)
        self.write(layer, None, kv)
        self.position.fill_(-1)
        query = torch.zeros(g.max_rows, g.heads, g.head_size, dtype=g.dtype, device=device)
        table = torch.zeros(g.max_rows, 1, dtype=torch.int32, device=device)
        counts = {1 << i for i in range(g.max_rows.bit_length())}  # each has another number of programs
        # The first launch of each kind settles how many programs the others have.
        for n, several in product((1, *sorted(counts | {g.max_rows})), {False, g.at_once > 1}):
            self.decode(layer, self.rows(table[:n], several), query[:n], kv, torch.empty_like(query[:n]))
        key_index.best_maps(
            key_index.Moments.of(query[:1], page[:, : g.kv_heads * g.head_size].view(g.kv_heads, 1, -1))
        )
