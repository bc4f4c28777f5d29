"""Compiles every kernel that an engine will launch, before it takes requests.

Triton compiles a kernel anew for each set of constants that a launcher passes, and for numbers that
are 1 or multiples of 16. Both follow the number of rows of a step, in ways that only the launchers know.
So there is no list of variants here: steps of every size are launched once, over rows that are all
padding, and Triton compiles what it has not compiled yet. A launch without work takes microseconds.
Before that, a first pass over the same steps launches nothing while threads compile.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import triton

from vllm_mac import lookup_decoder
from vllm_mac.decoder import Decoder
from vllm_mac.kernels import assign as assign_kernels
from vllm_mac.kernels import audit, complete, exact, hit, plan, record
from vllm_mac.kernels.assign import assign
from vllm_mac.kernels.record import record_prefill
from vllm_mac.lookup_decoder import LookupDecoder
from vllm_mac.ring import RingTable
from vllm_mac.state import Geometry, IndexState, LayerState, Seeds

logger = logging.getLogger("vllm.mac")
KERNELS = (
    (assign_kernels, "_assign_kernel"), (record, "_record_kernel"), (hit, "hit_kernel"), (exact, "prefix_kernel"),
    (complete, "_complete_kernel"), (audit, "_tally_kernel"), (plan, "_pages_kernel"), (plan, "_plan_kernel"),
)  # fmt: skip


def warm_up(decoder: Decoder, layers: Sequence[LayerState], table: RingTable) -> None:
    """Launch every kernel of the steps of these layers in every variant; once for a decoder.

    Rings, counters and histograms stay as they are. Where FlashInfer plans on the host
    (`Decoder.plans_on_host`) decode steps are left out: there each number of rows has a planner with buffers of its
    own, too many to make ahead.

    layers: those that the decoder decodes for.
    table: one like theirs that nobody else uses.
    """
    if decoder.warm:
        return
    decoder.warm = True
    begin = time.perf_counter()
    kinds = list({layer.variant: layer for layer in layers}.values())

    def launch():
        _assign(decoder, table)
        _prefill(decoder, kinds)
        if not decoder.plans_on_host:
            _decode(decoder, kinds)

    kernels = _compiled(KERNELS)
    with compilations() as compiled:
        if kernels and decoder.all_triton:  # without its plan FlashInfer's kernels must not run
            with compiling(kernels):
                launch()
        with watching(kernels) as spilled:
            launch()
    geometry = decoder.geometry
    logger.info(
        "MAC compiled %d kernel variants for up to %d sequences at once in %.1f s; %d were in Triton's cache",
        len(compiled), geometry.max_rows, time.perf_counter() - begin, sum(compiled),
    )  # fmt: skip
    _warn(spilled, geometry)


def warm_up_index(decoder: LookupDecoder, layer: IndexState) -> None:
    """`LookupDecoder.warm_up`, and a warning where registers spill."""
    with watching(_compiled(lookup_decoder.KERNELS)) as spilled:
        decoder.warm_up(layer)
    _warn(spilled, decoder.geometry)


def _compiled(kernels) -> list[triton.JITFunction]:
    """Those of the kernels `(module, name)` that are compiled: by Triton's interpreter, for one, none is."""
    return [kernel for module, name in kernels if isinstance(kernel := getattr(module, name), triton.JITFunction)]


def _warn(spilled: dict[str, int], geometry: Geometry) -> None:
    if spilled:
        logger.warning(
            "MAC's kernels for %d/%d heads of size %d spill registers, up to %s. ptxas 12.8 and 12.9 can lose a spilled "
            "register. Compare a few replies with those of another attention backend, and report this warning",
            geometry.heads, geometry.kv_heads, geometry.head_size,
            ", ".join(f"{most} a thread in {name}" for name, most in spilled.items()),
        )  # fmt: skip


