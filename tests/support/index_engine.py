"""What tests of engines with `rule: index` look at: layers, counters, and the index of pages in the prefix cache."""

from dataclasses import replace

import torch

from support.engine import worker
from vllm_mac.counters import Count
from vllm_mac.kernels import encode as encode_kernels
from vllm_mac.key_index import FEW, PageLayout, encode
from vllm_mac.layers import MacLayer, mac_layers

CONFIG = {"rule": "index", "min_context": 64, "band": 16}
# One of its outcomes is counted for each query head of a row that decodes one token.
OUTCOMES = ("HIT", "NO_MAPS", "SHORT_CONTEXT", "SMALL_STEP", "REQUEST")


def layers(llm) -> list[MacLayer]:
    """Those that have an index: a draft model's have none."""
    return [layer for layer in mac_layers(worker(llm).vllm_config) if layer.index is not None]


def counts(llm) -> dict[str, int]:
    """The counters of all layers together, by the name of each."""
    return {Count(i).name: n for i, n in enumerate(sum(layer.counts for layer in layers(llm)).tolist())}


def forget(llm) -> None:
    """Set all counters to 0."""
    for layer in layers(llm):
        layer.counts.zero_()


def rest(llm) -> None:
    """Have no text teach the maps from now on, but one much longer: they are as after many texts."""
    for layer in layers(llm):
        layer.group.lessons = replace(layer.group.lessons, texts=FEW)


def set_tolerance(llm, tolerance: float) -> None:
    """Have all layers decode with another tolerance from now on."""
    for layer in layers(llm):
        layer.config = layer.config.model_copy(update={"tolerance": tolerance})


def cached_pages(llm) -> list[int]:
    """The pages in the prefix cache: complete, and of tokens that stand."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return [block.block_id for block in pool.blocks if block.block_hash is not None]


def check_pages(llm) -> int:
    """Assert that each page in the prefix cache holds the codes of its keys and the mean of its values, in all layers.

    Returns how many there are.
    """
    pages = cached_pages(llm)
    for layer in layers(llm):
        kv, maps = layer.cache, layer.index.maps
        layout = PageLayout.of(kv, maps)
        codes, means = layout.views(kv)
        if kv.is_cuda:  # rounded as the kernel rounds
            found = codes[pages].clone(), means[pages].clone()
            encode_kernels.encode(kv, None, layout, maps)
            assert torch.equal(found[0], codes[pages]) and torch.equal(found[1], means[pages]), layer.name
            continue
        for one in pages:
            code, mean = encode(*kv[one].chunk(2, -1), maps)
            assert torch.equal(codes[one], code), f"{layer.name}: codes of page {one}"
            assert torch.equal(means[one], mean.to(means.dtype)), f"{layer.name}: mean of page {one}"
    return len(pages)
