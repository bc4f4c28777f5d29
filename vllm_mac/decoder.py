"""Decoding with MAC on an NVIDIA GPU: the kernels and engines of one group of layers, in order.

Knows kernels and buffers, not vLLM. `cpu_decoder` is the same in PyTorch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vllm_mac import audit
from vllm_mac.config import MacConfig
from vllm_mac.flashinfer_exact import FlashInferExact
from vllm_mac.kernels.audit import tally
from vllm_mac.kernels.exact import ExactHits, TritonExact
from vllm_mac.kernels.hit import decode_hits
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.state import Geometry, LayerState, Rows


class MissEngine(Protocol):
    """Computes the KV groups that missed, for all layers of a decoder."""

    @property
    def whole_rows(self) -> bool:
        """Whether it reads a row without a ring in one go, except the sink. The hit path then leaves only the sink of
        such a row (`Workspace.whole`)."""

    @property
    def all_triton(self) -> bool:
        """Whether it launches only Triton's kernels."""

    @property
    def plans_on_host(self) -> bool:
        """Whether it makes a plan on the host in every step, one for each number of rows."""

    def lasting(self) -> dict[str, Tensor]:
        """By name, the buffers that a step must find as the step before left them; see `Decoder.lasting`."""

    def begin_step(self, rows: Rows, kv: Tensor) -> None:
        """Once a step, before its layers. kv: the cache of any layer. May be called outside a CUDA graph only."""

    def finish(self, layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, work: Workspace, out: Tensor) -> None:
        """Complete and record the groups that `decode_hits` left open in `work`, in the same step.

        Writes `out` `[B, H, D]`, in query's dtype, of the groups that missed. Allocates nothing and waits for nothing,
        so it may be captured in a CUDA graph. Other arguments: as for `kernels.hit.decode_hits`.
        """


ENGINES: dict[str, Callable[[Geometry, torch.device], MissEngine]] = {
    "flashinfer": FlashInferExact,
    "triton": TritonExact,
}


class Decoder:
    """Decodes for all layers that share their block tables and shapes.

    `begin_step` is called once a step, `decode` for each layer after it. Neither allocates or
    waits for the device, and `decode` may be captured in a CUDA graph. Calls must not overlap.

    position: `[max_rows]` int32, position that each row decodes, -1 for padding. ring, first:
    `[max_rows]` int32 as `kernels.assign` writes them. slack: `[max_rows]` float32, see `state.Rows`.
    spared: `[max_rows]` int32, 0 for rows whose hits are audited in every step, -1 for the others; without effect
    where the configuration has no audits. The caller writes all of them; slack and spared begin as 1 and -1, and
    are written only when they change.
    """

    def __init__(self, geometry: Geometry, config: MacConfig, device: torch.device):
        self.geometry = geometry
        self.names: tuple[str, ...] | None = None  # of the layers it decodes for
        self.warm = False  # whether `warmup` has launched its kernels
        rows = geometry.max_rows
        self.position, self.ring, self.first = (
            torch.full((rows,), -1, dtype=torch.int32, device=device) for _ in "prf"
        )
        self.slack = torch.ones(rows, dtype=torch.float32, device=device)
        self.spared = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._misses = ENGINES[config.miss_engine](geometry, device)
        self._work = Workspace.allocate(geometry, device, whole=self._misses.whole_rows)
        self._auditor = Auditor(geometry, device) if config.audit else None

    @property
    def all_triton(self) -> bool:
        """See `MissEngine`."""
        return self._misses.all_triton

    @property
    def plans_on_host(self) -> bool:
        """See `MissEngine`."""
        return self._misses.plans_on_host

    def lasting(self) -> dict[str, Tensor]:
        """By name, the buffers that a step must find as the step before left them, or as they were made.

        These are arrival counters, which are all 0 between steps, constants, and buffers that are written only when
        they change. A step writes every other buffer before it reads it.
        """
        found = {"hits_arrived": self._work.arrived, "slack": self.slack, "spared": self.spared}
        found |= self._misses.lasting()
        if self._auditor is not None:
            found |= self._auditor.lasting()
        return found

    def rows(self, block_table: Tensor) -> Rows:
        """The first rows of the decoder's buffers, as many as `block_table` `[B, *]` int32 has."""
        n = len(block_table)
        return Rows(self.position[:n], self.ring[:n], self.first[:n], self.slack[:n], block_table)

    def begin_step(self, rows: Rows, kv: Tensor, audited: bool = False) -> None:
        """rows: as `rows` makes them. kv: any layer's cache, `[blocks, K, page, 2 D]`. audited: whether the step
        audits all rows, not only those that `spared` does not spare; for a decoder whose configuration has audits."""
        self._misses.begin_step(rows, kv)
        if self._auditor is not None:
            self._auditor.begin_step(self.position, None if audited else self.spared)

    def decode(self, layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, out: Tensor) -> None:
        """One layer's step: match, amend, complete; the miss engine computes the groups that missed.

        layer: its threshold may differ from the decoder's configuration; its `audited` is required where steps may
        be audited. rows: those of `begin_step`. query, out: `[B, H, D]`, after RoPE. kv: `[blocks, K, page, 2 D]`.
        """
        decode_hits(layer, rows, query, kv, self._work, out)
        self._misses.finish(layer, rows, query, kv, self._work, out)
        if self._auditor is not None:
            self._auditor.finish(layer, rows, query, kv, self._work, out)


class Auditor:
    """Computes the hits of audited rows exactly, beside a decoder, and counts how far off they were.

    Two launches a layer, in every step, so that one CUDA graph serves all steps: for rows that
    are not audited they find no position to work on.
    """

    def __init__(self, geometry: Geometry, device: torch.device):
        rows, heads = geometry.max_rows, geometry.heads
        self._exact = ExactHits(replace(geometry, band=0, sink=0), device)
        # Of audited rows; -1 for all others.
        self._position = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._out = torch.empty(rows, heads, geometry.head_size, dtype=torch.float32, device=device)
        self._edges = audit.edges(device)

    def lasting(self) -> dict[str, Tensor]:
        """See `Decoder.lasting`."""
        return {"edges": self._edges} | {f"audits_{name}": x for name, x in self._exact.lasting().items()}

    def begin_step(self, position: Tensor, spared: Tensor | None) -> None:
        """position: `[max_rows]` int32, the decoder's. spared: `[max_rows]` int32, -1 for rows that are not audited
        and 0 for those that are; None: all are."""
        if spared is None:
            self._position.copy_(position)
        else:
            torch.bitwise_or(position, spared, out=self._position)  # -1 has all bits set

    def finish(self, layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, work: Workspace, out: Tensor) -> None:
        """As `MissEngine.finish`, after it: adds to the layer's histograms, and changes nothing else."""
        n = len(query)
        rows, exact = replace(rows, position=self._position[:n]), self._out[:n]
        self._exact.finish(layer, rows, query, kv, work, exact)
        tally(layer, rows, work, out, exact, self._edges)
