"""What MAC would do with a model's layers, decided on the model that vLLM builds, without its weights.

vLLM's own model class is built as in an engine, except that large tensors get no memory. `layers.settle` decides its
layers as in an engine, so this module has no rules of its own.
"""

import logging
import math
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_mac.config import MacConfig

LARGE = 1 << 20  # elements; rotary caches get memory, because they are computed from smaller tensors


@dataclass(frozen=True)
class Layer:
    """One attention layer of one worker. state: MAC, exact, or other (another backend's).

    reason: why it is exact, or the other backend's name. heads: query heads. kv_bytes: of one token's keys and values,
    over all KV heads; 0 where the cache has something else. window: tokens of a sliding window. index_bytes: of one
    token's part of the index of keys; 0 without one.
    """

    name: str
    index: int
    state: str
    reason: str | None
    heads: int
    head_size: int
    kv_bytes: int
    window: int | None
    index_bytes: float = 0.0


@dataclass(frozen=True)
class IndexRoom:
    """What the index of keys takes. directions: by layer, each number once. page: tokens of a KV page.

    plain, padded: bytes of one page of each layer, all layers together, without and with room for an index.
    """

    directions: tuple[int, ...]
    page: int
    plain: int
    padded: int


@dataclass
class Examined:
    """A model from MAC's view.

    ring: bytes of one ring over all layers with MAC, how many rings `ring_memory_gib` holds, how many are wanted; None
    where no layer uses MAC, and with `rule: index`. index: with that rule, where a layer uses MAC. refused: why an engine would not start. unbuilt: why the model could not be built here; an
    engine may still build it. With either of them, the other fields may be incomplete. notes: MAC's own warnings.
    """

    refused: str | None = None
    unbuilt: str | None = None
    layers: list[Layer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ring: tuple[int, int, int] | None = None
    index: IndexRoom | None = None
    dense_bytes: int = 0
    experts: list[tuple[int, float]] = field(default_factory=list)  # bytes, share of them that one token reads
    kv_cache_dtype: str = ""
    max_model_len: int = 0
    ring_element: int = 0  # bytes
    config: MacConfig | None = None  # None where no layer uses MAC

    def weight_bytes(self, batch: int) -> float:
        """Bytes of weights that one decode step of `batch` rows reads.

        Of the embedding only the rows of its tokens count (0 here); of experts the expected number that `batch` rows
        need if they choose at random.
        """
        return self.dense_bytes + sum(size * (1 - (1 - share) ** batch) for size, share in self.experts)


class _WithoutMemory(TorchFunctionMode):
    """Makes large tensors on the meta device, if their content does not depend on other tensors."""

    MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.MAKERS and _elements(kwargs.get("size", args)) >= LARGE:
            kwargs = kwargs | {"device": "meta"}
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)


def _elements(size) -> int:
    found = size[0] if size and isinstance(size[0], (tuple, list, torch.Size)) else size
    return math.prod(part for part in found if isinstance(part, int))


def examine(model: str, mac: dict, engine: dict, max_num_seqs: int | None = None) -> Examined:
    """Build a model without its weights and decide its layers.

    mac: keys of MAC's configuration. engine: further arguments of vLLM's engine. Of the kinds of parallelism, only
    `tensor_parallel_size` is taken into account: it divides heads and weights.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "enforce_eager": True,
    } | engine
    ranks = int(arguments.pop("tensor_parallel_size", 1))
    if not {"attention_backend", "attention_config"} & arguments.keys():
        arguments["attention_backend"] = "MAC"
    arguments["additional_config"] = {**arguments.get("additional_config", {}), "mac": mac}
    found = Examined()
    try:
        vllm_config = EngineArgs(model=model, **arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # any refusal by vLLM, Hugging Face's reader or MAC
        found.refused = f"{type(error).__name__}: {error}"
        return found
    found.max_model_len = vllm_config.model_config.max_model_len
    found.kv_cache_dtype = vllm_config.cache_config.cache_dtype
    if found.kv_cache_dtype == "auto":
        found.kv_cache_dtype += f" ({str(vllm_config.model_config.dtype).removeprefix('torch.')})"
    try:
        # vLLM sets up its loggers again when it makes its configuration.
        with _warnings(found.notes), _world(vllm_config):
            built = _build(vllm_config)
            _settle(found, vllm_config, ranks)
            _weigh(found, built, ranks)
    except (ValueError, NotImplementedError) as error:  # refusals by backends, layers and MAC
        found.refused = f"{type(error).__name__}: {error}"
    except Exception as error:  # of a model class that needs its weights or a device
        found.unbuilt = f"{type(error).__name__}: {error}"
    return found


@contextmanager
def _warnings(into: list[str]):
    """Collect MAC's own warnings instead of printing them with vLLM's loggers."""
    logger, handler = logging.getLogger("vllm.mac"), logging.Handler(logging.WARNING)
    # The report has its own line about the number of rings.
    handler.addFilter(lambda record: "ring_memory_gib" not in str(record.msg))
    handler.emit = lambda record: into.append(record.getMessage())
    level, spreads = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = spreads


@contextmanager
def _world(vllm_config):
    """A process group with one member, because layers ask for their rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        try:
            init_distributed_environment(1, 0, Path(folder, "group").as_uri(), 0, "gloo")
            ensure_model_parallel_initialized(1, 1, backend="gloo")
            yield
        finally:
            cleanup_dist_env_and_memory()


