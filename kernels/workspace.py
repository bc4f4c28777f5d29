"""The buffers that the kernels of one step share."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_mac.state import Geometry


@dataclass(slots=True)
class Workspace:
    """What one step leaves for its later kernels, and room to work in. Layers may share one.

    source: `[B, H]` int32, position matched by each head or -1. hit: `[B, K]` int32, 1 where all
    heads of the group matched. Rows whose position is -1 are not written.
    part_out: `[B, H, 2, D]` float32, part_lse: `[B, H, 2]` float32 natural log, of missed groups
    only: attention over `[sink, prefix_start)`, and over band and sink together. Neither is written for a row
    that is computed whole and has no sink.
    key, key_lse, band_acc, band_sum: partial results of the programs of a group. arrived: `[B, K]` int32,
    programs of a group that are done; all 0 between steps.
    scale: factor of the scores. whole: `decoder.MissEngine.whole_rows` of the engine that finishes the step; the hit
    path then leaves only the sink of a row without a ring.
    slots: programs that the device runs at once. pdl: launch the kernels before their predecessors
    end (programmatic dependent launch); they wait before they read. tune: overrides `hit._tune`.
    options: how each variant of the kernel is launched, see `launch.launch`.
    """

    source: Tensor
    hit: Tensor
    part_out: Tensor
    part_lse: Tensor
    key: Tensor
    key_lse: Tensor
    band_acc: Tensor
    band_sum: Tensor
    arrived: Tensor
    scale: float
    whole: bool = False
    slots: int = 396
    pdl: bool = False
    tune: dict | None = None
    options: dict = field(default_factory=dict)

    MAX_SPLITS = 16
    MAX_BANDS = 8

    @classmethod
    def allocate(cls, geometry: Geometry, device, whole: bool = False) -> "Workspace":
        """For batches of at most `max_rows` rows, padding included."""
        on, g = torch.device(device), geometry
        rows, heads = g.max_rows, g.heads

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=on)

        gpu = torch.cuda.get_device_properties(on) if on.type == "cuda" else None
        return cls(
            source=empty(rows, heads, dtype=torch.int32),
            hit=empty(rows, g.kv_heads, dtype=torch.int32),
            part_out=empty(rows, heads, 2, g.head_size),
            part_lse=empty(rows, heads, 2),
            key=empty(rows, heads, cls.MAX_SPLITS, dtype=torch.int64),
            key_lse=empty(rows, heads, cls.MAX_SPLITS),
            band_acc=empty(rows, heads, cls.MAX_BANDS, g.head_size),
            band_sum=empty(rows, heads, cls.MAX_BANDS, 2),
            arrived=torch.zeros(rows, g.kv_heads, dtype=torch.int32, device=on),
            scale=g.scale,
            whole=whole,
            slots=3 * gpu.multi_processor_count if gpu else 4,
            pdl=gpu is not None and gpu.major >= 9,
        )
