"""Rings: the memory that holds them, and which sequence may use which ring.

`RingStore` is one layer's memory. `RingTable` decides, once a step for all layers that share
a block table, which ring each row of the batch uses; it runs on the device its tensors live
on, without a host synchronisation, so that it can serve graphs and asynchronous scheduling.

Letters: `R` rings, `W` window, `H` query heads, `D` head size, `B` rows of a batch, `N`
tokens of a batch. The entry of position `p` lies in slot `p mod W`. Position `p` of ring `r`
may be read at position `m` when `first[r] <= p`, `m - W <= p < m`: nothing else marks an
entry as valid, so nothing is erased when a ring changes hands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_mac.config import MacConfig


@dataclass(frozen=True, slots=True)
class RingStore:
    """One layer's rings. Uninitialised memory: `RingTable` says what may be read.

    query: `[R, H, W, D]`, pre-RoPE query that matches are judged by.
    out: `[R, H, W, D]`, output part of the summary. Of both dtypes see `ring_dtypes`.
    lse: `[R, H, W]` float32, natural-log LSE of the summary (`-inf` for an empty one).
    chain: `[R, H, W]` int32, hits since the exact evaluation the summary descends from.
    """

    query: Tensor
    out: Tensor
    lse: Tensor
    chain: Tensor

    @classmethod
    def allocate(
        cls, rings: int, heads: int, window: int, head_size: int, dtype: torch.dtype, device, out_dtype: torch.dtype | None = None
    ) -> "RingStore":
        """dtype: of the queries, and of the outputs unless they have `out_dtype`."""
        shape = (rings, heads, window)
        return cls(
            query=torch.empty(*shape, head_size, dtype=dtype, device=device),
            out=torch.empty(*shape, head_size, dtype=out_dtype or dtype, device=device),
            lse=torch.empty(shape, dtype=torch.float32, device=device),
            chain=torch.empty(shape, dtype=torch.int32, device=device),
        )


def ring_bytes(heads: int, window: int, head_size: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> int:
    """Bytes of one ring of one layer, its dtypes as for `RingStore.allocate`."""
    return heads * window * (head_size * (dtype.itemsize + (out_dtype or dtype).itemsize) + 4 + 4)


def ring_dtypes(config: MacConfig, model_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """What the queries and the outputs of a ring are stored in.

    float8_e4m3fn has 4 bits of precision: enough to compare queries by, but up to 6 % off an output.
    """
    query = model_dtype if config.ring_dtype == "auto" else getattr(torch, config.ring_dtype)
    return query, model_dtype if query == torch.float8_e4m3fn else query


def narrow(query: Tensor, dtype: torch.dtype) -> Tensor:
    """`query` in a ring's dtype. float8_e4m3fn has no infinity: what is beyond its range becomes its
    largest value, which not every PyTorch does by itself."""
    if dtype == torch.float8_e4m3fn:
        query = query.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return query.to(dtype)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which ring each row of a batch uses in this step; `B` includes rows without one.

    ring: `[B]` int64, -1 where the row has none.
    first: `[B]` int64, the oldest position of the ring that this row may read; the sequence's
        length, so none, where it has no ring or still reads its prompt.
    """

    ring: Tensor
    first: Tensor


