"""What the index of keys takes of a model's KV cache: by the page that vLLM chooses for the model's backends."""

from dataclasses import replace

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_mac.capabilities import index_page
from vllm_mac.key_index import PageLayout, directions
from vllm_mac.layers import MacLayer
from vllm_mac.tools.doctor.model import IndexRoom


def index_room(layers: list[MacLayer], vllm_config: VllmConfig, ranks: int) -> tuple[IndexRoom, dict[str, float]]:
    """The room, and by name of a layer that MAC runs the bytes of one token's part of its index.

    layers: those whose backend is MAC, settled. ranks: workers that share the KV heads.
    vLLM pads the pages of all layers of a kind, exact ones included; and where kinds differ, those of all layers.
    """
    current_platform.update_block_size_for_backend(vllm_config)  # as a worker does when it has its layers
    plain, padded, kinds, tokens, sizes = [], [], set(), {}, set()
    served = {layer.name: layer for layer in layers if layer.exact is None}
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        spec = module.get_kv_cache_spec(vllm_config) if hasattr(module, "get_kv_cache_spec") else None
        if not isinstance(spec, AttentionSpec):
            continue
        spec = replace(spec, num_kv_heads=max(1, spec.num_kv_heads // ranks))
        plain.append(spec.page_size_bytes)
        padded.append(module.get_attn_backend().customize_spec(spec).page_size_bytes)
        kinds.add(type(spec))
        if name in served:
            size = directions(spec.head_size, served[name].config.index_size)
            page = index_page(spec.block_size, "cuda" if current_platform.is_cuda() else "cpu")
            layout = PageLayout(spec.num_kv_heads, spec.head_size, page, size, spec.dtype.itemsize)
            tokens[name] = layout.index_bytes / layout.page
            sizes.add(size)
    if kinds != {FullAttentionSpec}:
        padded = [max(padded)] * len(padded)
    return IndexRoom(tuple(sorted(sizes)), vllm_config.cache_config.block_size, sum(plain), sum(padded)), tokens
