"""Rings: how they are stored, and what a request may read in its ring.

`state.RingStore` is one layer's memory. `owners.RingOwners` decides on the host which request holds
which ring. `RingTable` keeps, on the device, which positions of each ring are recorded: lengths
are known there first, under asynchronous scheduling and speculation.

Letters: `R` rings, `W` window, `H` query heads, `D` head size, `B` rows of a batch. The entry of
position `p` lies in slot `p mod W`. Position `p` of ring `r` may be read at position `m` when
`first[r] <= p`, `m - W <= p < m`: nothing else marks an entry as valid, so nothing is erased when
a ring changes hands.
"""

import torch
from torch import Tensor

from vllm_mac.config import MacConfig


def ring_bytes(
    heads: int, window: int, head_size: int, dtype: torch.dtype, out_dtype: torch.dtype | None = None
) -> int:
    """Bytes of one ring of one layer, its dtypes as for `state.RingStore.allocate`."""
    return heads * window * (head_size * (dtype.itemsize + (out_dtype or dtype).itemsize) + 4 + 4)


def ring_dtypes(config: MacConfig, model_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of a ring's queries and of its outputs.

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


class RingTable:
    """The positions that each of `R` rings has recorded.

    first, last: `[R + 1]` int64 on the device; a ring holds positions `first..last` without a gap,
        as far as they lie within the window. The last element stands for rows without a ring.
    """

    def __init__(self, rings: int, window: int, device):
        self.rings, self.window = rings, window
        self.first, self.last = (torch.zeros(rings + 1, dtype=torch.int64, device=device) for _ in "fl")

    def assign(
        self, start: Tensor, length: Tensor, ring: Tensor, fresh: Tensor, prefilling: Tensor, skips: Tensor
    ) -> Tensor:
        """The oldest position that each row may read, `[B]` int64; note what the row will record.

        A row whose request has just been given its ring may read nothing of what lies there. Neither
        may a row that begins past what its ring has recorded. A row that begins before the end of it
        goes on: its request was rejected some speculated tokens, or took the ring over from an ended
        request whose first `start` tokens are its own. What was recorded past `start` is recorded
        anew before any row may read it, and the positions whose slots it took are lost; where those
        are all, the row begins anew.

        start, length: `[B]` int64, first position of the row and sequence length after it
            (`length == start` for padding).
        ring: `[B]` int64, the ring of the row's request, -1 for none; no ring twice.
        fresh: `[B]` bool, whether the request was given the ring in this step, with nothing in it.
        prefilling, skips: `[B]` bool, rows of the prompt, which read nothing, and rows that neither
            read nor record; the answer is then `length`, as for rows without a ring.
        """
        active = (ring >= 0) & (length > start) & (start >= 0)
        index = torch.where(active, ring, self.rings)
        first, last = self.first[index], self.last[index]
        continues = active & ~fresh & (last >= start - 1) & (last + 1 - self.window < start)
        first = torch.where(continues, torch.maximum(first, last + 1 - self.window), start)
        end = torch.where(continues, torch.maximum(last, length - 1), length - 1)
        self.first[index] = first
        self.last[index] = torch.where(skips, start - 1, end)  # the next row begins past it
        return torch.where(active & ~prefilling & ~skips, first, length)
