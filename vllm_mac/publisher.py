"""Publishes what a worker counts to its server's processes, and in the log.

After each batch the counters are copied into the worker's file (`counter_files`). From a GPU that is one copy on the
stream of the batch, and nothing waits for it: the file's memory is page-locked, so the copy lands in it, after the
batch and before its tokens reach a client. So an idle engine's file is complete, histograms of audits included.

Where CUDA does not page-lock the file's memory, copies land in buffers that it can use. What has arrived there is taken
into the file at the next batch, or at the empty one by which vLLM tells a runner that requests have ended. An engine
that runs in the process that calls `LLM` has no such batch, and its file then lacks the last step.
"""

from __future__ import annotations

import json
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from logging import getLogger
from typing import TYPE_CHECKING

import torch

from vllm_mac.counter_files import CounterFile
from vllm_mac.log_line import LogLine
from vllm_mac.series import describe, groups, host_values, ring_memory

if TYPE_CHECKING:
    from vllm_mac.layers import MacLayer

logger = getLogger("vllm.mac")


def publish(layers: Sequence[MacLayer]) -> None:
    """Publish the counters of a worker's layers from now on; to be called anew when their KV-cache groups are."""
    for layer in layers:
        layer.publisher = None  # and with the last of them its file is gone
    try:
        publisher = Publisher(layers)
    except Exception as error:  # of which serving is no part
        logger.warning("MAC's counters are not on /metrics, for want of a file to show them in: %r", error)
        return
    for layer in layers:
        layer.publisher = publisher


class Publisher:
    """file: where the counters of one worker's layers are published."""

    def __init__(self, layers: Sequence[MacLayer]):
        vllm_config, series = layers[0].vllm_config, describe(layers)
        parallel = vllm_config.parallel_config
        self._groups = groups(layers)
        self._rings, self._ring_bytes = ring_memory(layers)
        self.file = CounterFile(
            {
                # As vLLM labels its own.
                "model_name": vllm_config.model_config.served_model_name,
                "engine": str(parallel.data_parallel_index),
                "rank": parallel.rank,
                "series": json.dumps(series),
            },
            series.size,
        )
        totals = next((layer.totals for layer in layers if layer.served), None)
        self._copy = None if totals is None else copier(totals, self.file)
        counted = 0 if totals is None else len(totals)
        self._host = self.file.values[counted:]
        self._log_line = None
        self.after_batch({}, idle=True)
        if parallel.rank == 0:
            self._log_line = LogLine(series, self.file.values)

    def after_batch(self, rings: dict[str, int], idle: bool = False) -> None:
        """To be called after each batch, on its stream. rings: see `RingOwners.states`, empty for none in use.
        idle: whether the batch was empty."""
        if self._rings and not rings:
            rings = {"active": 0, "idle": 0, "free": self._rings}
        self._host[:] = host_values(self._groups, rings, self._ring_bytes)
        if self._copy is not None:
            self._copy(idle)
        if self._log_line is not None and not idle:
            self._log_line.begin()


def copier(totals: torch.Tensor, file: CounterFile) -> Callable[[bool], object]:
    """A function to be called after each batch, which copies `totals` to the beginning of the file's values.

    Its argument is whether the batch was empty. Nothing is read from a GPU then: the engine may be asleep.

    totals: `[n]` int64, on any device.
    """
    target = torch.from_numpy(file.values[: len(totals)])
    if not totals.is_cuda:
        return lambda idle: target.copy_(totals)
    refusal = page_lock(file)
    if refusal is not None:
        # CUDA keeps its error until it is read, and PyTorch would raise it at the next kernel's launch.
        try:
            torch.empty(1, device=totals.device).fill_(0)
        except RuntimeError:
            pass
    target.copy_(totals)
    if refusal is None:
        return lambda idle: None if idle else target.copy_(totals, non_blocking=True)
    logger.warning(
        "MAC's counters take a detour to /metrics and may be a step late there: CUDA does not page-lock the file (%s)",
        refusal,
    )
    return Detour(totals, target).copy


class Detour:
    """Copies from a GPU through page-locked buffers, one for each batch in flight."""

    def __init__(self, totals: torch.Tensor, target: torch.Tensor):
        self._totals, self._target = totals, target
        self._flying: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def copy(self, idle: bool) -> None:
        latest = None
        while self._flying and (idle or self._flying[0][1].query()):
            latest, arrived = self._flying.popleft()
            arrived.synchronize()  # waits only where nothing else is to run
        if latest is not None:
            self._target.copy_(latest)
        if not idle:
            buffer = torch.empty_like(self._totals, device="cpu", pin_memory=True)
            buffer.copy_(self._totals, non_blocking=True)
            self._flying.append((buffer, torch.cuda.Event()))
            self._flying[-1][1].record()


def page_lock(file: CounterFile) -> str | None:
    """Page-lock a file's memory until it is collected; the reason where CUDA does not."""
    address = file.memory.ctypes.data
    try:
        result = torch.cuda.cudart().cudaHostRegister(address, file.memory.nbytes, 0)
    except RuntimeError as error:
        return str(error)
    if result.value != 0:
        return f"cudaHostRegister: {result}"
    # Before the memory is unmapped; at exit everything goes with the process.
    weakref.finalize(file.memory, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
    return None
