"""The counters: their names, and how they are read from a running engine.

Heads and KV tokens are counted over decode steps, prefill excluded. One KV token is the key
and value of one token for one KV head, so that read + skipped is what full attention reads.

    vllm_mac_heads_total{layer, outcome="hit|miss|exact"}    query heads
    vllm_mac_kv_tokens_total{layer, kind="read|skipped"}     KV tokens
    vllm_mac_exact_total{reason}                             query heads, over all layers
    vllm_mac_rings{state="active|idle|free"}                 rings, each serving all layers
    vllm_mac_ring_bytes                                      bytes of all rings

With `rule: index` heads hit where the index was used, none misses, and there are no rings; read includes the index, as
the KV tokens that have as many bytes.

Where `audit` is above 0, of the query heads that hit in audited steps, or in any step of a request that asked for
audits (`per_request`), histograms as Prometheus
has them (`_bucket{layer, le}`, cumulative, and `_count{layer}`), which `histograms` reads back.
What audits read is in none of the counters above.

    vllm_mac_error       |out - exact| / |exact| of the head's output
    vllm_mac_lag         tokens back to the match
    vllm_mac_chain       hits since the exact evaluation that the result descends from

A server shows them on its `/metrics`, without any option (`exporter`), with vLLM's own labels `model_name` and
`engine` in addition. A process that has made an `LLM` reads the same with

    summarise(published())

Both cover this machine only. Workers of Ray and of other nodes are reached by messages, which needs
`worker_extension_cls="vllm_mac.metrics.WorkerExtension"` and gives a list of samples of each worker:

    summarise(*llm.collective_rpc("mac_counters"))

(`collective_rpc(counters)` needs no extension, but vLLM sends functions only where the engine runs in the calling
process, `VLLM_ENABLE_V1_MULTIPROCESSING=0`, or where `VLLM_ALLOW_INSECURE_SERIALIZATION=1`.)
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

from vllm_mac.series import CHAIN, ERROR, EXACT, HEADS, KV_TOKENS, LAG, RING_BYTES, RINGS, Sample, Series

__all__ = [
    "CHAIN", "ERROR", "EXACT", "HEADS", "KV_TOKENS", "LAG", "RINGS", "RING_BYTES", "Histogram", "Sample", "Summary",
    "WorkerExtension", "counters", "head_errors", "histograms", "published", "summarise",
]  # fmt: skip


class WorkerExtension:
    """Adds `collective_rpc("mac_counters")`: `--worker-extension-cls vllm_mac.metrics.WorkerExtension`."""

    def mac_counters(self) -> list[Sample]:
        return counters(self)


def counters(worker) -> list[Sample]:
    """All samples of one worker, as of now: waits for its device. Empty when no layer's backend is MAC."""
    # Imported here, because a client that only adds samples up needs no vLLM.
    import numpy as np

    from vllm_mac.layers import mac_layers
    from vllm_mac.requests import ring_states
    from vllm_mac.series import describe, groups, host_values, ring_memory

    layers = mac_layers(worker.vllm_config)
    device = next((layer.totals.tolist() for layer in layers if layer.served), [])
    rings, size = ring_memory(layers)
    states = ring_states(worker.model_runner) or ({"active": 0, "idle": 0, "free": rings} if rings else {})
    host = host_values(groups(layers), states, size)
    return describe(layers).samples(np.array(device + host, dtype=np.int64))


