"""Which counters there are, and how their values follow from the integers that a worker counts.

A worker counts integers in two places: those of the layers that MAC runs on their device (`MacLayer.totals`), and on
the host those of `host_values`. One array of int64 holds both, in this order. `describe` gives how every sample follows
from it, so that another process needs only the array and the description.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from vllm_mac.layers import MacLayer

HEADS = "vllm_mac_heads_total"
KV_TOKENS = "vllm_mac_kv_tokens_total"
EXACT = "vllm_mac_exact_total"
RINGS = "vllm_mac_rings"
RING_BYTES = "vllm_mac_ring_bytes"
ERROR, LAG, CHAIN = "vllm_mac_error", "vllm_mac_lag", "vllm_mac_chain"
RING_STATES = ("active", "idle", "free")


class Sample(NamedTuple):
    """One value of one counter or gauge, as Prometheus has it."""

    name: str
    labels: dict[str, str]
    value: int


class Sum(NamedTuple):
    """A sample that is a weighted sum of integers. terms: where each lies, and its weight."""

    name: str
    labels: dict[str, str]
    terms: list[tuple[int, int]]


class Buckets(NamedTuple):
    """A histogram that is the sum of `rows` histograms, which begin at `at`; edges as for `audit.quantile`."""

    name: str
    labels: dict[str, str]
    edges: Sequence[float]
    at: int
    rows: int


class Series(NamedTuple):
    """sums: what may be added up over workers. rings: what is the same on all workers of an engine. size: how many
    integers there are."""

    sums: list[Sum]
    rings: list[Sum]
    histograms: list[Buckets]
    size: int

    @classmethod
    def from_json(cls, text: str) -> Series:
        sums, rings, histograms, size = json.loads(text)
        return cls([Sum(*x) for x in sums], [Sum(*x) for x in rings], [Buckets(*x) for x in histograms], size)

    def samples(self, values: np.ndarray) -> list[Sample]:
        """values: `[size]` int64."""
        integers, named = values.tolist(), self.sums + self.rings
        found = [Sample(name, labels, sum(integers[at] * n for at, n in terms)) for name, labels, terms in named]
        for name, labels, edges, at, rows in self.histograms:
            width = len(edges) + 1
            own = values[at : at + rows * width].reshape(rows, width).sum(0)
            *cumulative, total = accumulate(own.tolist())
            limits = [*zip(edges, cumulative, strict=True), ("+Inf", total)]
            found += [Sample(f"{name}_bucket", labels | {"le": str(le)}, value) for le, value in limits]
            found.append(Sample(f"{name}_count", labels, total))
        return found


def describe(layers: Sequence[MacLayer]) -> Series:
    """The series of a worker's layers, which are all that MAC has there, exact ones included. With `rule: index` there
    are no rings.

    To be made anew when their KV-cache groups are.
    """
    from vllm_mac.audit import COUNT_EDGES, ERROR_EDGES
    from vllm_mac.counters import REASONS, Count

    served = [layer for layer in layers if layer.served]
    size = len(served[0].totals) if served else 0
    first = {}
    for group in groups(layers):
        first[group] = size
        size += len(_group_values(group))
    sums, histograms = [], []
    exact: dict[str, list[tuple[int, int]]] = {}
    for layer in layers:
        heads, tokens = {"hit": [], "miss": [], "exact": []}, {"read": [], "skipped": []}
        if layer.served:
            at = layer.counts.storage_offset()
            heads = {
                "hit": [(at + Count.HIT, 1)],
                "miss": [(at + Count.MISS, 1)],
                "exact": [(at + x, 1) for x in REASONS],
            }
            tokens = {"read": [(at + Count.READ, 1)], "skipped": [(at + Count.SKIPPED, 1)]}
            for counter, reason in REASONS.items():
                exact.setdefault(reason, []).append((at + counter, 1))
        elif layer.group is not None:
            begin = first[layer.group]
            decoded, context, *windowed = range(begin, begin + len(_group_values(layer.group)))
            # What a sliding window leaves out full attention of that layer would not read either.
            length = dict(zip(layer.group.windowed, windowed, strict=True)).get(layer.sliding_window, context)
            heads["exact"], tokens["read"] = [(decoded, layer.num_heads)], [(length, layer.num_kv_heads)]
            exact.setdefault(layer.exact, []).extend(heads["exact"])
        else:
            exact.setdefault(layer.exact, [])
        sums += [Sum(HEADS, {"layer": layer.name, "outcome": k}, terms) for k, terms in heads.items()]
        sums += [Sum(KV_TOKENS, {"layer": layer.name, "kind": k}, terms) for k, terms in tokens.items()]
        if layer.audited is not None:
            at, label = layer.audited.storage_offset(), {"layer": layer.name}
            rows, width = layer.audited.shape
            histograms += [
                Buckets(ERROR, label, ERROR_EDGES, at, rows - 2),
                Buckets(LAG, label, COUNT_EDGES, at + (rows - 2) * width, 1),
                Buckets(CHAIN, label, COUNT_EDGES, at + (rows - 1) * width, 1),
            ]
    sums += [Sum(EXACT, {"reason": reason}, terms) for reason, terms in exact.items()]
    rings = []
    if any(layer.state is not None for layer in served):
        rings = [Sum(RINGS, {"state": state}, [(size + i, 1)]) for i, state in enumerate(RING_STATES)]
        sums.append(Sum(RING_BYTES, {}, [(size + len(RING_STATES), 1)]))
        size += len(RING_STATES) + 1
    return Series(sums, rings, histograms, size)


def groups(layers: Sequence[MacLayer]) -> list:
    """The KV-cache groups (`kv_group.Group`) of layers, each once."""
    return list(dict.fromkeys(layer.group for layer in layers if layer.group is not None))


def _group_values(group) -> list[int]:
    return [group.decoded, group.context, *group.windowed.values()]


def host_values(groups: Sequence, rings: dict[str, int], ring_bytes: int) -> list[int]:
    """What the host counts: of each group its totals, then rings by state and their bytes.

    rings: see `RingOwners.states`; empty where all layers are exact.
    """
    values = [value for group in groups for value in _group_values(group)]
    return values + [rings[state] for state in RING_STATES] + [ring_bytes] if rings else values


def ring_memory(layers: Sequence[MacLayer]) -> tuple[int, int]:
    """Rings of a worker's layers, and bytes of all of them."""
    stores = [layer.state.store for layer in layers if layer.state is not None]
    tensors = [tensor for store in stores for tensor in (store.query, store.out, store.lse, store.chain)]
    return stores[0].rings if stores else 0, sum(tensor.nbytes for tensor in tensors)
