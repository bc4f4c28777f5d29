"""Decoding with MAC on an NVIDIA GPU: the kernels and engines of one group of layers, in order.

Knows kernels and buffers, not vLLM. `paged` is the same in PyTorch.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_mac import audit
from vllm_mac.config import MacConfig
from vllm_mac.flashinfer_exact import FlashInferExact
from vllm_mac.kernels.audit import tally
from vllm_mac.kernels.complete import complete_misses
from vllm_mac.kernels.exact import Completion, PrefixProblem, TritonExact
from vllm_mac.kernels.hit import Workspace, decode_hits
from vllm_mac.ring import RingStore
from vllm_mac.rope import Rotary

ENGINES = {"flashinfer": FlashInferExact, "triton": TritonExact}


class Decoder:
    """Decodes for all layers that share their block tables and shapes.

    `begin_step` is called once a step, `decode` for each layer after it. Neither allocates or
    waits for the device, and `decode` may be captured in a CUDA graph. Calls must not overlap.

    position: `[rows]` int32, position that each row decodes, -1 for padding. ring, first:
    `[rows]` int32 as `kernels.assign` writes them. slack: `[rows]` float32, see `decode_hits`.
    spared: `[rows]` int32, 0 for rows whose hits are audited in every step, -1 for the others; without effect
    where the configuration has no audits. All are written by the caller; slack and spared begin as 1 and -1, and
    need writing only when they change.
    """

    def __init__(self, problem: PrefixProblem, config: MacConfig, device: torch.device):
        self.problem = problem
        self.names: tuple[str, ...] | None = None  # of the layers it decodes for
        self.warm = False  # whether `warmup` has been through it
        rows, heads, d = problem.max_rows, problem.heads, problem.head_size
        self.position, self.ring, self.first = (
            torch.full((rows,), -1, dtype=torch.int32, device=device) for _ in "prf"
        )
        self.slack = torch.ones(rows, dtype=torch.float32, device=device)
        self.spared = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._exact = ENGINES[config.miss_engine](problem, device)
        self._completes = isinstance(self._exact, TritonExact)
        self._work = Workspace.allocate(rows, heads, problem.kv_heads, d, device, whole=self._completes)
        if not self._completes:
            self._prefix_out = torch.empty(rows, heads, d, dtype=problem.dtype, device=device)
            self._prefix_lse = torch.empty(rows, heads, dtype=torch.float32, device=device)
        self._auditor = Auditor(problem, device) if config.audit else None

    @property
    def all_triton(self) -> bool:
        """Whether a step launches kernels of Triton's only."""
        return self._completes

    @property
    def plans_on_host(self) -> bool:
        """Whether the engine for misses makes a plan on the host in every step, one for each number of rows."""
        return isinstance(self._exact, FlashInferExact) and not self._exact.device_planned

    def lasting(self) -> dict[str, Tensor]:
        """By name, what a step must find as the step before left it, or as it was made: counters of arrival, which
        are all 0 between steps, constants, and what is written when it changes. Whatever else there is, a step
        writes before it reads it."""
        found = {"hits_arrived": self._work.arrived, "slack": self.slack, "spared": self.spared}
        found |= self._exact.lasting()
        if self._auditor is not None:
            found |= self._auditor.lasting()
        return found

    def begin_step(self, block_table: Tensor, kv: Tensor, audited: bool = False) -> None:
        """block_table: `[B, *]` int32. kv: any layer's cache, `[blocks, K, page, 2 D]`. audited: whether all rows
        are in this step, instead of those that `spared` does not spare, in a decoder whose configuration says that
        rows may be."""
        self._exact.begin_step(block_table, self.position[: len(block_table)], kv)
        if self._auditor is not None:
            self._auditor.begin_step(self.position, None if audited else self.spared)

    def decode(
        self, query: Tensor, kv: Tensor, block_table: Tensor, store: RingStore, config: MacConfig, rotary: Rotary,
        counts: Tensor, out: Tensor, audited: Tensor | None = None, paused: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One layer's step: match, amend, complete; misses read their prefix.

        query, out: `[B, H, D]`, after RoPE. kv: `[blocks, K, page, 2 D]`. block_table: that of
        `begin_step`. config: the layer's own, whose threshold may differ. counts: `[len(Count)]` int64, see
        `counters.Count`. audited: the layer's histograms (`audit.histograms`), added to;
        required where steps may be audited. paused: `[1]` int32, nonzero for a layer that is not to
        match, or None for one that always may.
        """
        rows = len(query)
        position, ring, hit = self.position[:rows], self.ring[:rows], self._work.hit[:rows]
        rope = rotation(rotary)
        decode_hits(
            query, position, ring, self.first[:rows], self.slack[:rows], block_table, kv, store, config,
            self.problem.scale, self._work, out, counts, **rope, paused=paused,
        )  # fmt: skip
        if self._completes:
            completion = Completion(ring, self._work, store, **rope)
            self._exact.run(query, kv, block_table, position, hit, out, None, completion)
        else:
            prefix = self._prefix_out[:rows], self._prefix_lse[:rows]
            self._exact.run(query, kv, block_table, position, hit, *prefix)
            complete_misses(query, position, ring, store, *prefix, self._work, out, **rope)
        if self._auditor is not None:
            self._auditor.run(query, kv, block_table, ring, self._work, store, out, audited)


class Auditor:
    """Computes the hits of audited rows exactly, beside a decoder, and counts how far off they were.

    Two launches a layer, in every step, so that one CUDA graph serves all steps: for rows that
    are not audited they find no position to work on.
    """

    def __init__(self, problem: PrefixProblem, device: torch.device):
        rows, heads = problem.max_rows, problem.heads
        self._whole = TritonExact(replace(problem, band=0, sink=0), device, of_hits=True)
        # Of audited rows; -1 for all others.
        self._position = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._out = torch.empty(rows, heads, problem.head_size, dtype=torch.float32, device=device)
        self._lse = torch.empty(rows, heads, dtype=torch.float32, device=device)
        self._edges = audit.edges(device)

    def lasting(self) -> dict[str, Tensor]:
        """See `Decoder.lasting`."""
        return {"edges": self._edges} | {f"audits_{name}": x for name, x in self._whole.lasting().items()}

    def begin_step(self, position: Tensor, spared: Tensor | None) -> None:
        """position: `[rows]` int32, all of the decoder's. spared: `[rows]` int32, -1 for rows that are not audited and
        0 for those that are; None: all are."""
        if spared is None:
            self._position.copy_(position)
        else:
            torch.bitwise_or(position, spared, out=self._position)  # -1 has all bits set

    def run(
        self,
        query: Tensor,
        kv: Tensor,
        block_table: Tensor,
        ring: Tensor,
        work: Workspace,
        store: RingStore,
        out: Tensor,
        counts: Tensor,
    ) -> None:
        """After a layer's step, which left `out` and `work`. counts: `[H + 2, BUCKETS]` int64."""
        rows = len(query)
        position, hit, exact = self._position[:rows], work.hit[:rows], self._out[:rows]
        self._whole.run(query, kv, block_table, position, hit, exact, self._lse[:rows])
        tally(position, ring, hit, work.source[:rows], store.chain, out, exact, self._edges, counts, pdl=work.pdl)


def rotation(rotary: Rotary) -> dict:
    """A rotation as the kernels take it."""
    if rotary.module is None:
        return dict(cos_sin=None)
    return dict(cos_sin=rotary.module.cos_sin_cache, is_neox=rotary.module.is_neox_style)
