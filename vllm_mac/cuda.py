"""MAC as a backend of vLLM's CUDA engine: FlashInfer's backend, with decode rows by `decoder`.

Prefill, layers that are exact and everything else run as FlashInfer's backend runs them; `seeding` records
the ends of prefill chunks in rings.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferDecodeKernel,
    FlashInferImpl,
    FlashInferMetadata,
    FlashInferMetadataBuilder,
)

from vllm_mac.capabilities import BUILDER, index_page, kv_cache_dtypes, pinning
from vllm_mac.compilers import explained
from vllm_mac.counters import IN_SMALL_STEP, PREFILLED
from vllm_mac.decoder import Decoder
from vllm_mac.index_pages import indexing
from vllm_mac.kernels.assign import FRESH, PREFILLING, SKIPS, assign
from vllm_mac.key_index import LEAST_QUERIES, numbers
from vllm_mac.kv_group import Group
from vllm_mac.layers import MacLayer, at_once, index_rule, mac_layers
from vllm_mac.learning import host_lengths, of_batch
from vllm_mac.lookup_decoder import LookupDecoder
from vllm_mac.mixins import MacImpl, MacSupport
from vllm_mac.requests import RowRings, executing, row_rings
from vllm_mac.seeding import Seeding, SeedPlanner
from vllm_mac.state import Geometry, Learning, Rows
from vllm_mac.warmup import warm_up, warm_up_index

logger = init_logger("vllm.mac")

PREFERRED_PAGE = 64  # tokens, with an index


class MacCUDABackend(MacSupport, FlashInferBackend):
    supported_kv_cache_dtypes: ClassVar[list] = list(kv_cache_dtypes("cuda", "index"))
    _platform: ClassVar[str] = "cuda"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [size for size in FlashInferBackend.get_supported_kernel_block_sizes(kv_cache_spec) if size <= 64]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_PAGE if indexing() else super().get_preferred_block_size(default_block_size)

    @staticmethod
    def get_impl_cls() -> type["MacCUDAImpl"]:
        return MacCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["MacCUDAMetadataBuilder"]:
        return MacCUDAMetadataBuilder


@dataclass(frozen=True, slots=True)
class Step:
    """What a batch means for the layers that MAC runs.

    rows: those that decode, which come first. rest: what is left for FlashInfer's backend to do, None where all rows
    decode. seeding: what the rings of prefilled rows record, None for nothing.
    """

    decoder: Decoder
    rows: Rows
    rest: FlashInferMetadata | None = None
    seeding: Seeding | None = None


@dataclass(frozen=True, slots=True)
class LookupStep:
    """The same for layers that decode by the index of keys. length: `[B]` int32, vLLM's own lengths of the rows that decode.
    learning: the row that maps are learned from, if any."""

    decoder: LookupDecoder
    rows: Rows
    length: Tensor
    rest: FlashInferMetadata | None = None
    learning: Learning | None = None


@dataclass
class MacCUDAMetadata(FlashInferMetadata):
    """step: None where all layers of the group are exact."""

    step: Step | LookupStep | None = None


def least_tokens(mib: int, geometry: Geometry) -> int:
    """Of how many tokens the keys and values of a layer take so many MiB."""
    token = geometry.kv_heads * 2 * geometry.head_size * geometry.kv_dtype.itemsize
    return -(-mib * 2**20 // token)


@pinning(BUILDER)
class MacCUDAMetadataBuilder(FlashInferMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec) -> AttentionCGSupport:
        layers = [layer for layer in mac_layers(vllm_config) if not layer.apart]
        run = [layer for layer in layers if layer.served or layer.drafting is not None]
        if not run or any(at_once(layer) == 1 for layer in run):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        if len(run) == len(layers):
            return AttentionCGSupport.UNIFORM_BATCH
        found = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # exact layers' steps are in the same graphs
        return min(found, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec) -> int | None:
        return None

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.group = Group(layer_names, vllm_config, device)
        self.served = [layer for layer in self.group.layers if layer.served]
        elsewhere = [layer for layer in self.group.layers if layer.apart and self.served]  # take no metadata from here
        drafts = [layer for layer in self.group.layers if layer.drafting is not None and layer not in elsewhere]
        self.decoder, self.all_run, self.most = None, False, 1
        self._planned = torch.cuda.Event()
        run = self.served + drafts  # by MAC's kernels
        if not run:
            return
        self.config = run[0].config
        self.all_run = len(run) + len(elsewhere) == len(layer_names)
        if self.all_run:
            # Nothing runs the base's decode. So it makes the metadata of XQA, which needs no
            # planning, instead of a plan.
            self.use_trtllm_decode_attention = self.use_xqa = True
            self.flashinfer_trtllm_api_decode_kernel = FlashInferDecodeKernel.XQA
            self.use_trtllm_gen_varlen_decode = False
        # Rows of so many tokens decode. Exact layers of the group run the base's decode, which may take one token only.
        most = min(at_once(layer) for layer in run)
        self.most = self.reorder_batch_threshold = most if self.all_run else min(most, self.reorder_batch_threshold)
        if self.most < most:
            logger.warning_once(
                "MAC reads steps that verify speculated tokens whole: FlashInfer takes them for prefills here, and runs "
                "layers with the same KV cache: %s",
                ", ".join(
                    f"{layer.name} ({layer.exact})" for layer in self.group.layers if layer not in run + elsewhere
                ),
            )
        self.supports_draft_decode_metadata_update = self.all_run and not self.served
        self.decoder = self.group.decoder = decoder_of(self.served or drafts, self.page_size, layer_names)
        self._facts: dict[str, tuple[bytes, Tensor]] = {}
        warm = vllm_config.kernel_config.enable_jit_warmup or vllm_config.model_config.enforce_eager
        if isinstance(self.decoder, LookupDecoder):
            if self.served and not self.decoder.lessons.texts:
                self.decoder.lessons = self.group.lessons
            with torch.inference_mode(), explained():
                self.decoder.ring.fill_(-1)
                if warm:
                    warm_up_index(self.decoder, run[0].by_index)
            self._written = {"ring": self.decoder.ring.to("cpu", copy=True).numpy()}
            self._least = least_tokens(self.config.min_step_mib, self.decoder.geometry)
            return
        dtypes = self.q_data_type_prefill, self.kv_cache_dtype
        self._seeds = SeedPlanner(self.decoder.geometry, self.config.window, dtypes, self._get_workspace_buffer)
        # Position, ring and first of all rows of a batch; the decoder's hold those that decode, which come first.
        self._rows = [torch.zeros_like(self.decoder.position) for _ in range(3)]
        # As the decoder was made; an earlier builder may have written to these buffers.
        with torch.inference_mode():  # as vLLM profiles, which may have made the decoder
            self.decoder.slack.fill_(1), self.decoder.spared.fill_(-1)
        self._written = {name: getattr(self.decoder, name).to("cpu", copy=True).numpy() for name in ("slack", "spared")}
        # Every engine makes its builders before it takes requests. Eager mode turns vLLM's own warm-up off, but its
        # first requests would wait for the compiler just as long.
        if warm:
            with explained():
                warm_up(self.decoder, [layer.state for layer in self.served], self.group.new_table())

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MacCUDAMetadata:
        return self._build(common_attn_metadata, fast_build, capture=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> MacCUDAMetadata:
        return self._build(common_attn_metadata, False, capture=True)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int) -> FlashInferMetadata:
        # Layers of a draft model are exact, and may share this builder with layers that are not: no ring may
        # count what only the draft reads. V1 alone asks for this, where FlashInfer runs a draft's layers.
        return super().build(0, common_attn_metadata, fast_build=True)

    def _build(self, common: CommonAttentionMetadata, fast_build: bool, capture: bool) -> MacCUDAMetadata:
        decoding = self.all_run and common.max_query_len <= self.most
        if decoding:
            metadata = self._of_decodes(common)
        else:
            # FlashInfer plans into one page-locked buffer a wrapper, which the device copies later. A new plan made
            # before that copy would be read half old and half new. This hardly ever waits: the copies of the last
            # step come first.
            self._planned.synchronize()
            metadata = MacCUDAMetadata(**vars(super().build(0, common, fast_build)))
            self._planned.record()
        if not capture:
            self.group.tally_host(common, self.most)
        if self.decoder is None:
            return metadata
        decoder, decodes, mixed = self.decoder, metadata.num_decodes, metadata.num_prefills > 0
        rest, seeding, table = None, None, common.block_table_tensor[:decodes]
        if mixed:
            rest = replace(
                metadata, num_decodes=0, num_decode_tokens=0, decode=None,
                num_actual_tokens=metadata.num_actual_tokens - metadata.num_decode_tokens,
            )  # fmt: skip
        real = not capture and executing()
        if isinstance(decoder, LookupDecoder):
            count = None  # where all rows that decode have one token each
            if common.max_query_len > 1:
                count = np.diff(common.query_start_loc_cpu.numpy()[: decodes + 1])
                count = count if (count > 1).any() else None
            # A draft decodes when the batch of requests has been executed.
            if real or not (self.served or capture):
                decoder.place(
                    common.seq_lens[:decodes], None if count is None else common.query_start_loc[: decodes + 1]
                )
            else:
                decoder.position.fill_(-1)
            learning = self._look(decoder, common, decodes, count) if real and self.served else None
            rows = decoder.rows(table, count is not None)
            metadata.step = LookupStep(decoder, rows, common.seq_lens[:decodes], rest, learning)
            return metadata
        rows = decoder.rows(table)
        if real:
            seeding = self._assign(common, decodes, mixed)
        else:
            # Graphs are captured, and dummy batches run, over rows that do nothing; rings stay as they are.
            for tensor in (decoder.position, decoder.ring):
                tensor.fill_(-1)
        metadata.step = Step(decoder, rows, rest, seeding)
        context = self.vllm_config.compilation_config.static_forward_context
        cache = context[self.served[0].name].kv_cache
        if decodes and cache.dim() == 4:  # vLLM builds for its estimates before there is a cache
            audited = real and self.group.begin_decodes()
            decoder.begin_step(rows, cache, audited)
        return metadata

    def _assign(self, common: CommonAttentionMetadata, decodes: int, mixed: bool) -> Seeding | None:
        """Write what the rows of a batch of requests do into the decoder's buffers, and plan what rings record.

        mixed: whether the batch has other rows than those that decode.
        """
        decoder, count, rings, seeding = self.decoder, common.num_reqs, row_rings(common), None
        own = decoder.position, decoder.ring, decoder.first
        outputs = self._rows if mixed else own
        assign(
            self.group.table, common.query_start_loc[: count + 1], common.seq_lens[:count],
            self._on_device("ring", rings.ring), self._on_device("flags", self._flags(common, rings)), *outputs,
        )  # fmt: skip
        if mixed:
            for mine, all_rows in zip(own, outputs, strict=True):
                mine[:decodes].copy_(all_rows[:decodes])
            _, ring, _ = outputs
            seeding = self._seeds.plan(common, decodes, np.where(rings.skips, -1, rings.ring), ring)
            self._planned.record()
        self._write("slack", rings.slack)
        if self.config.audit:
            self._write("spared", np.where(rings.audited, 0, -1).astype(np.int32))
        return seeding

    def update_draft_decode_metadata(self, _metadata: MacCUDAMetadata) -> None:
        """A draft's next step: vLLM's lengths have grown. Also recorded in CUDA graphs."""
        if isinstance(step := _metadata.step, LookupStep):
            assert step.rows.begin is None, "a draft's further steps have one token of each row"
            step.decoder.place(step.length, None)

    def _look(
        self, decoder: LookupDecoder, common: CommonAttentionMetadata, decodes: int, count: np.ndarray | None
    ) -> Learning | None:
        """Write what the rows of a batch of requests do into the decoder's buffers; choose what maps are learned from.

        count: `[decodes]`, tokens of each row that decodes, None for one each. Unlike lengths the host knows them always.
        """
        rings = row_rings(common)
        ring = rings.ring[:decodes]
        if count is not None:
            ring = np.where((count > 1) & ~rings.verifies[:decodes], np.int32(PREFILLED), ring)
        if self._least and common.seq_lens_cpu_upper_bound is not None:
            tokens = 1 if count is None else min(int(count.max()), decoder.geometry.together)
            ring = self._worth(ring, common.seq_lens_cpu_upper_bound.numpy()[:decodes], tokens)
        if count is not None:
            ring = ring.repeat(decoder.geometry.parts)
        self._write("ring", ring)
        write = lambda layer, slots, cache: decoder.write(layer.index, slots, cache)
        self.group.make_maps(write)
        if self.group.begun is not None or rings.begun.any():
            self.group.index_begun(rings.begun, *host_lengths(common), common.block_table_tensor, write)
        if common.max_query_len < LEAST_QUERIES:
            return None
        learning, decoder.lessons = of_batch(common, decodes, decoder.lessons, self.config.min_context)
        self.group.learning = learning
        return learning

    def _worth(self, ring: np.ndarray, length: np.ndarray, tokens: int) -> np.ndarray:
        """`ring` of the rows that decode, and `IN_SMALL_STEP` for those that would be looked up and have too little
        altogether. length: tokens of each. tokens: that a row decodes, at most."""
        looked = (ring == -1) & (length >= self.config.min_context)
        # Each further token of a row makes looking up take longer, and reading all of its KV hardly.
        if 3 * length.sum(where=looked) >= self._least * (2 + tokens):
            return ring
        return np.where(looked, np.int32(IN_SMALL_STEP), ring)

    def _of_decodes(self, common: CommonAttentionMetadata) -> MacCUDAMetadata:
        """The base's metadata of a batch without prefills, where nothing of the base's own is to run: what it prepares
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
        """The array on the device. It is copied only when it changes: while requests decode, it stays the same."""
        content = array.tobytes()
        if name not in self._facts or self._facts[name][0] != content:
            self._facts[name] = content, torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
        return self._facts[name][1]

    def _write(self, name: str, array: np.ndarray) -> None:
        """Copy what the rows' requests ask for to the front of the decoder's buffer of that name, where it differs."""
        written = self._written[name][: len(array)]
        if written.tobytes() != array.tobytes():
            written[:] = array
            getattr(self.decoder, name)[: len(array)].copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)


