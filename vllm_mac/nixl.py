"""vLLM's NIXL connectors beside pages with an index behind their keys and values.

They read and write memory by themselves, and take a layer's pages for as long as its view of them. All layers lie in
one allocation, and there they refuse views that leave out the end of each page. So they get views of whole pages, and
an index travels along; who receives it indexes those pages anew (`kv_group.Group.index_begun`).

Engines that cut KV heads or blocks differently exchange parts of pages: as long as a share of the page, from where such a share
begins. With an index behind all heads' keys and values those are the wrong bytes, which vLLM cannot see, so MAC refuses.
The wrapping goes when vLLM takes padded pages and copies keys and values alone.
"""

import functools
import inspect

from torch import Tensor
from vllm.config import VllmConfig

from vllm_mac.connectors import NIXL
from vllm_mac.layers import mac_layers


def whole_pages(cache: Tensor) -> Tensor:
    """A layer's cache `[blocks, K, P, 2 D]` as `[blocks, 1, 1, *]` of all that each page holds; itself where that is its view.

    Pages must be dense but for their end, and of no other layer's between them (`capabilities.INDEX_LAYOUTS`).
    """
    if cache.ndim != 4 or cache.stride(0) <= cache[0].numel():
        return cache
    page = cache.stride(0)
    return cache.as_strided((len(cache), 1, 1, page), (page, page, page, 1))


def cuts_differ(ours: tuple[int, int, str], theirs: tuple[int, int, str]) -> str | None:
    """Why engines cannot exchange pages with an index, or None. Of each: KV heads of a rank, tokens of a block, layout."""
    names = ("KV heads of a rank (--tensor-parallel-size)", "tokens of a block (--block-size)", "KV cache layout")
    different = [f"{name}: {x} here, {y} there" for name, x, y in zip(names, ours, theirs, strict=True) if x != y]
    if not different:
        return None
    return "MAC with rule: index exchanges whole KV pages by NIXL, and the other engine's differ in " + "; ".join(
        different
    )


def adapt(vllm_config: VllmConfig) -> None:
    """Have NIXL's connectors take pages with an index, where this configuration has one of them; once a process."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or not any(transfer.has_connector(name) for name in NIXL):
        return
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    register = NixlBaseConnectorWorker.register_kv_caches
    if hasattr(register, "adapted_by_mac"):
        return
    validate = NixlBaseConnectorWorker._validate_remote_agent_handshake
    signature = inspect.signature(validate)

    @functools.wraps(register)
    def register_kv_caches(self, kv_caches):
        self.mac_pages = any(layer.index is not None for layer in mac_layers(self.vllm_config))
        pages = {name: whole_pages(cache) for name, cache in kv_caches.items()} if self.mac_pages else kv_caches
        return register(self, pages)

    @functools.wraps(validate)
    def validate_remote_agent_handshake(self, *args, **kwargs):
        if self.mac_pages:
            arguments = signature.bind(self, *args, **kwargs).arguments
            other, heads = arguments["nixl_agent_meta"], self.transfer_topo.total_num_kv_heads
            ours = self.transfer_topo.local_physical_heads, self.block_size, self.kv_cache_layout
            theirs = max(1, heads // arguments["remote_tp_size"]), other.block_size, other.kv_cache_layout
            if reason := cuts_differ(ours, theirs):
                raise RuntimeError(reason)
        return validate(self, *args, **kwargs)

    register_kv_caches.adapted_by_mac = True
    NixlBaseConnectorWorker.register_kv_caches = register_kv_caches
    NixlBaseConnectorWorker._validate_remote_agent_handshake = validate_remote_agent_handshake
