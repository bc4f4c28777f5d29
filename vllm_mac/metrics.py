"""The counters: their names, and how they are read from a running worker.

Heads and KV tokens are counted over decode steps, prefill excluded. One KV token is the key
and value of one token for one KV head, so that read + skipped is what full attention reads.

    vllm_mac_heads_total{layer, outcome="hit|miss|exact"}    query heads
    vllm_mac_kv_tokens_total{layer, kind="read|skipped"}     KV tokens
    vllm_mac_exact_total{reason}                             query heads, over all layers
    vllm_mac_rings{state="active|idle|free"}                 rings, each serving all layers

Where `audit` is above 0, of the query heads that hit in audited steps, or in any step of a request that asked for
audits (`per_request`), histograms as Prometheus
has them (`_bucket{layer, le}`, cumulative, and `_count{layer}`), which `histograms` reads back.
What audits read is in none of the counters above.

    vllm_mac_error       |out - exact| / |exact| of the head's output
    vllm_mac_lag         tokens back to the match
    vllm_mac_chain       hits since the exact evaluation that the result descends from
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from vllm_mac.counters import REASONS, Count

if TYPE_CHECKING:
    from vllm_mac.layers import MacLayer

HEADS = "vllm_mac_heads_total"
KV_TOKENS = "vllm_mac_kv_tokens_total"
EXACT = "vllm_mac_exact_total"
RINGS = "vllm_mac_rings"
ERROR, LAG, CHAIN = "vllm_mac_error", "vllm_mac_lag", "vllm_mac_chain"


class Sample(NamedTuple):
    """One value of one counter or gauge, as Prometheus has it."""

    name: str
    labels: dict[str, str]
    value: int


class WorkerExtension:
    """Adds `collective_rpc("mac_counters")`: `--worker-extension-cls vllm_mac.metrics.WorkerExtension`.

    `LLM.collective_rpc(vllm_mac.metrics.counters)` needs no extension where the engine runs in
    the calling process.
    """

    def mac_counters(self) -> list[Sample]:
        return counters(self)


def counters(worker) -> list[Sample]:
    """All samples of one worker; empty when no layer's backend is MAC."""
    # Here, not above: whoever only adds samples up, as a client does, needs no vLLM.
    from vllm_mac.layers import mac_layers
    from vllm_mac.requests import ring_states

    layers = mac_layers(worker.vllm_config)
    exact: Counter[str] = Counter()
    samples = []
    for layer in layers:
        heads, tokens, reasons = _layer(layer)
        samples += [Sample(HEADS, {"layer": layer.name, "outcome": k}, v) for k, v in heads.items()]
        samples += [Sample(KV_TOKENS, {"layer": layer.name, "kind": k}, v) for k, v in tokens.items()]
        exact.update(reasons)
        if layer.audited is not None:
            samples += _audited(layer)
    samples += [Sample(EXACT, {"reason": k}, v) for k, v in exact.items()]
    samples += [Sample(RINGS, {"state": k}, v) for k, v in ring_states(worker.model_runner).items()]
    return samples


def _layer(layer: MacLayer) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Heads by outcome, KV tokens by kind and exact heads by reason of one layer."""
    if layer.exact is None:
        counts = layer.counts.tolist()
        reasons = {reason: counts[count] for count, reason in REASONS.items()}
        heads = {"hit": counts[Count.HIT], "miss": counts[Count.MISS], "exact": sum(reasons.values())}
        return heads, {"read": counts[Count.READ], "skipped": counts[Count.SKIPPED]}, reasons
    group = layer.group
    decoded, read = 0, 0
    if group is not None:
        decoded = group.decoded * layer.num_heads
        tokens = group.windowed[layer.sliding_window] if layer.sliding_window else group.context
        read = tokens * layer.num_kv_heads
    # What a sliding window leaves out full attention of that layer would not read either.
    return {"hit": 0, "miss": 0, "exact": decoded}, {"read": read, "skipped": 0}, {layer.exact: decoded}


def _audited(layer: MacLayer) -> list[Sample]:
    from vllm_mac.audit import COUNT_EDGES, ERROR_EDGES

    counts, label = layer.audited.cpu(), {"layer": layer.name}
    samples = []
    for name, edges, own in (
        (ERROR, ERROR_EDGES, counts[:-2].sum(0)), (LAG, COUNT_EDGES, counts[-2]), (CHAIN, COUNT_EDGES, counts[-1]),
    ):  # fmt: skip
        *cumulative, total = accumulate(own.tolist())
        limits = [*zip(edges, cumulative, strict=True), ("+Inf", total)]
        samples += [Sample(f"{name}_bucket", label | {"le": str(le)}, value) for le, value in limits]
        samples.append(Sample(f"{name}_count", label, total))
    return samples


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
    reads. Both are None before the first decode step.
    """

    hit_rate: float | None
    read_share: float | None
    exact: dict[str, int]


def summarise(samples: Iterable[tuple[str, dict[str, str], int]]) -> Summary:
    """Add up samples, for instance of several workers."""
    heads: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    for name, labels, value in samples:
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
    )
