"""One line in the log for each interval in which an engine decoded: what MAC did in it.

    MAC: by index 87.4%, KV read 17.2%, exact: short_context 12.6%
    MAC: hit rate 71.3%, KV read 34.0%, rings 3 of 8 active, exact: short_context 12.1%, no_ring 0.5%

The first is of `rule: index`, the second of `rule: match`. Shares are of the query heads, and of the KV tokens, of
the rank that writes the line. `VLLM_LOG_STATS_INTERVAL`, vLLM's own setting, is the number of seconds.
"""

from __future__ import annotations

import threading
import weakref
from logging import getLogger
from typing import TYPE_CHECKING

import numpy as np
from vllm import envs

from vllm_mac.metrics import summarise
from vllm_mac.series import RINGS, Series

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_mac.series import Sample

logger = getLogger("vllm.mac")


class LogLine:
    """Reads a worker's values, as they arrive on the host, in a thread of its own; until it is collected."""

    def __init__(self, series: Series, values: np.ndarray):
        """values: `[size]` int64, written by others."""
        stop = threading.Event()
        arguments = (series._replace(histograms=[]), values, values.copy(), stop)
        self._thread = threading.Thread(target=_write_lines, args=arguments, name="mac-log-line", daemon=True)
        self._begun = False
        weakref.finalize(self, stop.set)

    def begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._thread.start()


def _write_lines(series: Series, values: np.ndarray, before: np.ndarray, stop: threading.Event) -> None:
    while not stop.wait(envs.VLLM_LOG_STATS_INTERVAL):
        now = values.copy()
        text = line(series.samples(now - before), series.samples(now))
        before = now
        if text is not None:
            logger.info("%s", text)


def line(since: Sequence[Sample], now: Sequence[Sample]) -> str | None:
    """since: counters over the interval. now: gauges. None where nothing was decoded."""
    summary = summarise(since)
    if summary.hit_rate is None:
        return None
    rings = {labels["state"]: value for name, labels, value in now if name == RINGS}
    parts = [f"KV read {summary.read_share:.1%}"]
    if rings:
        parts = [f"hit rate {summary.hit_rate:.1%}", *parts, f"rings {rings['active']} of {sum(rings.values())} active"]
    elif summary.hit_rate:
        parts = [f"by index {summary.hit_rate:.1%}", *parts]
    if summary.exact_share:
        parts.append("exact: " + ", ".join(f"{reason} {share:.1%}" for reason, share in summary.exact_share.items()))
    return "MAC: " + ", ".join(parts)