def published(root: int | None = None) -> list[Sample]:
    """All samples of the engines of this process, as of their last batch; waits for nothing.

    Those of the workers of one engine are added up, rings apart, which are the same on all of them. Labels are those
    above with `model_name` and `engine`, the data-parallel rank. One of several API servers reads the engines of the
    process that launched it.

    root: read the engines of this process instead, by its number.

    Two engines of one model that live in one process at once have equal labels, and are added up; the rings are the
    first one's.
    """
    from vllm_mac.counter_files import read

    ranks: dict[tuple, list] = {}
    for header, values in sorted(read(_root() if root is None else root), key=lambda one: one[0]["rank"]):
        # Tensor-parallel ranks count the same things, so that their values are added up before they are named.
        ranks.setdefault((header["model_name"], header["engine"], header["series"]), []).append(values)
    total: Counter[tuple] = Counter()
    with_rings = set()
    for (model, engine, text), values in ranks.items():
        series, own = _series(text), {"model_name": model, "engine": engine}
        samples = series._replace(rings=[]).samples(sum(values))
        if series.rings and (model, engine) not in with_rings:
            with_rings.add((model, engine))
            samples += series._replace(sums=[], histograms=[]).samples(values[0])
        for name, labels, value in samples:
            total[name, tuple((labels | own).items())] += value
    return [Sample(name, dict(labels), value) for (name, labels), value in total.items()]


_series = lru_cache(16)(Series.from_json)


def _root() -> int:
    """The process that this server's engines descend from."""
    parent = multiprocessing.parent_process()
    # vLLM names so the API servers, several, that one process starts beside their engines.
    if parent is not None and multiprocessing.current_process().name.startswith("ApiServer_"):
        return parent.pid
    return os.getpid()


def head_errors(worker) -> dict[str, list[list[int]]]:
    """Of each audited layer, the error histogram of each of this worker's query heads: `[H]` lists
    of one count per bucket of `audit.ERROR_EDGES`, not cumulative, the last for what is above."""
    from vllm_mac.layers import mac_layers

    layers = mac_layers(worker.vllm_config)
    return {layer.name: layer.audited[:-2].tolist() for layer in layers if layer.audited is not None}


class Histogram(NamedTuple):
    """counts: of the values in `(edges[i-1], edges[i]]`, the last of those above all edges."""

    edges: Sequence[float]
    counts: Sequence[int]

    def quantile(self, q: float) -> float | None:
        """See `audit.quantile`; None without entries."""
        from vllm_mac.audit import quantile

        return quantile(self.edges, self.counts, q)


def histograms(samples: Iterable[tuple[str, dict[str, str], int]], name: str) -> dict[str, Histogram]:
    """The histogram `name` (`ERROR`, `LAG` or `CHAIN`) of each audited layer, workers added up."""
    found: dict[str, Counter[float]] = {}
    for sample, labels, value in samples:
        if sample == f"{name}_bucket":
            found.setdefault(labels["layer"], Counter())[float(labels["le"])] += value
    made = {}
    for layer, cumulative in found.items():
        *edges, _ = sorted(cumulative)  # the last is infinity
        totals = [0, *(cumulative[le] for le in sorted(cumulative))]
        made[layer] = Histogram(edges, [b - a for a, b in pairwise(totals)])
    return made


class Summary(NamedTuple):
    """Counters of all layers and workers together.

    hit_rate: heads hit over heads decoded. read_share: KV tokens read over what full attention
    reads. Both are None before the first decode step. exact, exact_share: by reason, heads that were decoded exactly, and
    their share of all, the largest first.
    """

    hit_rate: float | None
    read_share: float | None
    exact: dict[str, int]
    exact_share: dict[str, float]


def summarise(*workers: Iterable[tuple[str, dict[str, str], int]]) -> Summary:
    """Add up the samples of one or several workers."""
    heads: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    for name, labels, value in chain.from_iterable(workers):
        if name == HEADS:
            heads[labels["outcome"]] += value
        elif name == KV_TOKENS:
            tokens[labels["kind"]] += value
        elif name == EXACT and value:
            exact[labels["reason"]] += value
    return Summary(
        heads["hit"] / heads.total() if heads.total() else None,
        tokens["read"] / tokens.total() if tokens.total() else None,
        dict(exact),
        {reason: value / heads.total() for reason, value in exact.most_common() if heads.total()},
    )
