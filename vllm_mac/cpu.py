"""MAC as a backend of vLLM's CPU engine: the method in PyTorch, all else as CPU_ATTN runs it.

Layers that MAC runs keep their KV cache in plain rows (`[blocks, K, block, 2 D]`, keys then values),
not in the packed form of vLLM's CPU kernels, and read it with `cpu_decoder`.
"""

from dataclasses import dataclass, replace

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

from vllm_mac import cpu_decoder, cpu_lookup
from vllm_mac.capabilities import BUILDER, index_page, pinning
from vllm_mac.index_pages import in_rows
from vllm_mac.key_index import PageLayout
from vllm_mac.kv_group import Group, Step
from vllm_mac.layers import index_rule
from vllm_mac.mixins import MacImpl, MacSupport


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
    _several = 1  # pages of a block

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        # vLLM's runner for CPUs zeroes what is at a block's number in a cache, so vLLM must not split blocks here.
        page = index_page(kv_cache_spec.block_size, "cpu") if in_rows() else kv_cache_spec.block_size
        self._several = kv_cache_spec.block_size // page
        super().__init__(kv_cache_spec.copy_with_new_block_size(page), layer_names, vllm_config, device)
        self.group = Group(layer_names, vllm_config, device)
        for layer in self.group.layers if self._several > 1 else ():
            layer.page = page

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MacCPUMetadata:
        base = super().build(common_prefix_len, self._in_pages(common_attn_metadata), fast_build)
        return MacCPUMetadata(**vars(base), step=self.group.step(common_attn_metadata, base.block_table))

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> CPUAttentionMetadata:
        # Layers of a draft model are exact, and may share this builder with layers that are not: no ring may
        # count what only the draft reads.
        return super().build(0, self._in_pages(common_attn_metadata), fast_build=True)

    def _in_pages(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The same with block tables of pages, of which a block is several. Slots are the same."""
        if self._several == 1:
            return common
        pages = common.block_table_tensor[..., None] * self._several + torch.arange(self._several, dtype=torch.int32)
        return replace(common, block_table_tensor=pages.flatten(1))


class MacCPUImpl(MacImpl, CPUAttentionBackendImpl):
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.mac.load(act_dtype, torch.device("cpu"))

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        kv_cache = self.mac.rows(kv_cache)
        if not self.mac.served:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        token = (slot_mapping >= 0).nonzero()[:, 0]
        slot, size = slot_mapping[token], kv_cache.shape[2]
        rows = torch.cat((key[token], value[token]), -1)
        kv_cache[slot // size, :, slot % size] = rows.to(kv_cache.dtype)
        if (index := self.mac.index) is not None:
            cpu_lookup.write(index, slot_mapping, kv_cache, PageLayout.of(kv_cache, index.maps))

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
        kv_cache = self.mac.rows(kv_cache)
        if attn_metadata is None or not self.mac.served:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("MAC does not quantise its output")
        if getattr(attn_metadata, "step", None) is None:
            raise self._unprepared()
        state, step = self.mac.state, attn_metadata.step
        if self.mac.index is not None:
            return self._look_up(step, query, kv_cache, output)
        for row in step.chunks:
            tokens = slice(row.begin, row.end)
            output[tokens] = cpu_decoder.prefill(state, row.chunk, query[tokens], kv_cache, self.scale)
        if len(step.token):
            output[step.token] = cpu_decoder.decode(
                state, step.rows, step.audited, query[step.token], kv_cache, self.scale
            )
        return output

    def _look_up(self, step: Step, query: Tensor, kv_cache: Tensor, output: Tensor) -> Tensor:
        """`forward` of a layer that decodes by the index of keys."""
        index = self.mac.index
        layout = PageLayout.of(kv_cache, index.maps)
        for row in step.chunks:
            tokens = slice(row.begin, row.end)
            output[tokens] = cpu_lookup.prefill(row.chunk, query[tokens], kv_cache, self.scale)
        if step.learning is not None:
            step.learning.add(self.mac.name, index.maps, query, kv_cache)
        if len(step.token):
            rule = index_rule(self.mac)
            output[step.token] = cpu_lookup.decode(index, step.rows, query[step.token], kv_cache, layout, rule)
        return output