class RingTable:
    """Ownership of `R` rings by the content of the KV blocks they were recorded from.

    No request name is needed. A row that starts at position `s` continues ring `r` when
    `s - 1` is the last position that `r` recorded, `r` recorded it in the very block that now
    holds the row's position `s - 1`, and nobody has written into that block since. Blocks are
    shared only between equal token histories, so such a row has the history that the ring
    was recorded from. Of several rows that could continue one ring one does; every other row
    gets a ring with nothing in it. Rings of sequences that went away are found again as
    those unused for the longest time.
    """

    def __init__(self, rings: int, blocks: int, block_size: int, config: MacConfig, device, idle_steps: int = 1):
        """`idle_steps`: a ring is taken from its sequence only when unused for this many
        steps (the number of batches that are in flight at once)."""
        self.block_size, self.config, self.idle_steps = block_size, config, idle_steps
        self.step = 0

        def full(n: int, value: int) -> Tensor:
            return torch.full((n,), value, dtype=torch.int64, device=device)

        # One more than there are, so that absent blocks and rings have somewhere to point.
        self.owner = full(blocks + 1, -1)
        self.last = full(rings + 1, -1)
        self.last_block = full(rings + 1, -1)
        self.first = full(rings + 1, 0)
        self.request = full(rings + 1, -1)
        self.used = full(rings + 1, -idle_steps)
        self.rings = rings

    def assign(
        self,
        start: Tensor,
        length: Tensor,
        prefilling: Tensor,
        block_table: Tensor,
        slots: Tensor,
        row_of_token: Tensor,
        request: Tensor | None = None,
    ) -> Assignment:
        """Give each row its ring and record what this step will write.

        start, length: `[B]` int64, first position of the row and sequence length after it
            (`length == start` for padding).
        prefilling: `[B]` bool, rows still reading their prompt.
        block_table: `[B, *]` physical block of each logical block.
        slots, row_of_token: `[N]` int64, the KV slot and row of each token (slot -1: none).
        request: `[B]` int64, the runner's index of the row's request where it has one.
        """
        self.step += 1
        rows = torch.arange(len(start), device=start.device)
        active = (length > start) & (start >= 0)
        absent = len(self.owner) - 1
        # A block may be written anew and shared within one step: forget whose it was.
        self.owner[torch.where(slots % self.block_size == 0, slots // self.block_size, absent)] = -1
        ring = self._continued(start, active, prefilling, block_table, request, rows)

        # Nothing is matched before min_context. To record what leads up to it would cost a growing
        # sequence the reading of its band apart, for reuse that is worth little at that length.
        wants = active & (ring < 0) & (length >= self.config.min_context)
        fresh = self._fresh(ring, wants)
        ring = torch.where(wants, fresh, ring)

        index = torch.where(ring >= 0, ring, self.rings)
        self.first[index] = torch.where(wants, torch.clamp(length - self.config.window, min=start), self.first[index])
        self.last[index] = length - 1
        self.last_block[index] = self._block(block_table, length - 1)
        self.used[index] = self.step
        if request is not None:
            self.request[index] = request
        self.last[-1] = self.request[-1] = -1

        block = torch.where(slots >= 0, slots // self.block_size, absent)
        self.owner[block] = ring[row_of_token]
        self.owner[-1] = -1
        # A prompt is read exactly, also where its last chunk is a single token.
        return Assignment(ring, torch.where((ring >= 0) & ~prefilling, self.first[index], length))

    def states(self) -> dict[str, int]:
        """Rings by state: used in the latest step, idle (kept from an earlier one), free."""
        used = self.used[:-1]
        active = int((used == self.step).sum()) if self.step else 0
        free = int((used <= 0).sum())
        return {"active": active, "idle": self.rings - active - free, "free": free}

    def _block(self, block_table: Tensor, position: Tensor) -> Tensor:
        column = torch.clamp(position, min=0) // self.block_size
        return block_table.gather(1, column[:, None].to(torch.int64))[:, 0].to(torch.int64)

    def _continued(self, start, active, prefilling, block_table, request, rows) -> Tensor:
        """`[B]` ring that each row continues, -1 for none; no ring appears twice."""
        block = self._block(block_table, start - 1)
        ring = torch.where(start > 0, self.owner[block], -1)
        index = torch.where(ring >= 0, ring, self.rings)
        ok = active & (ring >= 0) & (self.last[index] == start - 1) & (self.last_block[index] == block)
        if request is not None:
            ok &= self.request[index] == request
        # A decoding row has lived before; a prefilling one may just have found its prefix in
        # the cache. The former wins, then the earlier row.
        index = torch.where(ok, index, self.rings)
        claim = rows + torch.where(prefilling, len(rows), 0)
        best = torch.full_like(self.last, 2 * len(rows)).scatter_reduce(0, index, claim, "amin")
        return torch.where(ok & (best[index] == claim), ring, -1)

    def _fresh(self, ring: Tensor, wants: Tensor) -> Tensor:
        """`[B]` ring for each row that wants one, longest unused first, -1 when they run out."""
        used = self.used.clone()
        used[torch.where(ring >= 0, ring, self.rings)] = self.step
        used[-1] = self.step
        order = torch.argsort(used, stable=True)
        available = (used <= self.step - self.idle_steps).sum()
        rank = torch.cumsum(wants, 0) - 1
        return torch.where(rank < available, order[torch.clamp(rank, 0, self.rings)], -1)
