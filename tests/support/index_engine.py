"""What tests of engines with `rule: index` look at: layers, counters, and the index of pages in the prefix cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from vllm.v1.core.kv_cache_utils import get_group_id

from support.engine import worker
from vllm_mac import lookup
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


def cached_pages(llm, layer: MacLayer) -> list[int]:
    """The pages of a layer's own blocks in the prefix cache: complete, and of tokens that stand."""
    config = worker(llm).model_runner.kv_cache_config
    own = next(i for i, group in enumerate(config.kv_cache_groups) if layer.name in group.layer_names)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    several = len(layer.cache) // config.num_blocks  # pages of a block
    blocks = [x.block_id for x in pool.blocks if x.block_hash is not None and get_group_id(x.block_hash) == own]
    return [block * several + i for block in blocks for i in range(several)]


def check_pages(llm) -> int:
    """Assert that each page in the prefix cache holds the codes of its keys and the mean of its values, in all layers.

    Returns how many a layer has, at least.
    """
    found = []
    for layer in layers(llm):
        kv, maps, pages = layer.cache, layer.index.maps, cached_pages(llm, layer)
        layout = PageLayout.of(kv, maps)
        codes, means = layout.views(kv)
        found.append(len(pages))
        if kv.is_cuda:  # rounded as the kernel rounds
            before = codes[pages].clone(), means[pages].clone()
            encode_kernels.encode(
                kv, torch.tensor(pages, device=kv.device) * layout.page + layout.page - 1, layout, maps
            )
            assert torch.equal(before[0], codes[pages]) and torch.equal(before[1], means[pages]), layer.name
            continue
        for one in pages:
            code, mean = encode(*kv[one].chunk(2, -1), maps)
            assert torch.equal(codes[one], code), f"{layer.name}: codes of page {one}"
            assert torch.equal(means[one], mean.to(means.dtype)), f"{layer.name}: mean of page {one}"
    return min(found)


@dataclass
class Watch:
    """Decode steps of layers beside the oracle. steps: how many. several: those with rows of several tokens. worst: largest
    |engine - oracle| over the largest |value|."""

    steps: int = 0
    several: int = 0
    worst: float = 0.0


@contextmanager
def watched() -> Iterator[Watch]:
    """Runs the oracle beside each decode step of each layer of an eager engine on a GPU. `index_shadow` does so on CPUs."""
    from vllm_mac import cuda

    decode, watch = cuda.LookupDecoder.decode, Watch()

    def watching(decoder, index, rows, query, kv, out):
        decode(decoder, index, rows, query, kv, out)
        first = list(range(len(rows.position) + 1)) if rows.begin is None else rows.begin.tolist()
        want = lookup.decode(rows, query[: first[-1]], kv, decoder.layout, index.maps, decoder.rule)
        last = [m + first[i + 1] - first[i] - 1 for i, m in enumerate(rows.position.tolist())]
        parts = len(last) // len(rows.block_table)
        pages = torch.cat([rows.block_table[i // parts, : m // kv.shape[2] + 1] for i, m in enumerate(last)])
        largest = index.maps.values(kv[pages.long()][..., kv.shape[3] // 2 :]).nan_to_num(0).abs().max()
        error = float((out[: first[-1]].float() - want.out).abs().max() / largest)
        watch.steps += 1
        watch.several += rows.begin is not None
        watch.worst = error if error != error else max(watch.worst, error)  # NaN stays

    cuda.LookupDecoder.decode = watching
    try:
        yield watch
    finally:
        cuda.LookupDecoder.decode = decode
