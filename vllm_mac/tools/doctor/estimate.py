"""An estimate of MAC's speed-up at a context, a batch and a hit rate, from bytes and a bandwidth.

    time per token = (weights + keys and values + rings) / bandwidth

    weights        the bytes of weights that a step reads (`Examined.weight_bytes`), the same for every backend
    exact          each row reads every key and value: context tokens, in sliding-window layers the window
    MAC            in layers that use MAC, a KV head that hits reads band + lag tokens; one that misses reads the context
    rings          each query head reads the `window` queries of its ring to find a match

With `rule: index` there are no rings, and hits have no rate:

    MAC            in layers that use MAC, each row reads READ of the KV tokens, and at least band + sink; all of them
                   where the batch has less KV than min_step_mib
    index          in these layers, each row reads the index of the whole context; these reads reach RATE of the bandwidth

READ is an assumption: about what a model of 1.5B parameters read, above its index, of source files of 30,000 tokens.
So is RATE: on an H200 47 % were reached by 16 rows of 30,000 tokens with 2 KV heads, 75 % by 16 of 131,072 with 8.

Assumptions: the rows of a batch have one length; each layer has the same hit rate; the match is LAG tokens back; rows
without a ring decode exactly, and so do contexts below min_context. Kernel launches, sampling and the host are left
out. They add the same time to both; MAC's own launches add a few microseconds a layer. So the gain is an upper bound.
"""

import time
from dataclasses import dataclass

from vllm_mac.tools.doctor.model import Examined

LAG = 64  # tokens; the benchmarks' mean lag
READ, RATE = 0.15, 0.5  # of the KV tokens, of the bandwidth; see above
PAYS = 1.05  # below it, the launches that are left out decide


@dataclass(frozen=True)
class Estimate:
    """Bytes of one decode step, and milliseconds a token. hit_rate: None with `rule: index`. ringed: rows with a ring."""

    context: int
    batch: int
    hit_rate: float | None
    ringed: int
    weight_bytes: float
    exact_kv_bytes: float
    mac_kv_bytes: float
    ring_bytes: float
    index_bytes: float
    exact_ms: float
    mac_ms: float

    @property
    def gain(self) -> float:
        return self.exact_ms / self.mac_ms

    @property
    def pays(self) -> bool:
        return self.gain >= PAYS


def estimate(model: Examined, context: int, batch: int, hit_rate: float, bandwidth: float) -> Estimate:
    """bandwidth: bytes per second. hit_rate: heads that hit over heads decoded, as in the counters; nothing to
    `rule: index`."""
    if model.index is not None:
        return _by_index(model, context, batch, bandwidth)
    tokens = lambda layer: min(context, layer.window or context)
    exact = sum(layer.kv_bytes * tokens(layer) for layer in model.layers)
    with_mac = [layer for layer in model.layers if layer.state == "MAC"]
    one_row, ring, ringed = exact, 0, 0
    config, rings_of_model = model.config, model.ring
    if config is not None and rings_of_model is not None and context >= config.min_context:
        _, fitting, wanted = rings_of_model
        ringed = min(batch, fitting, wanted)
        on_hit = min(context, config.band + config.sink + min(LAG, config.window))
        mean = (1 - hit_rate) * context + hit_rate * on_hit
        one_row = exact - sum(layer.kv_bytes * (context - mean) for layer in with_mac)
        ring = sum(layer.heads * config.window * layer.head_size * model.ring_element for layer in with_mac)
    weights = model.weight_bytes(batch)
    exact_kv, mac_kv, rings = batch * exact, ringed * one_row + (batch - ringed) * exact, ringed * ring
    exact_ms, mac_ms = (1000 * (weights + size) / bandwidth for size in (exact_kv, mac_kv + rings))
    return Estimate(context, batch, hit_rate, ringed, weights, exact_kv, mac_kv, rings, 0.0, exact_ms, mac_ms)


def _by_index(model: Examined, context: int, batch: int, bandwidth: float) -> Estimate:
    exact = sum(layer.kv_bytes * min(context, layer.window or context) for layer in model.layers)
    one_row, chosen, index, config = exact, 0.0, 0.0, model.config
    if config is not None and context >= config.min_context:
        read = min(context, max(READ * context, config.band + config.sink))
        least = config.min_step_mib * 2**20 / (batch * context)
        with_mac = [layer for layer in model.layers if layer.state == "MAC" and layer.kv_bytes >= least]
        looked_up = sum(layer.kv_bytes for layer in with_mac)
        one_row, chosen = exact - looked_up * (context - read), looked_up * read
        index = context * sum(layer.index_bytes for layer in with_mac)
    weights = model.weight_bytes(batch)
    exact_kv, mac_kv, indexed = batch * exact, batch * one_row, batch * index
    slow = batch * (chosen + index) * (1 / RATE - 1)  # as many bytes would take the time that is lost
    exact_ms, mac_ms = (1000 * (weights + size) / bandwidth for size in (exact_kv, mac_kv + indexed + slow))
    return Estimate(context, batch, None, 0, weights, exact_kv, mac_kv, 0.0, indexed, exact_ms, mac_ms)


def measured_bandwidth() -> tuple[float, str]:
    """Read bandwidth of this machine in bytes per second, and how it was measured."""
    import torch

    if torch.cuda.is_available():
        from vllm_mac.tools.bench.timing import read_bandwidth

        return read_bandwidth(1 << 30), "a read of 1 GiB on the GPU"
    source = torch.ones(64 << 20, dtype=torch.float32)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best, "a copy of 256 MiB by this CPU, which is no estimate for a GPU: give --bandwidth"
