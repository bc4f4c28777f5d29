"""A decoder with its layers, and the plans that FlashInfer's engine launches."""

import torch

from support.devices import DEVICE
from support.rotations import rotation
from vllm_mac import audit
from vllm_mac.config import resolve
from vllm_mac.counters import Count
from vllm_mac.decoder import Decoder
from vllm_mac.kernels import plan
from vllm_mac.ring import RingTable, ring_dtypes
from vllm_mac.state import Geometry, LayerState, RingStore, Rows


def make(rows=9, heads=8, kv_heads=2, d=64, page=16, columns=40, rings=3, dtype=torch.float16, **keys):
    """A decoder and layers of four kinds: the first two differ in thresholds alone, the others in their rotation."""
    config = resolve({"rule": "match", "window": 32, "band": 24, "min_context": 64, "miss_engine": "triton"} | keys, {})
    geometry = Geometry(rows, heads, kv_heads, d, page, columns, dtype, config.band, config.sink, d**-0.5)
    decoder = Decoder(geometry, config, torch.device(DEVICE))
    query_dtype, out_dtype = ring_dtypes(config, dtype)
    layers = []
    for rotary_dim, neox, threshold in (
        (d, True, 0.4),
        (d, True, 0.7),
        (d, False, 0.4),
        (d // 2, False, 0.4),
        (0, True, 0.4),
    ):
        cache = torch.ones(page * columns, rotary_dim, dtype=dtype, device=DEVICE)
        rotary = rotation(cache, neox)
        store = RingStore.allocate(rings, heads, config.window, d, query_dtype, DEVICE, out_dtype)
        paused = None if config.error_budget is None else torch.zeros(1, dtype=torch.int32, device=DEVICE)
        layers.append(LayerState(
            store=store, config=config.model_copy(update={"threshold": threshold}), rotary=rotary,
            counts=torch.zeros(len(Count), dtype=torch.int64, device=DEVICE), paused=paused,
            audited=audit.histograms(heads, DEVICE) if config.audit else None,
        ))  # fmt: skip
    table = RingTable(rings, config.window, DEVICE)
    return decoder, layers, table


def fill_plans(
    most: int, kv_heads: int, slots: int, pdl: bool, columns: int, block_pages: int, head_pages: int
) -> None:
    """What `FlashInferExact` launches to tell FlashInfer what to read, for each number of rows up to `most`."""
    ints = lambda *size: torch.zeros(size, dtype=torch.int32, device=DEVICE)
    tiles = plan.capacity(most * kv_heads, slots)
    buffer = torch.zeros(64 * tiles + (1 << 16), dtype=torch.uint8, device=DEVICE)
    made = plan.Plan.in_buffer(buffer, most * kv_heads, tiles)
    geometry = Geometry(most, kv_heads, kv_heads, 64, 16, 9, torch.bfloat16, 256, 0, 1.0)
    for n in range(1, most + 1):
        rows = Rows(ints(n), None, None, None, ints(most, columns)[:n])
        plan.write_pages(rows, geometry, ints(9), ints(n + 1), ints(n), block_pages, head_pages)
        plan.write_plan(rows, geometry, ints(n, kv_heads), made, slots, pdl=pdl)
