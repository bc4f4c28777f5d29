"""The room that KV pages have for the index of their keys: vLLM copies and frees it with them. Pages are padded with it; of
hybrid models, whose blocks are several pages, it is part of the rows."""

from dataclasses import replace

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_mac.config import MacConfig
from vllm_mac.key_index import PageLayout, content_bytes, directions
from vllm_mac.layers import HEAD_SIZES, configuration, is_hybrid

_last: MacConfig | None = None  # of the engine that this process runs
_hybrid = False  # whether its model is
_served = True  # whether MAC may run any of its layers, as far as they are built


def note(vllm_config: VllmConfig, config: MacConfig, served: bool) -> None:
    """Remember a worker's configuration: vLLM asks for specs where it has none at hand. served: whether MAC may run any of the
    layers that are built."""
    global _last, _hybrid, _served
    _last, _hybrid, _served = config, is_hybrid(vllm_config), served


def in_rows() -> bool:
    """Whether the index is part of a page's rows: blocks of hybrid models are several pages, and those cannot be padded."""
    vllm_config = get_current_vllm_config_or_none()
    return indexing() is not None and (_hybrid if vllm_config is None else is_hybrid(vllm_config))


def indexing() -> MacConfig | None:
    """The configuration of the engine that this process runs, where it decodes by the index of keys; else None."""
    vllm_config: VllmConfig | None = get_current_vllm_config_or_none()
    config = _last if vllm_config is None else configuration(vllm_config)
    return config if config is not None and config.enabled and config.rule == "index" else None


def with_index(spec, least_page: int):
    """The spec of a layer's KV cache, with room for the index where the configuration asks for one and a layer may use it.

    least_page: tokens of the smallest page. Pages of all layers are of one size, also of those that are exact.
    """
    config = indexing()
    plain = type(spec) is FullAttentionSpec and spec.page_size_padded is None and spec.head_size == spec.head_size_v
    if config is None or not _served or not plain or spec.head_size not in HEAD_SIZES:
        return spec
    size = directions(spec.head_size, config.index_size)
    if in_rows():
        return replace(spec, state_content_bytes=content_bytes(spec.head_size, size, spec.dtype.itemsize, least_page))
    layout = PageLayout(spec.num_kv_heads, spec.head_size, spec.block_size, size, spec.dtype.itemsize)
    return replace(spec, page_size_padded=layout.padded_bytes)
