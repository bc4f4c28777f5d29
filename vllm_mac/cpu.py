"""MAC as a backend of vLLM's CPU engine: the method in PyTorch, all else as CPU_ATTN runs it.

Served layers keep their KV cache in plain rows (`[blocks, K, block, 2 D]`, keys then values),
not in the packed form of vLLM's CPU kernels, and read it with `paged`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_mac import audit, paged
from vllm_mac.capabilities import BUILDER, pinning
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.steps import Group, Step
from vllm_mac.support import MacImpl, MacSupport


class MacCPUBackend(MacSupport, CPUAttentionBackend):
    @classmethod
    def supports_sink(cls) -> bool:
        return True  # CPU_ATTN attends to them in its kernel, though it does not say so

    @staticmethod
    def get_impl_cls() -> type["MacCPUImpl"]:
        return MacCPUImpl

    @staticmethod
    def get_builder_cls() -> type["MacCPUMetadataBuilder"]:
        return MacCPUMetadataBuilder


@dataclass
class MacCPUMetadata(CPUAttentionMetadata):
    step: Step | None = None


@pinning(BUILDER)
class MacCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.group = Group(layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MacCPUMetadata:
        base = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return MacCPUMetadata(**vars(base), step=self.group.step(common_attn_metadata))

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> CPUAttentionMetadata:
        # Layers of a draft model are exact, and may share this builder with layers that are not: no ring may
        # count what only the draft reads.
        return super().build(0, common_attn_metadata, fast_build=True)


class MacCPUImpl(MacImpl, CPUAttentionBackendImpl):
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.mac.load(act_dtype, torch.device("cpu"))

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        if not self.mac.served:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        token = (slot_mapping >= 0).nonzero()[:, 0]
        slot, size = slot_mapping[token], kv_cache.shape[2]
        rows = torch.cat((key[token], value[token]), -1)
        kv_cache[slot // size, :, slot % size] = rows.to(kv_cache.dtype)

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: MacCPUMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None or not self.mac.served:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("MAC does not quantise its output")
        if getattr(attn_metadata, "step", None) is None:
            raise self._unprepared()
        step, blocks = attn_metadata.step, attn_metadata.block_table
        for chunk in step.chunks:
            output[chunk.begin : chunk.end] = self._prefill(query, kv_cache, blocks[chunk.row], chunk)
        if len(step.row):
            output[step.token] = self._decode(query[step.token], kv_cache, blocks[step.row], step)
        return output

    def _prefill(self, query, kv_cache, blocks, chunk) -> Tensor:
        mac, tokens = self.mac, slice(chunk.begin, chunk.end)
        position = torch.arange(chunk.start, chunk.start + chunk.end - chunk.begin)
        pre_query = mac.rotary.undo(query[tokens], position) if chunk.ring >= 0 else None
        return paged.prefill(
            chunk.start, query[tokens], pre_query, kv_cache, blocks, chunk.ring, mac.store, mac.config, self.scale
        ).to(query.dtype)

    def _decode(self, query, kv_cache, blocks, step: Step) -> Tensor:
        mac = self.mac
        pre_query = mac.rotary.undo(query, step.position)
        paused = mac.paused is not None and bool(mac.paused)
        # A layer over its budget records, but may read nothing of what it recorded.
        first = step.position if paused else step.first
        decoded = paged.decode(
            step.position, query, pre_query, kv_cache, blocks, step.ring, first, mac.store, mac.config, self.scale,
            step.slack,
        )  # fmt: skip
        out = decoded.out.to(query.dtype)
        length = step.position + 1
        opted_out = step.ring == OPTED_OUT
        short = ~opted_out & (length < mac.config.min_context)
        absent = ~opted_out & ~short & (step.ring < 0)
        hits = decoded.hit.sum(1) * self.num_queries_per_kv
        able = ~opted_out & ~short & ~absent
        over, tried = able & paused, able & (not paused)
        read = decoded.read.sum()
        mac.counts[Count.HIT] += hits.sum()
        mac.counts[Count.MISS] += (self.num_heads - hits)[tried].sum()
        for count, rows in (
            (Count.REQUEST, opted_out), (Count.SHORT_CONTEXT, short), (Count.NO_RING, absent),
            (Count.OVER_BUDGET, over),
        ):  # fmt: skip
            mac.counts[count] += rows.sum() * self.num_heads
        mac.counts[Count.READ] += read
        mac.counts[Count.SKIPPED] += length.sum() * self.num_kv_heads - read
        if step.audited.any():
            wanted = decoded.hit & step.audited[:, None]
            exact = paged.exact(step.position, query, kv_cache, blocks, wanted, self.scale)
            position = torch.where(step.audited, step.position, -1)
            audit.tally(
                position, step.ring, decoded.hit, decoded.source, mac.store.chain, out, exact,
                audit.edges(out.device), mac.audited,
            )  # fmt: skip
        return out