@contextmanager
def compiling(kernels: Sequence[triton.JITFunction]) -> Iterator[None]:
    """Within it a launch only compiles, in threads. At the end every variant is compiled but those that fail to."""
    # On a machine with several GPUs each has a process that does the same.
    threads = max(1, min(16, len(os.sched_getaffinity(0)) // max(1, torch.cuda.device_count())))
    with (
        ThreadPoolExecutor(threads) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _running(kernels, _compile),
    ):
        yield


@contextmanager
def watching(kernels: Sequence[triton.JITFunction]) -> Iterator[dict[str, int]]:
    """The most registers that a thread of the launched variants spills, by kernel; kernels without spills are left out.

    ptxas can lose a spilled register (see `kernels.launch`), so MAC's kernels are built to spill none.
    """
    spilled: dict[str, int] = {}
    with _running(kernels, partial(_note, spilled)):
        yield spilled


@contextmanager
def _running(kernels: Sequence[triton.JITFunction], run) -> Iterator[None]:
    """Within it `kernel[grid](...)` calls `run(kernel, ...)`, and so does `kernel.warmup(...)`, with `warmup` true.

    The replacement goes when Triton has a public hook that sees a kernel's variant at each launch.
    """
    with ExitStack() as stack:
        for kernel in kernels:
            kernel.run = partial(run, kernel)
            stack.callback(delattr, kernel, "run")
        yield


def _compile(kernel, *args, warmup, **kwargs):
    return type(kernel).run(kernel, *args, warmup=True, **kwargs)


def _note(spilled: dict[str, int], kernel, *args, warmup, **kwargs):
    variant = type(kernel).run(kernel, *args, warmup=warmup, **kwargs)
    if not warmup and variant.n_spills:
        name = kernel.fn.__name__
        spilled[name] = max(variant.n_spills, spilled.get(name, 0))
    return variant


@contextmanager
def compilations() -> Iterator[list[bool]]:
    """A list with an entry for each kernel variant that Triton makes within it: whether its cache on disk had it."""
    knobs, found = triton.knobs.compilation, []
    others = knobs.listener

    def note(**facts):
        found.append(facts["cache_hit"])
        if others is not None:
            others(**facts)

    knobs.listener = note
    try:
        yield found
    finally:
        knobs.listener = others


def _decode(decoder: Decoder, layers: Sequence[LayerState]) -> None:
    geometry, device = decoder.geometry, decoder.position.device
    kv, blocks = _cache(decoder)
    shape = geometry.max_rows, geometry.heads, geometry.head_size
    query = torch.zeros(shape, dtype=geometry.dtype, device=device)
    out = torch.empty_like(query)
    decoder.position.fill_(-1), decoder.ring.fill_(-1)
    for n in range(1, geometry.max_rows + 1):
        rows = decoder.rows(blocks[:n])
        decoder.begin_step(rows, kv)
        for layer in layers:
            decoder.decode(layer, rows, query[:n], kv, out[:n])


def _prefill(decoder: Decoder, layers: Sequence[LayerState]) -> None:
    """One token that belongs to no row."""
    geometry, device = decoder.geometry, decoder.position.device
    kv, blocks = _cache(decoder)
    query = torch.zeros(1, geometry.heads, geometry.head_size, dtype=geometry.dtype, device=device)
    lse = torch.zeros(1, geometry.heads, dtype=torch.float32, device=device)
    none = torch.full((1,), -1, dtype=torch.int32, device=device)
    seeds = Seeds(none, none, none, torch.full_like(decoder.ring, -1), blocks)
    for layer in layers:
        record_prefill(layer, seeds, query, kv, query, lse, geometry.scale)


def _assign(decoder: Decoder, table: RingTable) -> None:
    """One row of no tokens. The kernel depends on the room for rows, not on how many there are."""
    ints = lambda size: torch.zeros(size, dtype=torch.int32, device=decoder.position.device)
    assign(table, ints(2), ints(1), ints(1), ints(1), *(torch.empty_like(decoder.position) for _ in range(3)))


def _cache(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """`(kv, block_table)`: a KV cache of one block, which nobody reads, and a table of nothing else.

    Its strides are multiples of 16 as a real one's are in every layout, because head sizes are.
    """
    g, device = decoder.geometry, decoder.position.device
    kv = torch.zeros(1, g.page_size, g.kv_heads, 2 * g.head_size, dtype=g.dtype, device=device)
    return kv.transpose(1, 2), torch.zeros(g.max_rows, 1, dtype=torch.int32, device=device)
