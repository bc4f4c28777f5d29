"""One piece of memory for the counters and histograms of a worker's layers: one copy takes them to the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_mac.audit import histogram_shape


class Totals(NamedTuple):
    """all: `[n]` int64. counts: of each layer `[counters]`. audited: of each layer its histograms
    (`audit.histograms`), empty where nothing is audited. These are views of `all`, so
    `storage_offset()` says where in it they begin."""

    all: Tensor
    counts: list[Tensor]
    audited: list[Tensor]


def allocate(counters: int, heads: Sequence[int], audited: bool, device) -> Totals:
    """Zeros for layers of these query heads each."""
    shapes = [(counters,)] * len(heads) + [histogram_shape(count) for count in heads if audited]
    # Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes, and what compiles kernels
    # before serving goes through one layer of a kind.
    sizes = [size + size % 2 for size in (torch.Size(shape).numel() for shape in shapes)]
    every = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    pieces = [
        piece[: torch.Size(shape).numel()].view(shape) for piece, shape in zip(every.split(sizes), shapes, strict=True)
    ]
    return Totals(every, pieces[: len(heads)], pieces[len(heads) :])
