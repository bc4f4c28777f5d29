"""`vllm-mac bench kernel`: one layer's decode attention, MAC beside the best exact decode.

For each shape in turn it times exact decoding, then MAC: with `rule: match` at each hit rate, with `rule: index` rows
that are looked up and rows that are read whole. Each result is first compared with float32 PyTorch; a wrong one ends
the run before its speed is reported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from vllm_mac.config import MacConfig
from vllm_mac.key_index import directions
from vllm_mac.ring import ring_bytes, ring_dtypes
from vllm_mac.tools.bench import BenchError, synthetic_index, timing
from vllm_mac.tools.bench.baselines import BASELINES
from vllm_mac.tools.bench.row_files import quantiles
from vllm_mac.tools.bench.synthetic_step import (
    DecodeStep,
    Shape,
    Step,
    check_planting,
    compare,
    exact_reference,
    expected_counts,
    make_step,
    plant,
    realised,
    reference,
)

PAGES = {"match": 16, "index": 64}  # tokens of a page by default: vLLM's, and what MAC prefers with an index
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class KernelBench:
    """What to measure: every combination of batches, contexts, heads and hit rates.

    heads: pairs of query heads and KV heads. layers: how many one graph captures; None: by batch. baselines: names of
    exact engines. between: MiB of other memory to read before each layer, see `timing.spaced`.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    hit_rates: tuple[float, ...]
    config: MacConfig
    head_size: int = 128
    dtype: str = "bfloat16"
    page: int = 16
    lags: str = "geometric"
    mean_lag: int = 64
    layers: int | None = None
    seed: int = 0
    baselines: tuple[str, ...] = tuple(BASELINES)
    between: int = 0

    @property
    def indexed(self) -> bool:
        return self.config.rule == "index"

    def shapes(self) -> list[Shape]:
        n = directions(self.head_size, self.config.index_size) if self.indexed else 0
        return [
            Shape(batch, context, heads, kv_heads, self.head_size, self.page, DTYPES[self.dtype], n)
            for heads, kv_heads in self.heads
            for context in self.contexts
            for batch in self.batches
        ]

    def rates(self, shape: Shape) -> list[float]:
        """Hit rates in falling order: the bound of the others needs the time of all hits. Below min_context only 0."""
        return sorted(set(self.hit_rates), reverse=True) if shape.context >= self.config.min_context else [0.0]

    def looks(self, shape: Shape) -> list[bool]:
        """With `rule: index`: whether rows are looked up, row of results by row. Below min_context they are not."""
        return [True, False] if shape.context >= self.config.min_context else [False]

    def measurements(self) -> int:
        of_mac = self.looks if self.indexed else self.rates
        return sum(len(self.baselines) + len(of_mac(shape)) for shape in self.shapes())


@dataclass(frozen=True, slots=True)
class Timers:
    """The clocks. Tests on CPUs replace them."""

    layers: Callable = timing.graph_samples
    host: Callable = timing.host_samples
    device: Callable = timing.device_samples


def require_cuda() -> None:
    if torch.cuda.is_available():
        return
    raise BenchError(
        f"bench kernel needs an NVIDIA GPU, and torch {torch.__version__} sees none here "
        "(torch.cuda.is_available() is False); bench decode also runs on CPUs"
    )


def run(
    bench: KernelBench, report: Callable[[str], None], device: str | torch.device = "cuda", timers: Timers = Timers()
) -> Iterator[dict]:
    """Rows as they are measured. report(what): called before each measurement."""
    device = torch.device(device)
    if bench.indexed:
        synthetic_index.check_options(bench.config, bench.head_size, bench.page)
    shapes = bench.shapes()
    bandwidth = None
    if device.type == "cuda":
        report("read bandwidth")
        bandwidth = timing.read_bandwidth()
    if bench.between:
        timers = replace(timers, layers=timing.spaced(timers.layers, timing.reader(bench.between, device)))
    report("filling the KV cache")
    pool = make_pool(bench, shapes, device)
    for shape in shapes:
        yield from _shape_rows(bench, shape, pool, bandwidth, report, timers)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def layer_count(bench: KernelBench, shape: Shape) -> int:
    """Layers in a graph: their rings, or their pages' indexes, exceed the GPU's caches several times."""
    return bench.layers or (24 if shape.batch <= 2 else 12 if shape.batch <= 16 else 5)


