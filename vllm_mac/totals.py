"""One tensor for the counters and histograms of a worker's layers, so that one copy brings them to the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_mac.audit import histogram_shape


class Totals(NamedTuple):
    """all: `[n]` int64. counts: of each layer `[counters]`. audited: of each layer its histograms
    (`audit.histograms`), empty where nothing is audited. These are views of `all`:
    `storage_offset()` is where in it they begin."""

    all: Tensor
    counts: list[Tensor]
    audited: list[Tensor]


def allocate(counters: int, heads: Sequence[int], audited: bool, device) -> Totals:
    """Zeros for layers of these query heads each."""
    shapes = [(counters,)] * len(heads) + [histogram_shape(count) for count in heads if audited]
    # Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes, and the warm-up launches kernels
    # for one layer of a kind only.
    sizes = [size + size % 2 for size in (torch.Size(shape).numel() for shape in shapes)]
    every = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    views = [
        view[: torch.Size(shape).numel()].view(shape) for view, shape in zip(every.split(sizes), shapes, strict=True)
    ]
    return Totals(every, views[: len(heads)], views[len(heads) :])
