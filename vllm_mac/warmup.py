"""Compiles every kernel that serving will launch, before vLLM serves.

Triton compiles a kernel anew for each set of constants that a launcher gives it, and for numbers that
are 1 or multiples of 16. Both follow the number of rows of a step, in ways that only the launchers know.
So there is no list of variants here: steps of every size are launched once, over rows that are all
padding, and Triton compiles what it has not compiled yet. A launch without work takes microseconds.
Before that, the same steps are gone through without launching, while threads compile.
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

from vllm_mac.fused import Decoder, rotation
from vllm_mac.kernels import assign as assign_kernels
from vllm_mac.kernels import audit, complete, exact, hit, plan, record
from vllm_mac.kernels.assign import assign
from vllm_mac.kernels.record import record_prefill
from vllm_mac.ring import RingTable

logger = logging.getLogger("vllm.mac")
KERNELS = (
    (assign_kernels, "_assign_kernel"), (record, "_record_kernel"), (hit, "hit_kernel"), (exact, "prefix_kernel"),
    (complete, "_complete_kernel"), (audit, "_tally_kernel"), (plan, "_pages_kernel"), (plan, "_plan_kernel"),
)  # fmt: skip


def warm_up(decoder: Decoder, layers: Sequence, table: RingTable) -> None:
    """Launch every kernel of the steps of these layers in every variant; once for a decoder.

    Rings, counters and histograms stay as they are. Where FlashInfer plans on the host
    (`Decoder.plans_on_host`) decode steps are left out: each number of rows has a planner and its
    buffers there, too many to make ahead.

    layers: served ones that the decoder decodes for; of each `store`, `config`, `rotary`, `counts`,
        `audited` and `paused` are used.
    table: one like theirs that nobody else uses.
    """
    if decoder.warm:
        return
    decoder.warm = True
    begin = time.perf_counter()
    kinds = list({_kind(layer): layer for layer in layers}.values())

    def launch():
        _assign(decoder, table)
        _prefill(decoder, kinds)
        if not decoder.plans_on_host:
            _decode(decoder, kinds)

    # Triton's interpreter, for one, compiles nothing.
    kernels = [kernel for module, name in KERNELS if isinstance(kernel := getattr(module, name), triton.JITFunction)]
    with compilations() as compiled:
        if kernels and decoder.all_triton:  # FlashInfer's kernels would run after a plan that nobody made
            with compiling(kernels):
                launch()
        with watching(kernels) as spilled:
            launch()
    logger.info(
        "MAC compiled %d kernel variants for up to %d sequences at once in %.1f s; %d were in Triton's cache",
        len(compiled), decoder.problem.max_rows, time.perf_counter() - begin, sum(compiled),
    )  # fmt: skip
    if spilled:
        problem = decoder.problem
        logger.warning(
            "MAC's kernels for %d/%d heads of size %d keep registers in memory, up to %s. ptxas 12.8 and 12.9 have been "
            "seen to lose some of those; compare a few replies with another attention backend's, and report it",
            problem.heads, problem.kv_heads, problem.head_size,
            ", ".join(f"{most} a thread in {name}" for name, most in spilled.items()),
        )  # fmt: skip


def _kind(layer) -> tuple:
    """What kernels are compiled for in which layers of one decoder may differ: rings and rotation."""
    rope = rotation(layer.rotary)
    cache = rope.pop("cos_sin")
    rotates = None if cache is None else (cache.dtype, cache.shape[-1], rope["is_neox"])
    return layer.store.query.dtype, layer.store.out.dtype, rotates


@contextmanager
def compiling(kernels: Sequence[triton.JITFunction]) -> Iterator[None]:
    """Launches compile, in threads, and do nothing else meanwhile; at the end all is compiled but what fails to."""
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
    """By the names of kernels the most registers that a thread of what is launched keeps in memory, for want of registers.

    The compiler may do so, but there is one case that it gets wrong (see `kernels.launch`), so ours are cut so as
    to need none. Kernels that do need none are left out.
    """
    spilled: dict[str, int] = {}
    with _running(kernels, partial(_note, spilled)):
        yield spilled


@contextmanager
def _running(kernels: Sequence[triton.JITFunction], run) -> Iterator[None]:
    """What `kernel[grid](...)` calls, and `kernel.warmup(...)` with `warmup` true, is `run(kernel, ...)` meanwhile."""
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
    """A list with an entry for each kernel variant that Triton makes meanwhile: whether its cache on disk had it."""
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


def _decode(decoder: Decoder, layers: Sequence) -> None:
    problem, device = decoder.problem, decoder.position.device
    kv, blocks = _cache(decoder)
    query = torch.zeros(problem.max_rows, problem.heads, problem.head_size, dtype=problem.dtype, device=device)
    out = torch.empty_like(query)
    decoder.position.fill_(-1), decoder.ring.fill_(-1)
    for rows in range(1, problem.max_rows + 1):
        decoder.begin_step(blocks[:rows], kv)
        for layer in layers:
            decoder.decode(
                query[:rows], kv, blocks[:rows], layer.store, layer.config, layer.rotary, layer.counts, out[:rows],
                layer.audited, layer.paused,
            )  # fmt: skip


def _prefill(decoder: Decoder, layers: Sequence) -> None:
    """One token that belongs to no row."""
    problem, device = decoder.problem, decoder.position.device
    kv, blocks = _cache(decoder)
    query = torch.zeros(1, problem.heads, problem.head_size, dtype=problem.dtype, device=device)
    lse = torch.zeros(1, problem.heads, dtype=torch.float32, device=device)
    none = torch.full((1,), -1, dtype=torch.int32, device=device)
    for layer in layers:
        record_prefill(
            query, none, none, none, torch.full_like(decoder.ring, -1), blocks, kv, layer.store, layer.config,
            problem.scale, query, lse, **rotation(layer.rotary),
        )  # fmt: skip


def _assign(decoder: Decoder, table: RingTable) -> None:
    """One row of no tokens. The kernel depends on the room for rows, not on how many there are."""
    ints = lambda size: torch.zeros(size, dtype=torch.int32, device=decoder.position.device)
    assign(table, ints(2), ints(1), ints(1), ints(1), *(torch.empty_like(decoder.position) for _ in range(3)))


def _cache(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """`(kv, block_table)`: a KV cache of one block, which nobody reads, and a table of nothing else.

    Its strides are multiples of 16 as a real one's are in every layout, head sizes being so.
    """
    problem, device = decoder.problem, decoder.position.device
    kv = torch.zeros(1, problem.page_size, problem.kv_heads, 2 * problem.head_size, dtype=problem.dtype, device=device)
    return kv.transpose(1, 2), torch.zeros(problem.max_rows, 1, dtype=torch.int32, device=device)
