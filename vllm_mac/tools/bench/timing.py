"""Time on the device: replays of CUDA graphs, measured with CUDA events."""

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch


def graph_samples(calls: Sequence[Callable[[], object]], seconds: float = 0.3) -> list[float]:
    """Milliseconds per call. One graph captures all `calls` in order; each replay gives one sample.

    The graph is replayed for about `seconds`: at least 10 times, at most 100.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    once = max(_replays(graph, 1)[0], 1e-3)
    _replays(graph, min(50, int(20 / once)))  # clocks rise under load
    count = max(10, min(100, int(seconds * 1000 / once)))
    samples = [sample / len(calls) for sample in _replays(graph, count)]
    graph.reset()
    return samples


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def spaced(samples_of: Callable[[list], list[float]], read: Callable[[], object]) -> Callable[[list], list[float]]:
    """As `samples_of`, with `read` before each call; the median time of the reads alone is subtracted.

    In a model, reading the weights precedes a layer's attention. It evicts data and instructions from the GPU's caches,
    and no earlier kernel overlaps with the attention.
    """

    @functools.cache
    def alone(count: int) -> float:
        return statistics.median(samples_of([read] * count))

    def timed(calls: list) -> list[float]:
        both = samples_of([step for call in calls for step in (read, call)])
        return [2 * sample - alone(len(calls)) for sample in both]

    return timed


def reader(mib: int, device: torch.device) -> Callable[[], object]:
    """A function that reads `mib` MiB of memory, the same each time."""
    memory = torch.empty(mib << 10, 256, dtype=torch.float32, device=device).normal_()
    out = torch.empty(len(memory), dtype=torch.float32, device=device)
    return lambda: torch.amax(memory, 1, out=out)


def host_samples(call: Callable[[], object], count: int = 50) -> list[float]:
    """Milliseconds of host time of each call. The device is idle before each."""
    samples = []
    for _ in range(count + 5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        samples.append(1000 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return samples[5:]


def device_samples(call: Callable[[], object]) -> list[float]:
    """Milliseconds on the device of a call outside of layers. A call that cannot be captured is timed with its launches."""
    try:
        with warnings.catch_warnings():  # a call may launch nothing
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            return graph_samples([call] * 4, seconds=0.05)
    except RuntimeError:
        torch.cuda.synchronize()
        samples = []
        for _ in range(20):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end))
        return samples


def read_bandwidth(size: int = 4 << 30) -> float:
    """Bytes per second of a plain read of `size` bytes, which is most of what decoding does.

    The faster of two reductions counts. A copy would be slower: half of it is writing.
    """
    source = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
    reads = [lambda: source.sum(), lambda: source.view(-1, 4096).amax(1)]
    return size / (min(min(graph_samples([read], seconds=0.1)) for read in reads) / 1000)
