"""How many rings a worker has: what they may take, and how many sequences could use one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_mac.config import MacConfigError
from vllm_mac.ring import ring_bytes, ring_dtypes

if TYPE_CHECKING:
    from vllm_mac.layers import MacLayer

logger = init_logger("vllm.mac")

SHARE = 0.05  # of the memory that vLLM may use on a GPU
WITHOUT_GPU = 4 * 2**30


def ring_count(layers: list[MacLayer], dtype: torch.dtype) -> int:
    """Rings of each layer that has any: as many as sequences, within the byte budget.

    Raises MacConfigError where the budget holds no ring, or fewer than `max_sequences` asks for.
    """
    config = layers[0].config
    one, fitting, wanted = ring_room(layers, dtype)
    budget = ring_budget(layers[0].vllm_config, config.ring_memory_gib) / 2**30
    given = f"ring_memory_gib: {'null is' if config.ring_memory_gib is None else 'received'} {budget:.4g}"
    if fitting < 1:
        served = [layer for layer in layers if layer.exact is None]
        raise MacConfigError(
            f"{given}, which holds no ring; one takes {one / 2**30:.3f} GiB over {len(served)} layers with window "
            f"{config.window}. Raise ring_memory_gib or lower window."
        )
    if config.max_sequences is not None and fitting < wanted:
        raise MacConfigError(
            f"max_sequences: received {wanted}, whose rings take {wanted * one / 2**30:.3f} GiB. {given}, which holds "
            f"{fitting}: choose {fitting} or less, or raise ring_memory_gib"
        )
    if fitting < wanted:
        logger.warning_once(
            "MAC: ring_memory_gib holds %d rings (%.4g GiB), not %d; sequences beyond that decode exactly",
            fitting, budget, wanted,
        )  # fmt: skip
    return min(wanted, fitting)


def ring_room(layers: list[MacLayer], dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of one ring over all layers that have rings, at least one; how many rings the byte budget holds;
    how many are wanted."""
    config, vllm_config = layers[0].config, layers[0].vllm_config
    one = sum(bytes_of_ring(layer, dtype) for layer in layers if layer.exact is None)
    wanted = config.max_sequences or min(vllm_config.scheduler_config.max_num_seqs, _most_long_sequences(layers, dtype))
    return one, int(ring_budget(vllm_config, config.ring_memory_gib) // one), wanted


def bytes_of_ring(layer: MacLayer, dtype: torch.dtype) -> int:
    """Bytes of one ring of a layer. dtype: the model's."""
    return ring_bytes(layer.num_heads, layer.config.window, layer.head_size, *ring_dtypes(layer.config, dtype))


def ring_budget(vllm_config: VllmConfig, gib: float | None) -> float:
    """Bytes that the rings of a worker may take. gib: `ring_memory_gib`."""
    if gib is not None:
        return gib * 2**30
    return SHARE * _memory(vllm_config) if current_platform.is_cuda() else WITHOUT_GPU


def _memory(vllm_config: VllmConfig) -> float:
    """Bytes of a GPU that vLLM may use."""
    return vllm_config.cache_config.gpu_memory_utilization * current_platform.get_device_total_memory()


def _most_long_sequences(layers: list[MacLayer], dtype: torch.dtype) -> int:
    """How many sequences of `min_context` tokens a GPU's KV cache holds at most: a shorter one needs no ring. At least one.

    What the cache will have is not known before it is profiled. It is less than what weights leave.
    """
    if not current_platform.is_cuda():
        return 2**31
    cache = layers[0].vllm_config.cache_config
    room = cache.kv_cache_memory_bytes or _memory(layers[0].vllm_config) - torch.cuda.memory_allocated()
    token = sum(2 * layer.num_kv_heads * layer.head_size * dtype.itemsize for layer in layers if layer.exact is None)
    return max(int(room // (token * layers[0].config.min_context)), 1)