def _build(vllm_config) -> torch.nn.Module:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("cpu"), _WithoutMemory():
        return initialize_model(vllm_config)


def _settle(found: Examined, vllm_config, ranks: int) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import extract_layer_index

    from vllm_mac.layers import mac_layers, settle
    from vllm_mac.ring import ring_dtypes
    from vllm_mac.ring_room import ring_room
    from vllm_mac.tools.doctor.index_room import index_room

    dtype = vllm_config.model_config.dtype
    layers, indexed = mac_layers(vllm_config), {}
    for layer in layers:
        layer.num_heads, layer.num_kv_heads = max(1, layer.num_heads // ranks), max(1, layer.num_kv_heads // ranks)
    if layers:
        settle(layers, dtype)
        found.config = layers[0].config
        found.ring_element = ring_dtypes(layers[0].config, dtype)[0].itemsize
        served = any(layer.exact is None for layer in layers)
        if served and found.config.rule == "index":
            found.index, indexed = index_room(layers, vllm_config, ranks)
        elif served:
            found.ring = ring_room(layers, dtype)
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(module, AttentionLayerBase):
            continue
        mac = getattr(getattr(module, "impl", None), "mac", None)
        state = "other" if mac is None else "exact" if mac.exact else "MAC"
        reason = module.get_attn_backend().get_name() if mac is None else mac.exact
        heads = size = kv_bytes = 0
        window = None
        if isinstance(module, Attention):  # other layers have states or latents
            heads, kv_heads = (max(1, n // ranks) for n in (module.num_heads, module.num_kv_heads))
            size, window = module.head_size, module.sliding_window
            kv_bytes = kv_heads * 2 * size * module.kv_cache_torch_dtype.itemsize
        index = indexed.get(name, 0.0)
        found.layers.append(Layer(name, extract_layer_index(name), state, reason, heads, size, kv_bytes, window, index))


def _weigh(found: Examined, built: torch.nn.Module, ranks: int) -> None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(built.modules())
    heads = {id(p) for module in modules if isinstance(module, ParallelLMHead) for p in module.parameters()}
    tables = {id(p) for module in modules if isinstance(module, VocabParallelEmbedding) for p in module.parameters()}
    # A token reads one row of an embedding. Without a separate head, the embedding is also the head, which is read whole.
    seen = tables - heads if heads else set()
    for module in modules:
        size = 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                size += parameter.numel() * parameter.element_size()
        if isinstance(module, RoutedExperts):
            found.experts.append((size // ranks, module.top_k / module.global_num_experts))
        else:
            found.dense_bytes += size // ranks


def groups(layers: list[Layer]) -> list[tuple[str, str | None, str, int]]:
    """(state, reason, layers in words, count), in order of the first layer of each group."""
    found: dict[tuple[str, str | None], list[int]] = {}
    for layer in layers:
        found.setdefault((layer.state, layer.reason), []).append(layer.index)
    return [(state, reason, _in_words(indices), len(indices)) for (state, reason), indices in found.items()]


def _in_words(indices: list[int]) -> str:
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index <= spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ("layer " if len(indices) == 1 else "layers ") + ", ".join(
        str(a) if a == b else f"{a}-{b}" for a, b in spans
    )
