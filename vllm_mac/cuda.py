"""MAC as a backend of vLLM's CUDA engine: FlashInfer's backend, with decode rows by `fused`.

Prefill, layers that MAC does not serve and everything else run as FlashInfer's backend runs
them. A prefill chunk is followed by one more attention call over its last `window` queries,
which leaves their summaries in the row's ring.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferDecodeKernel,
    FlashInferImpl,
    FlashInferMetadata,
    FlashInferMetadataBuilder,
)

from vllm_mac.capabilities import BUILDER, pinning
from vllm_mac.fused import Decoder, rotation
from vllm_mac.kernels.assign import FRESH, PREFILLING, SKIPS, assign
from vllm_mac.kernels.exact import PrefixProblem
from vllm_mac.kernels.record import record_prefill
from vllm_mac.layers import MacLayer, mac_layers
from vllm_mac.requests import RowRings, executing, row_rings
from vllm_mac.steps import Group
from vllm_mac.support import MacImpl, MacSupport
from vllm_mac.warmup import warm_up


class MacCUDABackend(MacSupport, FlashInferBackend):
    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [size for size in FlashInferBackend.get_supported_kernel_block_sizes(kv_cache_spec) if size <= 64]

    @staticmethod
    def get_impl_cls() -> type["MacCUDAImpl"]:
        return MacCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["MacCUDAMetadataBuilder"]:
        return MacCUDAMetadataBuilder


@dataclass(frozen=True, slots=True)
class Seeds:
    """The tokens of a batch whose summaries go into rings, and the attention call over them.

    token, row, position: `[T]` int32. ring: `[B]` int32. block_table: `[B, *]`.
    """

    wrapper: BatchPrefillWithPagedKVCacheWrapper
    token: Tensor
    row: Tensor
    position: Tensor
    ring: Tensor
    block_table: Tensor


@dataclass
class MacCUDAMetadata(FlashInferMetadata):
    """decoder: of the layers that MAC serves, None where it serves none of the group.
    block_table: `[num_decodes, *]`. rest: what is left for FlashInfer's backend to do."""

    decoder: Decoder | None = None
    block_table: Tensor | None = None
    rest: FlashInferMetadata | None = None
    seeds: Seeds | None = None