def make_pool(bench: KernelBench, shapes: list[Shape], device: torch.device) -> torch.Tensor:
    """Memory for all KV caches, filled with random numbers: the largest cache once, or several smaller ones."""
    size = max(shape.cache_elements for shape in shapes)
    many = max(shape.cache_elements * layer_count(bench, shape) for shape in shapes)
    size = max(size, min(many, 8 << 30))
    dtype = shapes[0].dtype
    if device.type == "cuda":
        # Also needed: rings, and for the check float32 copies of one row's KV and of one layer's rings.
        needed = size * dtype.itemsize + max(_other_bytes(bench, shape) for shape in shapes)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            raise BenchError(
                f"batch {max(bench.batches)}, context {max(bench.contexts)}: needs {needed / 2**30:.1f} GiB of GPU "
                f"memory and {free / 2**30:.1f} are free; lower --batch, --context or --layers"
            )
    pool = torch.empty(size, dtype=dtype, device=device)
    draw = torch.Generator(device).manual_seed(bench.seed)
    for part in pool.split(1 << 28):
        part.normal_(generator=draw)
    return pool


def _other_bytes(bench: KernelBench, shape: Shape) -> int:
    row = shape.cache_elements // shape.batch
    if bench.indexed:  # instead of rings, the kernels' lists and partial results
        return 4 * 4 * row + (2 << 30)
    ring = shape.batch * ring_bytes(
        shape.heads, bench.config.window, shape.head_size, *ring_dtypes(bench.config, shape.dtype)
    )
    return (layer_count(bench, shape) + 5) * ring + 3 * 4 * row + (1 << 30)


def _shape_rows(bench: KernelBench, shape: Shape, pool, bandwidth, report, timers: Timers) -> Iterator[dict]:
    make = synthetic_index.make_index_step if bench.indexed else make_step
    step = make(shape, bench.config, pool, layer_count(bench, shape), bench.seed)
    base = {
        "bench": "kernel", "rule": bench.config.rule, "heads": f"{shape.heads}/{shape.kv_heads}", "batch": shape.batch,
        "context": shape.context, "head_size": shape.head_size, "page": shape.page, "dtype": bench.dtype,
        "layers": len(step.layers), "seed": bench.seed, "read_bandwidth": bandwidth, "between_mib": bench.between,
    }  # fmt: skip

    def timed(samples: list[float], size: float) -> dict:
        floor = 1000 * size / bandwidth if bandwidth else None
        return {**quantiles(samples), "samples": len(samples), "bytes": size, "floor_ms": floor}

    exact = []
    truth = exact_reference(step, step.layers[0]) if bench.baselines else None
    for name in bench.baselines:
        report(f"{shape}: {name}")
        row = {**base, "engine": name}
        try:
            samples, note, error = _best(BASELINES[name], step, truth, timers)
        except BenchError:
            raise
        except Exception as failure:
            yield {**row, "error": f"{type(failure).__name__}: {failure}"}
            continue
        row |= timed(samples, shape.exact_bytes()) | {"note": note, "relative_error": error}
        exact.append(row["p50"])
        yield row
    del truth
    best = min(exact, default=None)
    if isinstance(step, synthetic_index.IndexStep):
        rows = _index_rows(bench, step, best, timed, report, timers)
    else:
        rows = _match_rows(bench, step, best, timed, report, timers)
    for row in rows:
        yield {**base, **row}


def _match_rows(bench: KernelBench, step: Step, best: float | None, timed, report, timers: Timers) -> Iterator[dict]:
    shape = step.shape
    decoder = _decoder(step)
    layers = step.layers
    begin = lambda: decoder.begin_step(decoder.rows(step.block_table), layers[0].kv, step.audited)
    begin_step = {
        "begin_host_ms": quantiles(timers.host(begin))["p50"],
        "begin_device_ms": quantiles(timers.device(begin))["p50"],
    }
    all_hit = None
    for rate in bench.rates(shape):
        report(f"{shape}: MAC, hit rate {rate:g}")
        plant(step, rate, bench.lags, bench.mean_lag, bench.seed)
        check_planting(step)
        error = check(step, decoder)
        samples = timers.layers([lambda layer=layer: _decode(step, decoder, layer) for layer in layers])
        check_counts(step, decoder)  # the replays must have had the same hits
        done = realised(step)
        row: dict = {"engine": "MAC", **timed(samples, done.step_bytes), "hit_rate": rate}
        row |= {"heads_matched": done.heads_matched, "groups_hit": done.groups_hit, "mean_lag": done.lag}
        row |= {"mean_group_lag": done.group_lag, "lags": f"{bench.lags}, mean {bench.mean_lag}"}
        row |= {"config": bench.config.describe(), "relative_error": error, **begin_step}
        all_hit = row["p50"] if rate == 1 and done.groups_hit == 1 else all_hit
        if best is not None:
            row |= {"best_exact_ms": best, "speedup": best / row["p50"]}
            if all_hit is not None:
                row["bound_ms"] = all_hit + (1 - done.groups_hit) * best
        yield row