def decoder_of(layers: list[MacLayer], page_size: int, layer_names: list[str]) -> Decoder | LookupDecoder:
    """The decoder of a KV-cache group: the one made at load for these layers, where it fits.

    vLLM makes builders more than once, and after it has measured its memory. So buffers that are
    made here are not measured; only a group beyond the first, or an unusual page size, needs them.
    """
    names = tuple(sorted(layer_names))  # vLLM orders a draft's as it likes
    for layer in layers:
        made = layer.decoder
        if made is not None and made.geometry.page_size == page_size and made.names in (None, names):
            made.names = names
            return made
    first = layers[0]
    first.decoder = make_decoder(first, page_size, (first.drafting or first).counts.device)
    first.decoder.names = names
    return first.decoder


def make_decoder(layer: MacLayer, page_size: int, device: torch.device) -> Decoder | LookupDecoder:
    config, model = layer.vllm_config, layer.vllm_config.model_config
    rows = max(config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0)
    geometry = Geometry(
        max_rows=rows, heads=layer.num_heads, kv_heads=layer.num_kv_heads, head_size=layer.head_size,
        page_size=page_size, max_blocks=-(-model.max_model_len // page_size), dtype=model.dtype,
        band=layer.config.band, sink=layer.config.sink, scale=layer.scale, at_once=at_once(layer),
        fp8=layer.fp8,
    )  # fmt: skip
    if layer.config.rule == "index":
        return LookupDecoder(geometry, index_rule(layer), layer.config.index_size, device)
    return Decoder(geometry, layer.config, device)


class MacCUDAImpl(MacImpl, FlashInferImpl):
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        mac = self.mac
        device = mac.vllm_config.device_config.device
        mac.load(act_dtype, torch.device(device))
        of_model = [x for x in mac_layers(mac.vllm_config) if (x.exact == "draft") == (mac.exact == "draft")]
        if (mac.served or mac.drafting is not None) and all(x.decoder is None for x in of_model):
            page = mac.vllm_config.cache_config.block_size
            page = page if mac.state is not None else index_page(page, "cuda")
            mac.decoder = make_decoder(mac, page, torch.device(device))
            mac.keep(**mac.decoder.lasting())

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        kv_cache = self.mac.rows(kv_cache)
        index, group = self.mac.index, self.mac.group
        if index is not None and group is not None:
            batch = get_forward_context().attn_metadata
            step = getattr(batch.get(self.mac.name), "step", None) if isinstance(batch, dict) else None
            if isinstance(step, LookupStep) and step.rest is None:  # a page gets few tokens, so one launch does both
                several = step.rows.begin is not None
                return group.decoder.append(index, key, value, slot_mapping, numbers(kv_cache), several)
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if index is not None and group is not None:
            group.decoder.write(index, slot_mapping, numbers(kv_cache))

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
        kv_cache = self.mac.rows(kv_cache)
        index = self.mac.by_index
        if attn_metadata is None or (index is None and self.mac.state is None):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        step = getattr(attn_metadata, "step", None)
        if step is None:
            raise self._unprepared()
        state, decodes, tokens = self.mac.state, attn_metadata.num_decodes, attn_metadata.num_decode_tokens
        if attn_metadata.num_prefills:
            super().forward(layer, query[tokens:], key, value, kv_cache, step.rest, output[tokens:])
        if isinstance(step, LookupStep):
            kv = numbers(kv_cache)
            if step.learning is not None and self.mac.served:
                step.learning.add(self.mac.name, index.maps, query, kv)
            if decodes:
                step.decoder.decode(index, step.rows, query, kv, output)
            return output
        if step.seeding is not None:
            step.seeding.record(state, query, kv_cache)
        if decodes:
            step.decoder.decode(state, step.rows, query[:decodes], kv_cache, output[:decodes])
        return output
