"""Prefill: the rings of rows that are prefilled get the summaries of their last tokens.

FlashInfer's own prefill leaves no summary. So a chunk is followed by one more attention call over its last `window`
queries, cut to the prefix, and `kernels.record` writes what it gives into the rings.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_mac.kernels.record import record_prefill
from vllm_mac.state import Geometry, LayerState, Seeds


@dataclass(frozen=True, slots=True)
class Seeding:
    """A planned attention call over the tokens of a step that rings record."""

    seeds: Seeds
    geometry: Geometry
    wrapper: BatchPrefillWithPagedKVCacheWrapper

    def record(self, layer: LayerState, query: Tensor, kv: Tensor) -> None:
        """Write a layer's summaries into its rings. query: `[N, H, D]` of the whole batch, after RoPE.

        kv: `[blocks, K, page, 2 D]`.
        """
        pages = kv.transpose(1, 2)  # [blocks, page, K, 2 D]
        parts = pages.split(self.geometry.head_size, -1)
        out, lse = self.wrapper.run(query[self.seeds.token], parts, return_lse=True)
        record_prefill(layer, self.seeds, query, kv, out, lse, self.geometry.scale)


class SeedPlanner:
    """Plans the attention call of each step with prefills, for one KV-cache group."""

    def __init__(self, geometry: Geometry, window: int, dtypes: tuple, workspace: Callable[[], Tensor]):
        """dtypes: of queries and of the KV cache, as FlashInfer's `plan` takes them. workspace: gives FlashInfer's."""
        self._geometry, self._window, self._dtypes, self._workspace = geometry, window, dtypes, workspace
        self._wrapper: BatchPrefillWithPagedKVCacheWrapper | None = None

    def plan(self, common: CommonAttentionMetadata, decodes: int, rings: np.ndarray, ring: Tensor) -> Seeding | None:
        """Plan the attention over the last `window` queries of each chunk that a ring records, cut to the prefix.

        decodes: rows that decode, which come first. rings: `[B]`, below 0 for rows that record nothing, among them
        those that verify speculated tokens: the host knows the lengths of all others. ring: `[B]` int32, the same on
        the device. None where nothing is recorded.
        """
        g, page, first, device = self._geometry, self._geometry.page_size, self._geometry.prefix_start, ring.device
        begin = common.query_start_loc_cpu.numpy()[decodes : common.num_reqs + 1].astype(np.int64)
        length = common.seq_lens_cpu_upper_bound.numpy()[decodes : common.num_reqs].astype(np.int64)
        count = np.diff(begin)
        taken = np.where(rings[decodes:] >= 0, np.minimum(count, self._window), 0)
        total = int(taken.sum())
        if not total:
            return None
        row = np.repeat(np.arange(decodes, common.num_reqs), taken)
        back = np.concatenate([np.arange(n, 0, -1) for n in taken])  # tokens from the end of the chunk
        facts = np.stack((np.repeat(begin[1:], taken) - back, row, back)).astype(np.int32)
        token, row, back = torch.from_numpy(facts).pin_memory().to(device, non_blocking=True)
        position = common.seq_lens[row] - back
        # With keys up to `length - band`, causal masking ends query p's keys at p + 1 - band.
        # A row without any gets one, and nobody reads the result.
        keys = np.where(taken > 0, np.maximum(length - g.band - first, 1), 1)
        pages = -(-keys // page)
        indptr = np.concatenate(([0], np.cumsum(pages)))
        table = common.block_table_tensor[decodes : common.num_reqs, first // page :]
        indices = torch.cat([table[i, :n] for i, n in enumerate(pages)])
        as_ints = lambda x: torch.from_numpy(x.astype(np.int32)).pin_memory()
        if self._wrapper is None:
            self._wrapper = BatchPrefillWithPagedKVCacheWrapper(self._workspace(), "NHD")
        query_dtype, kv_dtype = self._dtypes
        self._wrapper.plan(
            as_ints(np.concatenate(([0], np.cumsum(taken)))), as_ints(indptr), indices, as_ints(keys - (pages - 1) * page),
            g.heads, g.kv_heads, g.head_size, page, causal=True, sm_scale=g.scale,
            q_data_type=query_dtype, kv_data_type=kv_dtype,
        )  # fmt: skip
        return Seeding(Seeds(token, row, position, ring, common.block_table_tensor), g, self._wrapper)
