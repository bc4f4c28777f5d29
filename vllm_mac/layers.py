"""One attention layer under MAC: whether MAC runs it, and the state of its steps (`state.LayerState`).

vLLM builds its attention layers one by one, loads the weights, and then lets each layer
finish. Only then are all layers known and their rotations complete. So that is when the
layers are settled, once and for all, and the rings allocated; vLLM profiles its memory after that.

A draft model is built when the model that it drafts for has finished, in the same process and
with the same table of layers. So every layer that is built after the first layers were settled is a draft's.
"""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_mac import capabilities, maps_file
from vllm_mac.config import RING_DTYPES, MacConfig, MacConfigError, resolve
from vllm_mac.counters import Count
from vllm_mac.key_index import Lessons, Maps, Moments, Scales, directions, numbers, rows
from vllm_mac.ring import ring_dtypes
from vllm_mac.ring_room import bytes_of_ring, ring_count
from vllm_mac.rope import Rotary, RotaryError, find_rotary
from vllm_mac.state import MOST_PARTS, IndexRule, IndexState, LayerState, RingStore, most_together
from vllm_mac.totals import allocate

logger = init_logger("vllm.mac")

HEAD_SIZES = range(32, 257)


class MacLayer:
    """What MAC keeps for one `Attention` layer of one worker.

    settings: the worker's configuration. config: the layer's own once it is settled, with its threshold
        (`MacConfig.for_layer`).
    exact: why no step of the layer uses MAC, or None where MAC runs it; final once `settled`.
        Reasons that depend on the row of a batch instead (`short_context`, `no_ring`, `request`), or come and
        go (`error_budget`, `no_maps`, `small_step`), are counted, not kept.
    state: what the steps of the layer read and write with `rule: match`; None for a layer that is exact, and before it is
        loaded. index: the same with `rule: index`. drafting: the same of a draft's layer, which is exact, on a GPU with `rule:
        index`: it has no maps, so MAC's kernels read everything.
    rings: how many rings it has with `rule: match`, as many as the others; 0 before it is settled.
    counts: `[len(Count)]` int64 on the layer's device, see `counters.Count`.
    audited: the histograms of audited steps (`audit.histograms`); None where no step is audited.
    kept: what its maps were learned from before this engine began, if anything, see `maps_file`.
    totals: `[n]` int64, the memory that `counts` and `audited` of all layers of the worker are views of.
    page: tokens of a page, where MAC splits blocks itself; set by the metadata builder.
    group: the layer's KV-cache group (`kv_group.Group`); set by the metadata builder.
    decoder: the buffers that a GPU decodes with, on one layer for all that share them.
    publisher: what publishes the counters of the worker's layers; None where it cannot.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        sliding_window: int | None = None,
        special: Mapping[str, bool] = MappingProxyType({}),
    ):
        """special: by reason, whether vLLM gave the layer what MAC does not compute (`soft_cap`, `alibi`, ...)."""
        before = mac_layers(vllm_config)
        self.vllm_config = vllm_config
        # All layers of a worker have one configuration, whatever happens to its file meanwhile.
        self.settings: MacConfig = before[0].settings if before else configuration(vllm_config)
        self.config = self.settings
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale = scale
        self.sliding_window = sliding_window
        own = {
            "draft": any(layer.settled for layer in before),
            "disabled": not self.config.enabled,
            # Each micro-batch has a metadata builder, and the rings have one owner.
            "micro_batches": vllm_config.parallel_config.use_ubatching,
            "sliding_window": sliding_window is not None,
            **special,
            "head_size": head_size not in HEAD_SIZES,
        }
        reasons = [reason for reason, holds in own.items() if holds]
        self.exact: str | None = reasons[0] if reasons else None
        self._drafts = reasons == ["draft"]
        self.settled = False
        self.name: str | None = None
        self.holder: nn.Module | None = None
        self.rotary: Rotary | None = None
        self.rings = 0
        self.state: LayerState | None = None
        self.index: IndexState | None = None
        self.drafting: IndexState | None = None
        self.counts: Tensor | None = None
        self.audited: Tensor | None = None
        self.totals: Tensor | None = None
        self.group = None
        self.kept: tuple[Moments, Lessons] | None = None
        self.page: int | None = None
        self.decoder = None
        self.publisher = None

    def bind(self, holder: nn.Module, name: str) -> None:
        """Note the module that holds the layer, where its rotation is found, and the layer's name."""
        self.holder, self.name = holder, name

    @property
    def served(self) -> bool:
        """Whether MAC runs the layer."""
        return self.state is not None or self.index is not None

    @property
    def by_index(self) -> IndexState | None:
        """What MAC's kernels run the layer by with `rule: index`, a draft's included."""
        return self.index or self.drafting

    @property
    def attention(self) -> nn.Module:
        """vLLM's layer."""
        return self.vllm_config.compilation_config.static_forward_context[self.name]

    @property
    def cache(self) -> Tensor:
        """The layer's KV cache, `[blocks, K, block, 2 D]`."""
        return numbers(self.rows(self.attention.kv_cache))

    @property
    def engine_config(self) -> VllmConfig:
        """The configuration of the engine's own model, also for a layer of its draft."""
        return mac_layers(self.vllm_config)[0].vllm_config

    @property
    def apart(self) -> bool:
        """Whether the layer is of a draft model for whose steps vLLM makes metadata of its own, and no CUDA graphs. An EAGLE
        head also takes the metadata of the model that it drafts for."""
        return self.exact == "draft" and self.engine_config.speculative_config.method == "draft_model"

    def rows(self, kv_cache: Tensor) -> Tensor:
        """The layer's KV cache as pages of plain rows, which those of hybrid models are not, see `index_pages.in_rows`."""
        hybrid = kv_cache.dim() == 4 and is_hybrid(self.vllm_config)
        return rows(kv_cache, self.head_size, self.page) if hybrid else kv_cache

    @property
    def fp8(self) -> bool:
        """Whether the layer's KV cache is FP8."""
        return self.attention.kv_cache_dtype in capabilities.FP8_DTYPES

    def load(self, dtype: torch.dtype, device: torch.device) -> None:
        """Settle whether MAC runs the layer, and make its state; `dtype` is the model's.

        Raises MacConfigError where the byte budget does not hold the rings (`ring_count`), where the device
        cannot convert to the rings' dtype, and where MAC is chosen for a draft model by name.
        """
        if self.served or self.drafting is not None:  # weights were reloaded
            if self.index is not None and self.group is not None:
                self.group.learn_anew(self)
            return
        layers = mac_layers(self.vllm_config)
        if not self.settled:
            settle([layer for layer in layers if not layer.settled], dtype)
        if self._drafts and self._drafted(device):
            self.drafting = self._index_state(torch.zeros(len(Count), dtype=torch.int64, device=device), dtype)
        if self.exact is not None:
            return
        if self.counts is None:
            count([layer for layer in layers if layer.exact is None], device)
        if self.config.rule == "index":
            check_index_device(device, self.fp8)
            self.index = self._index_state(self.counts, dtype)
            if self.kept is not None:
                maps_file.remember(self.index.maps, self.kept[0], self.name, self.config.maps)
            return
        query_dtype, out_dtype = ring_dtypes(self.config, dtype)
        check_device(query_dtype, device)
        paused = None if self.config.error_budget is None else torch.zeros(1, dtype=torch.int32, device=device)
        kept = {"counts": self.counts, "audited": self.audited, "paused": paused}
        self.keep(**{name: tensor for name, tensor in kept.items() if tensor is not None})
        store = RingStore.allocate(
            self.rings,
            self.num_heads,
            self.config.window,
            self.head_size,
            query_dtype,
            device,
            out_dtype,
        )
        self.state = LayerState(store, self.config, self.rotary, **kept)

    def _drafted(self, device: torch.device) -> bool:
        """Whether MAC's kernels run this layer of a draft: with the model's own layers it then has full CUDA graphs of steps
        that verify, which FlashInfer's backend takes for prefills where it lacks kernels of its own."""
        engine = self.engine_config
        # V1 plans a draft's steps by another method. Where all layers of the model are exact, pages have no index.
        served = engine.use_v2_model_runner and any(layer.exact is None for layer in mac_layers(engine))
        if device.type == "cpu" or self.settings.rule != "index" or not served or is_hybrid(self.vllm_config):
            return False
        # Drafts that write one token after another; queries of others (DFlash) see tokens behind them.
        method = engine.speculative_config.method
        causal = method in ("draft_model", "eagle", "eagle3") or method.endswith("mtp")
        plain = type(self.attention.get_kv_cache_spec(self.vllm_config)) is FullAttentionSpec
        able = plain and capabilities.refused_index_size(self.settings.index_size, self.head_size) is None
        if self.fp8 and device.type == "cuda":
            able &= capabilities.refused_float8_gpu(torch.cuda.get_device_capability(device)) is None
        fits = at_once(self) > 1
        if causal and able and not fits:
            logger.warning_once(
                "MAC leaves layers of a draft model to FlashInfer, and steps may run outside of full CUDA graphs: MAC decodes "
                "at most %d tokens of a request in a step of these layers", _most_at_once(self),
            )  # fmt: skip
        return causal and able and fits

    def _index_state(self, counts: Tensor, dtype: torch.dtype) -> IndexState:
        size = directions(self.head_size, self.config.index_size)
        scales = Scales(self.attention._k_scale, self.attention._v_scale) if self.fp8 else None
        maps = Maps.allocate(self.num_kv_heads, self.head_size, size, dtype, counts.device, scales)
        self.keep(counts=counts, **{f"index_{name}": one for name, one in maps.own().items()})
        return IndexState(maps, counts)

    def keep(self, **tensors: Tensor) -> None:
        """Have vLLM keep the content of these tensors through sleep level 2, in place.

        That level discards what was allocated while the model was loaded, except the buffers of its
        modules. Rings need not be kept: KV caches are discarded too, and vLLM forgets what was in them,
        so whatever is read of a ring afterwards was written afterwards.
        """
        for name, tensor in tensors.items():
            self.attention.register_buffer(f"mac_{name}", tensor, persistent=False)


