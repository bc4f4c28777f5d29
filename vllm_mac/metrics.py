"""The counters: their names, and how they are read from a running worker.

Heads and KV tokens are counted over decode steps, prefill excluded. One KV token is the key
and value of one token for one KV head, so that read + skipped is what full attention reads.

    vllm_mac_heads_total{layer, outcome="hit|miss|exact"}    query heads
    vllm_mac_kv_tokens_total{layer, kind="read|skipped"}     KV tokens
    vllm_mac_exact_total{reason}                             query heads, over all layers
    vllm_mac_rings{state="active|idle|free"}                 rings, each serving all layers
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm_mac.layers import MacLayer

HEADS = "vllm_mac_heads_total"
KV_TOKENS = "vllm_mac_kv_tokens_total"
EXACT = "vllm_mac_exact_total"
RINGS = "vllm_mac_rings"


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

    layers = mac_layers(worker.vllm_config)
    exact: Counter[str] = Counter()
    samples = []
    for layer in layers:
        heads, tokens, reasons = _layer(layer)
        samples += [Sample(HEADS, {"layer": layer.name, "outcome": k}, v) for k, v in heads.items()]
        samples += [Sample(KV_TOKENS, {"layer": layer.name, "kind": k}, v) for k, v in tokens.items()]
        exact.update(reasons)
    samples += [Sample(EXACT, {"reason": k}, v) for k, v in exact.items()]
    rings: Counter[str] = Counter()
    for group in {id(layer.group): layer.group for layer in layers}.values():
        if group is not None and group.table is not None:
            rings.update(group.table.states())
    samples += [Sample(RINGS, {"state": k}, v) for k, v in rings.items()]
    return samples


def _layer(layer: MacLayer) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Heads by outcome, KV tokens by kind and exact heads by reason of one layer."""
    from vllm_mac.layers import HIT, MISS, NO_RING, READ, SHORT_CONTEXT, SKIPPED

    if layer.exact is None:
        counts = layer.counts.tolist()
        reasons = {"short_context": counts[SHORT_CONTEXT], "no_ring": counts[NO_RING]}
        heads = {"hit": counts[HIT], "miss": counts[MISS], "exact": sum(reasons.values())}
        return heads, {"read": counts[READ], "skipped": counts[SKIPPED]}, reasons
    group = layer.group
    decoded, read = 0, 0
    if group is not None:
        decoded = group.decoded * layer.num_heads
        tokens = group.windowed[layer.sliding_window] if layer.sliding_window else group.context
        read = tokens * layer.num_kv_heads
    # What a sliding window leaves out full attention of that layer would not read either.
    return {"hit": 0, "miss": 0, "exact": decoded}, {"read": read, "skipped": 0}, {layer.exact: decoded}


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