def _index_rows(
    bench: KernelBench, step: synthetic_index.IndexStep, best: float | None, timed, report, timers: Timers
) -> Iterator[dict]:
    shape, layers, stages = step.shape, step.layers, synthetic_index.STAGES
    pair = 2 * shape.head_size * shape.dtype.itemsize  # bytes of a token's key and value

    def samples(count: int) -> list[float]:
        return timers.layers([lambda layer=layer: step.decode(layer, count) for layer in layers])

    for looked_up in bench.looks(shape):
        note = "looked up" if looked_up else "read whole"
        report(f"{shape}: MAC, {note}")
        # Rows below min_context need not ask for it.
        step.read_whole(not looked_up and shape.context >= bench.config.min_context)
        error, read = synthetic_index.check(step), synthetic_index.tokens_read(step)
        until = [quantiles(samples(count))["p50"] for count in range(1, len(stages))]
        whole = samples(len(stages))
        if synthetic_index.tokens_read(step) != read:
            raise BenchError(f"{shape}: MAC ({note}) reads other tokens after its replays")
        read = sum(read) / len(read)
        rows = 2 * shape.batch * shape.heads * shape.head_size * shape.dtype.itemsize  # queries and outputs
        row: dict = {"engine": "MAC", "note": note, **timed(whole, read * pair + rows)}
        row |= {"read_share": read / (shape.batch * shape.kv_heads * shape.context), "directions": shape.directions}
        until.append(row["p50"])
        row |= {f"{stage}_ms": end - begin for stage, begin, end in zip(stages, [0.0, *until[:-1]], until, strict=True)}
        row |= {"config": bench.config.describe(), "relative_error": error}
        if best is not None:
            row |= {"best_exact_ms": best, "speedup": best / row["p50"]}
        yield row


def _best(make, step: DecodeStep, truth, timers: Timers) -> tuple[list[float], str, float]:
    """Samples of an exact engine's fastest variant, that variant's name, and its error."""
    found, failures = [], []
    for note, calls in make(step):
        layer = step.layers[0]
        layer.out.fill_(float("nan"))
        try:
            calls[0]()
            error = compare(f"{make.__name__} ({note})", step, layer.out, truth)
            samples = timers.layers(calls)
        except BenchError:
            raise
        except Exception as failure:
            failures.append(failure)
            continue
        found.append((quantiles(samples)["p50"], samples, note, error))
    if not found:
        raise failures[0]
    return min(found, key=lambda x: x[0])[1:]


def _decoder(step: Step):
    from vllm_mac.decoder import Decoder
    from vllm_mac.state import Geometry

    shape, config = step.shape, step.config
    geometry = Geometry(
        max_rows=shape.batch, heads=shape.heads, kv_heads=shape.kv_heads, head_size=shape.head_size,
        page_size=shape.page, max_blocks=shape.row_pages, dtype=shape.dtype, band=config.band, sink=config.sink,
        scale=step.scale,
    )  # fmt: skip
    decoder = Decoder(geometry, config, step.ring.device)
    decoder.position.copy_(step.position)
    decoder.ring.copy_(step.ring)
    decoder.first.copy_(step.first)
    return decoder


def _decode(step: Step, decoder, layer) -> None:
    decoder.decode(step.state(layer), decoder.rows(step.block_table), layer.query, layer.kv, layer.out)


def check(step: Step, decoder) -> float:
    """Compare one layer's output with the method in PyTorch, and every layer's counters with the expected ones."""
    wanted = reference(step, step.layers[0])
    check_counts(step, decoder)
    return compare("MAC", step, step.layers[0].out, wanted)


def check_counts(step: Step, decoder) -> None:
    """Decode every layer once. Raises BenchError where hits, reads or output are wrong."""
    for layer in step.layers:
        layer.counts.zero_()
        layer.out.fill_(float("nan"))
    decoder.begin_step(decoder.rows(step.block_table), step.layers[0].kv, step.audited)
    for i, layer in enumerate(step.layers):
        _decode(step, decoder, layer)
        got, wanted = layer.counts.tolist(), expected_counts(step, layer)
        if got != wanted:
            raise BenchError(f"{step.shape}: counters of layer {i} are {got} and should be {wanted}")
        if layer.out.isnan().any():
            raise BenchError(f"{step.shape}: layer {i} left a part of its output unwritten, or NaN")