def count(served: list[MacLayer], device: torch.device) -> None:
    """Allocate the counters of all layers that MAC runs, and their histograms where steps are audited."""
    audited = bool(served[0].config.audit)
    every, counts, histograms = allocate(len(Count), [layer.num_heads for layer in served], audited, device)
    for i, layer in enumerate(served):
        layer.totals, layer.counts, layer.audited = every, counts[i], histograms[i] if audited else None


def index_rule(layer: MacLayer) -> IndexRule:
    """What a layer's decoding by the index of keys decides by."""
    return IndexRule.of(layer.config, layer.scale)


def at_once(layer: MacLayer) -> int:
    """Most tokens of a row that MAC decodes in one step of a layer: with speculation by index those that a step verifies."""
    speculation = layer.engine_config.speculative_config
    if speculation is None or layer.settings.rule != "index":
        return 1
    # A draft model that is planned apart reads them all again, and the token that the model wrote behind them.
    tokens = 1 + (speculation.num_speculative_tokens or 0) + layer.apart
    return tokens if not current_platform.is_cuda() or tokens <= _most_at_once(layer) else 1


def _most_at_once(layer: MacLayer) -> int:
    """Tokens of a row that GPUs decode in one step by index, at most."""
    return max(MOST_PARTS * most_together(layer.num_heads // layer.num_kv_heads, layer.head_size), 1)


def is_hybrid(vllm_config: VllmConfig) -> bool:
    """Whether other layers of the model, of Mamba or convolutions, keep a state in KV blocks."""
    model = vllm_config.model_config
    return model is not None and model.is_hybrid


def configuration(vllm_config: VllmConfig) -> MacConfig:
    """MAC's configuration. Reads its file, so a process resolves it once for a model: `MacLayer.settings`."""
    return resolve((vllm_config.additional_config or {}).get("mac"))


def mac_layers(vllm_config: VllmConfig) -> list[MacLayer]:
    """The layers of this worker whose backend is MAC, in the model's order."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [x.impl.mac for x in layers if isinstance(getattr(getattr(x, "impl", None), "mac", None), MacLayer)]


def settle(layers: list[MacLayer], dtype: torch.dtype) -> None:
    """Decide which layers of one model MAC runs, find their rotations, and log all of it once.

    Raises MacConfigError where `speculative_config` chooses MAC for the draft model, and where a layer that MAC would run
    cannot have an index.
    """
    vllm_config, config = layers[0].vllm_config, layers[0].config
    if reason := capabilities.refused_draft_backend(vllm_config.speculative_config):
        raise MacConfigError(reason)
    if layers[0].exact == "draft":
        for layer in layers:
            layer.settled, layer.holder = True, None
        logger.info("MAC leaves %d attention layers of a draft model exact", len(layers))
        return
    context = vllm_config.compilation_config.static_forward_context
    targets = {getattr(x, "kv_sharing_target_layer_name", None) for x in context.values()}
    model = vllm_config.model_config
    text_config = model.hf_text_config
    has_rope = any(getattr(text_config, key, None) for key in ("rope_parameters", "rope_theta", "rope_scaling"))
    unknown: dict[str, list[str]] = {}
    for layer in layers:
        layer.settled = True
        if layer.exact is None and layer.name in targets:
            layer.exact = "kv_sharing"
        # Chunked local attention (Llama 4) gets each request as several rows, which are not the runner's.
        if layer.exact is None and type(context[layer.name].get_kv_cache_spec(vllm_config)) is not FullAttentionSpec:
            layer.exact = "local_attention"
        if layer.exact is None and not config.covers(layer.name, extract_layer_index(layer.name)):
            layer.exact = "excluded"
        if layer.exact is None and config.rule == "match":
            try:
                layer.rotary = find_rotary(
                    layer.holder, has_rope, layer.head_size, model.max_model_len, model.supports_multimodal_inputs
                )
            except RotaryError as error:
                layer.exact = error.reason
                unknown.setdefault(str(error), []).append(layer.name)
        layer.holder = None
    served = [layer for layer in layers if layer.exact is None]
    kept = maps_file.own(vllm_config, config.maps) if config.maps and served else {}
    for layer in served:
        layer.config = config.for_layer(layer.name, extract_layer_index(layer.name))
        layer.kept = kept.get(layer.name)
    if config.rule == "index" and served:
        _check_index(served, vllm_config)
    logger.info("MAC configuration: %s", config.describe())
    if config.enabled and vllm_config.parallel_config.pipeline_parallel_size == 1:
        _warn_of_idle_patterns(config, layers)
    for error, names in unknown.items():
        logger.warning("MAC leaves %s exact: %s", ", ".join(names), error)
    if vllm_config.speculative_config is not None and any(at_once(layer) == 1 for layer in served):
        most = min(map(_most_at_once, served))
        of_index = (
            f": MAC decodes at most {most} tokens of a request in a step of this model"
            if config.rule == "index"
            else ""
        )
        logger.warning("MAC leaves steps that verify speculated tokens exact%s", of_index)
    reasons = exact_reasons(layers)
    exact = f"; exact: {', '.join(f'{n} ({r})' for r, n in reasons.items())}" if reasons else ""
    if not served:
        logger.warning("MAC serves none of %d attention layers%s", len(layers), exact)
        return
    if config.rule == "index":
        sizes = sorted({directions(layer.head_size, config.index_size) for layer in served})
        logger.info(
            "MAC serves %d of %d attention layers%s; keys indexed in %s directions",
            len(served), len(layers), exact, " and ".join(map(str, sizes)),
        )  # fmt: skip
        return
    # Counted once: what a GPU has left grows less with every layer's rings.
    rings = ring_count(layers, dtype)
    for layer in served:
        layer.rings = rings
    size = rings * sum(bytes_of_ring(layer, dtype) for layer in served)
    logger.info(
        "MAC serves %d of %d attention layers%s; %d rings, %.1f MiB, for as many sequences of %d tokens or more",
        len(served), len(layers), exact, rings, size / 2**20, config.min_context,
    )  # fmt: skip


def _check_index(served: list[MacLayer], vllm_config: VllmConfig) -> None:
    """Raise MacConfigError where keys have fewer numbers than the index directions, and where it could overwrite other keys.

    Layers of several kinds have pages of the same memory. An index lies behind as many bytes as the keys and values of its
    own layer take.
    """
    for layer in served:
        if reason := capabilities.refused_index_size(layer.config.index_size, layer.head_size):
            raise MacConfigError(f"{layer.name}: {reason}")
    modules = vllm_config.compilation_config.static_forward_context.items()
    specs = {name: x.get_kv_cache_spec(vllm_config) for name, x in modules if hasattr(x, "get_kv_cache_spec")}
    specs = {name: spec for name, spec in specs.items() if spec is not None}
    if all(type(spec) is FullAttentionSpec for spec in specs.values()):
        return  # one group, in which each layer has memory of its own
    first = served[0].name
    if is_hybrid(vllm_config):
        # Rows of these layers alone have room for the index, and maps that are learned anew index their blocks alone.
        others = [
            x for x, spec in specs.items() if isinstance(spec, AttentionSpec) and type(spec) is not FullAttentionSpec
        ]
        if others:
            raise MacConfigError(
                f"the model is hybrid, and {others[0]} does not see everything: {capabilities.TO_MATCH}"
            )
        return
    own = _token_bytes(specs[first])
    others = [name for name, spec in specs.items() if _token_bytes(spec) != own]
    if others:
        raise MacConfigError(
            f"rule: index needs KV pages of one size in all layers, and those of {others[0]} differ from those of "
            f"{first}: {capabilities.TO_MATCH}"
        )


def _token_bytes(spec) -> int | None:
    """Bytes of a token's keys and values; None for what is no attention's."""
    return spec.real_page_size_bytes // spec.block_size if isinstance(spec, AttentionSpec) else None


def _warn_of_idle_patterns(config: MacConfig, layers: list[MacLayer]) -> None:
    """Warn of the patterns under `layers` that match no layer (of one pipeline stage, which is all)."""
    served = [layer for layer in layers if layer.exact is None]
    for key, of, whose in (
        ("include", layers, "layer"), ("exclude", layers, "layer"), ("threshold", served, "layer that MAC serves"),
    ):  # fmt: skip
        idle = config.idle_patterns(key, [(layer.name, extract_layer_index(layer.name)) for layer in of])
        if of and idle:
            logger.warning("MAC: layers.%s: no %s matches %s", key, whose, ", ".join(map(repr, idle)))


def exact_reasons(layers: list[MacLayer]) -> dict[str, int]:
    """How many layers are exact for each reason."""
    return dict(Counter(layer.exact for layer in layers if layer.exact is not None))


def check_device(dtype: torch.dtype, device: torch.device) -> None:
    """Raise MacConfigError where kernels on `device` cannot convert to and from a ring's dtype."""
    if device.type != "cuda" or dtype != torch.float8_e4m3fn:
        return
    capability = torch.cuda.get_device_capability(device)
    if reason := capabilities.refused_ring_dtype("float8_e4m3fn", capability, RING_DTYPES):
        raise MacConfigError(reason)


def check_index_device(device: torch.device, fp8: bool) -> None:
    """Raise MacConfigError where `device` cannot decode by the index of keys. fp8: whether the KV cache is."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if reason := capabilities.refused_index_gpu(capability):
        raise MacConfigError(f"{reason}: {capabilities.TO_MATCH}")
    if fp8 and (reason := capabilities.refused_float8_gpu(capability)):
        raise MacConfigError(f"{reason}: give --kv-cache-dtype bfloat16")


def _bind_layer(holder: nn.Module, _name: str, child: nn.Module | None) -> None:
    mac = getattr(getattr(child, "impl", None), "mac", None)
    if isinstance(mac, MacLayer):
        mac.bind(holder, child.layer_name)


# An attention layer does not know the module that holds it, where its rotation is. PyTorch
# calls this hook when one module becomes part of another.
register_module_module_registration_hook(_bind_layer)
