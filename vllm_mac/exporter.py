"""Puts MAC's counters on the `/metrics` of vLLM's server, beside vLLM's own.

At each scrape a collector reads the files of this server's workers (`counter_files`), so that no message is sent and no
worker waits. Several API servers of one engine all give the same answer. Workers that are not descendants of the
started process are missing: those of Ray, and those on other nodes. Their engines log a line (`log_line`), and
`collective_rpc("mac_counters")` reaches them (`metrics`). vLLM's front end in Rust shows none of these counters.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable, Iterator

from vllm_mac import metrics
from vllm_mac.counter_files import sweep
from vllm_mac.metrics import CHAIN, ERROR, EXACT, HEADS, KV_TOKENS, LAG, RING_BYTES, RINGS

logger = logging.getLogger("vllm.mac")

LABELS = ("model_name", "engine")
COUNTERS = {
    HEADS: ("Query heads in decode steps, by what became of them.", ("layer", "outcome")),
    KV_TOKENS: ("KV tokens of decode steps, per KV head; their sum is what full attention reads.", ("layer", "kind")),
    EXACT: ("Query heads in decode steps that did not try to reuse, by reason.", ("reason",)),
}
GAUGES = {
    RINGS: ("Rings, each of one sequence.", ("state",)),
    RING_BYTES: ("Bytes of memory of all rings of all workers.", ()),
}
HISTOGRAMS = {
    ERROR: ("Relative error of audited query heads that hit.", ("layer",)),
    LAG: ("Tokens back to the match of audited query heads that hit.", ("layer",)),
    CHAIN: ("Hits since the exact evaluation behind audited query heads that hit.", ("layer",)),
}


def install() -> None:
    """Have `prometheus_client` know the collector, in whichever of two ways a server asks it; once a process.

    vLLM's server asks the default registry. Several API servers, which put their own metrics into files, ask a
    registry for those files that is made anew for each scrape. Goes when vLLM has attention backends export counters.
    A failure is logged: a server works without these counters too.
    """
    try:
        from prometheus_client import REGISTRY
        from prometheus_client.multiprocess import MultiProcessCollector

        if hasattr(MultiProcessCollector.collect, "exporter"):
            return
        exporter = Exporter()
        REGISTRY.register(exporter)
        MultiProcessCollector.collect = _joined(MultiProcessCollector.collect, exporter)
        # A server kills its workers when it stops. What is finalised at exit comes in reverse order, and
        # whatever stops engines is made later than this.
        weakref.finalize(exporter, sweep, patience=2.0)
    except Exception:
        logger.exception("MAC's counters are not on this process's /metrics; `collective_rpc` still gives them")


def _joined(original, exporter: Exporter):
    @functools.wraps(original)
    def collect(self):
        yield from original(self)
        yield from exporter.collect()

    collect.exporter = exporter
    return collect


class Exporter:
    """A collector, as `prometheus_client` calls what a registry asks for metrics at each scrape."""

    def __init__(self):
        self._failed = False

    def describe(self) -> Iterable:
        """Metrics without samples: their names. A registry would read the files for them otherwise."""
        return _families().values()

    def collect(self) -> Iterator:
        try:
            samples = metrics.published()
        except Exception:  # which would be all that the server answers, its own metrics included
            if not self._failed:
                logger.exception("MAC's counters are not on /metrics")
            self._failed, samples = True, []
        from prometheus_client.samples import Sample

        families = _families()
        kind = {f"{name}{suffix}": name for name in HISTOGRAMS for suffix in ("_bucket", "_count")}
        for name, labels, value in samples:
            # Not through `add_metric`: that of histograms leaves out the count where there is no sum, and
            # nobody adds up the values here.
            family = families.get(kind.get(name, name))
            if family is not None:  # a worker of another version may have more
                family.samples.append(Sample(name, labels, value))
        return (family for family in families.values() if family.samples)


def _families() -> dict:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds = (CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES), (HistogramMetricFamily, HISTOGRAMS)
    return {
        name: family(name, text, labels=(*labels, *LABELS))
        for family, named in kinds
        for name, (text, labels) in named.items()
    }