@pinning(BUILDER)
class MacCUDAMetadataBuilder(FlashInferMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec) -> int | None:
        return None

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.group = Group(layer_names, vllm_config, device)
        self.served = [layer for layer in self.group.layers if layer.served]
        self.decoder, self.all_served = None, False
        self._planned = torch.cuda.Event()
        if not self.served:
            return
        self.config = self.served[0].config
        self.decoder = decoder_of(self.served, self.page_size, layer_names)
        self._seed_wrapper: BatchPrefillWithPagedKVCacheWrapper | None = None
        # Position, ring and first of all rows of a batch; the decoder's hold those that decode, which come first.
        self._rows = [torch.zeros_like(self.decoder.position) for _ in range(3)]
        self._facts: dict[str, tuple[bytes, Tensor]] = {}
        # What the decoder's buffers hold, as it was made; an earlier builder may have served.
        with torch.inference_mode():  # as vLLM profiles, which may have made the decoder
            self.decoder.slack.fill_(1), self.decoder.spared.fill_(-1)
        self._told = {name: getattr(self.decoder, name).to("cpu", copy=True).numpy() for name in ("slack", "spared")}
        # Whatever else an engine runs before it serves, it makes its builders. Eager mode turns vLLM's own warm-up
        # off, but its first requests would wait for the compiler just as long.
        if vllm_config.kernel_config.enable_jit_warmup or vllm_config.model_config.enforce_eager:
            warm_up(self.decoder, self.served, self.group.new_table())
        self.all_served = len(self.served) == len(layer_names)
        if self.all_served:
            # Nobody runs the base's decode: let it make the metadata of XQA, which needs no
            # planning, instead of a plan.
            self.use_trtllm_decode_attention = self.use_xqa = True
            self.flashinfer_trtllm_api_decode_kernel = FlashInferDecodeKernel.XQA
            self.use_trtllm_gen_varlen_decode = False
        self.reorder_batch_threshold = 1
        self.supports_draft_decode_metadata_update = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MacCUDAMetadata:
        return self._build(common_attn_metadata, fast_build, capture=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> MacCUDAMetadata:
        return self._build(common_attn_metadata, False, capture=True)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> FlashInferMetadata:
        # Layers of a draft model are exact, and may share this builder with layers that are not: no ring may
        # count what only the draft reads.
        return super().build(0, common_attn_metadata, fast_build=True)

    def _build(self, common: CommonAttentionMetadata, fast_build: bool, capture: bool) -> MacCUDAMetadata:
        decoding = self.all_served and common.max_query_len <= 1
        if decoding:
            metadata = self._of_decodes(common)
        else:
            # FlashInfer plans into one page-locked buffer a wrapper, which the device copies when it gets there: a plan
            # made before that would be read half old and half new. Hardly ever waits: the last step's copies come first.
            self._planned.synchronize()
            metadata = MacCUDAMetadata(**vars(super().build(0, common, fast_build)))
            self._planned.record()
        if not capture:
            self.group.tally_host(common)
        if self.decoder is None:
            return metadata
        decodes, rows, mixed = metadata.num_decodes, common.num_reqs, metadata.num_prefills > 0
        metadata.decoder = self.decoder
        metadata.block_table = common.block_table_tensor[:decodes]
        if mixed:
            metadata.rest = replace(
                metadata, num_decodes=0, num_decode_tokens=0, decode=None,
                num_actual_tokens=metadata.num_actual_tokens - metadata.num_decode_tokens,
            )  # fmt: skip
        decoder = self.decoder
        real = not capture and executing()
        if real:
            outputs = self._rows if mixed else (decoder.position, decoder.ring, decoder.first)
            rings = row_rings(common)
            assign(
                self.group.table, common.query_start_loc[: rows + 1], common.seq_lens[:rows],
                self._on_device("ring", rings.ring), self._on_device("flags", self._flags(common, rings)), *outputs,
            )  # fmt: skip
            if mixed:
                for mine, all_rows in zip((decoder.position, decoder.ring, decoder.first), outputs, strict=True):
                    mine[:decodes].copy_(all_rows[:decodes])
                metadata.seeds = self._seeds(common, decodes, np.where(rings.skips, -1, rings.ring))
                self._planned.record()
            self._tell("slack", rings.slack)
            if self.config.audit:
                self._tell("spared", np.where(rings.audited, 0, -1).astype(np.int32))
        else:
            # A graph is recorded, and a dummy batch run, over rows that do nothing; rings stay as they are.
            for tensor in (decoder.position, decoder.ring):
                tensor.fill_(-1)
        context = self.vllm_config.compilation_config.static_forward_context
        cache = context[self.served[0].name].kv_cache
        if decodes and cache.dim() == 4:  # vLLM builds for its estimates before there is a cache
            audited = real and self.group.begin_decodes()
            decoder.begin_step(metadata.block_table, cache, audited)
        return metadata

    def _of_decodes(self, common: CommonAttentionMetadata) -> MacCUDAMetadata:
        """What the base says of a batch without prompts, when nothing of its own is to run: what it prepares
        would take host time in every step."""
        return MacCUDAMetadata(
            kv_cache_layout=self.kv_cache_layout, num_actual_tokens=common.num_actual_tokens, slot_mapping=common.slot_mapping,
            q_data_type_prefill=self.q_data_type_prefill, q_data_type_decode=self.q_data_type_decode,
            num_decodes=common.num_reqs, num_decode_tokens=common.num_actual_tokens, num_prefills=0, num_prefill_tokens=0,
            causal=common.causal, prefill=None, decode=None,
        )  # fmt: skip

    def _flags(self, common: CommonAttentionMetadata, rings: RowRings) -> np.ndarray:
        """`[B]` int32 for `assign`. `is_prefilling` may be shorter than a padded batch."""
        flags = np.where(rings.fresh, FRESH.value, 0) + np.where(rings.skips, SKIPS.value, 0)
        prefilling = common.is_prefilling.numpy()[: len(flags)]
        flags[: len(prefilling)] += np.where(prefilling, PREFILLING.value, 0)
        return flags.astype(np.int32)

    def _on_device(self, name: str, array: np.ndarray) -> Tensor:
        """Copied only when it is not what was copied last: while requests decode, it is the same step after step."""
        content = array.tobytes()
        if name not in self._facts or self._facts[name][0] != content:
            self._facts[name] = content, torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
        return self._facts[name][1]

    def _tell(self, name: str, array: np.ndarray) -> None:
        """Put what the rows' requests ask for into the front of the decoder's buffer of that name, where it differs."""
        told = self._told[name][: len(array)]
        if not np.array_equal(told, array):
            told[:] = array
            getattr(self.decoder, name)[: len(array)].copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def _seeds(self, common: CommonAttentionMetadata, decodes: int, rings: np.ndarray) -> Seeds | None:
        """Plan the attention over the last `window` queries of each chunk that a ring records, cut to the prefix.

        rings: `[B]`, -1 for rows that record nothing, among them those that verify speculated tokens: the host
        knows the lengths of all others.
        """
        config, page, first = self.config, self.page_size, self.decoder.problem.first
        begin = common.query_start_loc_cpu.numpy()[decodes : common.num_reqs + 1].astype(np.int64)
        length = common.seq_lens_cpu_upper_bound.numpy()[decodes : common.num_reqs].astype(np.int64)
        count = np.diff(begin)
        taken = np.where(rings[decodes:] >= 0, np.minimum(count, config.window), 0)
        total = int(taken.sum())
        if not total:
            return None
        row = np.repeat(np.arange(decodes, common.num_reqs), taken)
        back = np.concatenate([np.arange(n, 0, -1) for n in taken])  # tokens from the end of the chunk
        facts = np.stack((np.repeat(begin[1:], taken) - back, row, back)).astype(np.int32)
        token, row, back = torch.from_numpy(facts).pin_memory().to(self.device, non_blocking=True)
        position = common.seq_lens[row] - back
        # With keys up to `length - band`, causal masking ends query p's keys at p + 1 - band.
        # A row without any is given one, and nobody reads the result.
        keys = np.where(taken > 0, np.maximum(length - config.band - first, 1), 1)
        pages = -(-keys // page)
        indptr = np.concatenate(([0], np.cumsum(pages)))
        table = common.block_table_tensor[decodes : common.num_reqs, first // page :]
        indices = torch.cat([table[i, :n] for i, n in enumerate(pages)])
        as_ints = lambda x: torch.from_numpy(x.astype(np.int32)).pin_memory()
        if self._seed_wrapper is None:
            self._seed_wrapper = BatchPrefillWithPagedKVCacheWrapper(self._get_workspace_buffer(), "NHD")
        self._seed_wrapper.plan(
            as_ints(np.concatenate(([0], np.cumsum(taken)))), as_ints(indptr), indices, as_ints(keys - (pages - 1) * page),
            self.num_qo_heads, self.num_kv_heads, self.head_dim, page, causal=True, sm_scale=self.sm_scale,
            q_data_type=self.q_data_type_prefill, kv_data_type=self.kv_cache_dtype,
        )  # fmt: skip
        return Seeds(self._seed_wrapper, token, row, position, self._rows[1], common.block_table_tensor)


def decoder_of(layers: list[MacLayer], page_size: int, layer_names: list[str]) -> Decoder:
    """The decoder of a KV-cache group: the one made at load for these layers, where it fits.

    Builders are made more than once, and after vLLM has measured its memory; so are buffers
    made here, which only a group beyond the first, or an unusual page size, needs.
    """
    for layer in layers:
        made = layer.decoder
        if made is not None and made.problem.page_size == page_size and made.names in (None, tuple(layer_names)):
            made.names = tuple(layer_names)
            return made
    first = layers[0]
    first.decoder = make_decoder(first, page_size, first.counts.device)
    first.decoder.names = tuple(layer_names)
    return first.decoder


def make_decoder(layer: MacLayer, page_size: int, device: torch.device) -> Decoder:
    config, model = layer.vllm_config, layer.vllm_config.model_config
    rows = max(config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0)
    problem = PrefixProblem(
        max_rows=rows, heads=layer.num_heads, kv_heads=layer.num_kv_heads, head_size=layer.head_size,
        page_size=page_size, max_blocks=-(-model.max_model_len // page_size), dtype=model.dtype,
        band=layer.config.band, sink=layer.config.sink, scale=layer.scale,
    )  # fmt: skip
    return Decoder(problem, layer.config, device)


class MacCUDAImpl(MacImpl, FlashInferImpl):
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        mac = self.mac
        device = mac.vllm_config.device_config.device
        mac.load(act_dtype, torch.device(device))
        if mac.served and all(x.decoder is None for x in mac_layers(mac.vllm_config)):
            mac.decoder = make_decoder(mac, mac.vllm_config.cache_config.block_size, torch.device(device))
            mac.keep(**mac.decoder.lasting())

    def forward(
        self,
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: MacCUDAMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None or not self.mac.served:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if getattr(attn_metadata, "decoder", None) is None:
            raise self._unprepared()
        rows = attn_metadata.num_decodes
        if attn_metadata.num_prefills:
            super().forward(layer, query[rows:], key, value, kv_cache, attn_metadata.rest, output[rows:])
            if attn_metadata.seeds is not None:
                self._seed(query, kv_cache, attn_metadata.seeds)
        if rows:
            mac = self.mac
            attn_metadata.decoder.decode(
                query[:rows], kv_cache, attn_metadata.block_table, mac.store, mac.config, mac.rotary, mac.counts, output[:rows],
                mac.audited, mac.paused,
            )  # fmt: skip
        return output

    def _seed(self, query: Tensor, kv_cache: Tensor, seeds: Seeds) -> None:
        mac = self.mac
        pages = kv_cache.transpose(1, 2)  # [blocks, page, K, 2 D]
        out, lse = seeds.wrapper.run(query[seeds.token], pages.split(self.head_size, -1), return_lse=True)
        record_prefill(
            query, seeds.token, seeds.row, seeds.position, seeds.ring, seeds.block_table, kv_cache, mac.store, mac.config,
            self.scale, out, lse, **rotation(mac.rotary),
        )  # fmt: skip
