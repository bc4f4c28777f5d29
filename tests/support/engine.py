"""Builds small vLLM engines in this process and drives them step by step.

    with engine(path, runner="v2", backend="MAC") as llm:
        run = run_schedule(llm, [Add(0, "a", prompt, 32), Abort(9, "a")], Limits(chunk=64))

A schedule is deterministic: events happen before the step they name, decoding is
greedy and no stop token counts, so two engines that agree on the tokens also agree
on every batch. `Run` holds, beside the tokens, which paths were really taken.

One process may hold engines of both runners one after the other (2 s to start, 1.5 s to
stop), never two at once: distributed state and vLLM's current config are global.
"""

import atexit
import gc
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from unittest.mock import patch

from support import triton_cpu

RUNNERS = ("v1", "v2")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in this process, in reach of a test
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # logprobs would compile one small function for 20 s
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy needs none, and it would compile for minutes
    "OMP_NUM_THREADS": "1",  # on a busy machine two spinning threads are 20 times slower than one
}


@dataclass(frozen=True)
class Add:
    """Request `id` arrives before step `step` and ends after `max_tokens` tokens.

    prompt: token ids, or a function of the tokens generated so far, {id: tokens} -> ids.
    """

    step: int
    id: str
    prompt: list[int] | Callable
    max_tokens: int
    extra_args: dict | None = None  # what a client sends as vllm_xargs


@dataclass(frozen=True)
class Abort:
    step: int
    id: str


@dataclass(frozen=True)
class Preempt:
    """Throw every running request out of the KV cache, and the prefix cache with it."""

    step: int


@dataclass(frozen=True)
class Sleep:
    """Put the engine to sleep and wake it, from level 2 with weights loaded again; running requests are
    computed anew, as after `Preempt`."""

    step: int
    level: int


@dataclass(frozen=True)
class Call:
    """Do something to the engine: `action(llm)`."""

    step: int
    action: Callable


@dataclass(frozen=True)
class Limits:
    """Limits of one schedule, narrower than its engine's, so that one engine serves many."""

    chunk: int | None = None  # most tokens in a step
    seqs: int | None = None  # most requests in a step
    blocks: int | None = None  # KV blocks that may be in use, per KV cache group


@dataclass
class Run:
    tokens: dict[str, list[int]] = field(default_factory=dict, repr=False)
    # How many tokens a request had said after each step that gave some: with speculation a step gives several.
    said: dict[str, list[int]] = field(default_factory=dict, repr=False)
    # If asked for, of each token: by how much the best log-probability leads, and the chosen one's.
    gaps: dict[str, list[float]] = field(default_factory=dict, repr=False)
    tops: dict[str, list[dict[int, float]]] = field(default_factory=dict, repr=False)  # {token: log-probability}
    logprobs: dict[str, list[float]] = field(default_factory=dict, repr=False)
    steps: int = 0
    batch: int = 0  # most requests in one step
    mixed: int = 0  # steps with both prefill and decode rows
    # By request: times preempted; prompt tokens found in the prefix cache; steps that ended
    # inside a prompt; prefill steps of one token; tokens generated until it was aborted.
    preempted: Counter = field(default_factory=Counter)
    cached: Counter = field(default_factory=Counter)
    chunks: Counter = field(default_factory=Counter)
    single: Counter = field(default_factory=Counter)
    aborted: dict[str, int] = field(default_factory=dict)
    # (request, tokens found in the prefix cache, tokens in the first step) of each resumption
    resumed: list[tuple[str, int, int]] = field(default_factory=list)


@contextmanager
def engine(
    model,
    runner="v1",
    backend=None,
    additional_config=None,
    chunk=512,
    prefix_caching=False,
    blocks=None,
    block_size=32,
    max_num_seqs=8,
    max_model_len=1024,
    dtype="float32",
    memory=32 << 20,
    rule="match",
    **options,
):
    """A `vllm.LLM` on `model`, shut down and its memory returned at the end.

    backend: an attention backend's name, or None for vLLM's own. chunk: most tokens
    in one step. blocks: number of KV blocks (None: `memory` bytes of them), of which vLLM never
    gives out the first. rule: MAC's, where `additional_config` names none; None for MAC's own default. options: vLLM's
    own, which come before what is chosen here. block_size: the CPU backend takes multiples of 32.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner: {runner!r}, choose from {RUNNERS}")
    os.environ.update(ENVIRONMENT, VLLM_USE_V2_MODEL_RUNNER=str(RUNNERS.index(runner)))
    os.environ.pop(
        "VLLM_CPU_KVCACHE_SPACE", None
    )  # would come before `memory`, and every page costs time when maps change
    import torch

    torch.set_num_threads(1)  # vLLM replaces this function in its first engine
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.triton_utils import HAS_TRITON

    if runner == "v2" and not HAS_TRITON:
        raise RuntimeError("runner v2 needs Triton: triton_cpu.enable() before vllm is imported")
    if triton_cpu.enabled():
        triton_cpu.native_v1()
    llm, frozen = None, _modules_frozen()
    try:
        llm = LLM(
            model=str(model),
            dtype=dtype,
            disable_log_stats=True,
            seed=0,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=chunk,
            enable_prefix_caching=prefix_caching,
            block_size=block_size,
            kv_cache_memory_bytes=memory,
            num_gpu_blocks_override=blocks,
            attention_backend=backend,
            additional_config=with_rule(additional_config or {}, rule if backend == "MAC" else None),
            **{"enforce_eager": True} | shared_gpu() | options,
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            vars(llm).clear()  # the caller's name for it would keep the KV cache alive
        # Collects, and forgets vLLM's cached environment, so that the next engine may differ.
        cleanup_dist_env_and_memory()
        frozen.close()


def with_rule(additional_config: dict, rule: str | None) -> dict:
    """A configuration with this rule of MAC's, where it names none."""
    return additional_config | {"mac": {"rule": rule} | additional_config.get("mac", {})} if rule else additional_config


def _modules_frozen() -> ExitStack:
    """Until this is closed, collections of garbage pass over what is there now: mostly modules.

    vLLM collects eight times while an engine starts and stops, which took half of that time. By itself it freezes the
    engine too, and thaws everything in the end. On a GPU it may: there it also freezes what graphs are captured with.
    """
    import torch
    from vllm.v1.engine import core

    stack = ExitStack()
    if not torch.cuda.is_available():
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # else nanobind calls what is frozen at the end a leak
        stack.enter_context(patch.object(core, "freeze_gc_heap", lambda: None))
        stack.enter_context(patch.object(gc, "unfreeze", lambda: None))
    return stack


def shared_gpu() -> dict:
    """On a GPU, what lets an engine start beside other processes.

    With `kv_cache_memory_bytes` the share of the GPU decides nothing, but vLLM still asks at the start that so much
    be free. Of what is free now a little is asked for, so that this holds when others take more meanwhile.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": free / total / 4}


def worker(llm):
    """The worker of an engine that runs in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker


def run_schedule(llm, events, limits=Limits(), logprobs=0, max_steps=2000) -> Run:
    """Run `events` to their end on an idle engine whose prefix cache is emptied first.

    logprobs: how many of the best tokens' are kept of each position.
    """
    core, run, pending = llm.llm_engine, Run(), sorted(events, key=lambda event: event.step)
    names = {event.id for event in events if isinstance(event, Add)}
    if core.has_unfinished_requests():
        raise ValueError("run_schedule: the engine must be idle")
    if not llm.reset_prefix_cache():
        raise RuntimeError("run_schedule: KV blocks of an earlier schedule are still in use")
    scheduler = core.engine_core.engine_core.scheduler
    with _limited(scheduler, limits), _observed(scheduler, run, names):
        while pending or core.has_unfinished_requests():
            while pending and pending[0].step <= run.steps:
                _apply(llm, run, pending.pop(0), logprobs)
            for output in core.step():
                _record(run, output)
            run.steps += 1
            if run.steps > max_steps:
                raise RuntimeError(f"schedule not finished after {max_steps} steps")
    return run


def _apply(llm, run: Run, event, logprobs: int) -> None:
    from vllm import SamplingParams

    if isinstance(event, Add):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=event.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs or None,
            extra_args=event.extra_args,
        )
        prompt = event.prompt(run.tokens) if callable(event.prompt) else event.prompt
        run.tokens[event.id], run.gaps[event.id], run.logprobs[event.id] = [], [], []
        run.said[event.id] = []
        llm.llm_engine.add_request(event.id, {"prompt_token_ids": prompt}, params)
    elif isinstance(event, Abort):
        run.aborted[event.id] = len(run.tokens[event.id])
        llm.llm_engine.abort_request([event.id])
    elif isinstance(event, Sleep):
        llm.sleep(level=event.level, mode="keep")
        llm.wake_up(tags=["weights"])
        if event.level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    elif isinstance(event, Call):
        event.action(llm)
    else:
        llm.reset_prefix_cache(reset_running_requests=True)


def _record(run: Run, output) -> None:
    completion = output.outputs[0]
    if len(completion.token_ids) > len(run.tokens[output.request_id]):
        run.said[output.request_id].append(len(completion.token_ids))
    run.tokens[output.request_id] = list(completion.token_ids)
    if completion.logprobs:
        rows = list(zip(completion.token_ids, completion.logprobs, strict=True))
        best = [sorted((entry.logprob for entry in row.values()), reverse=True) for _, row in rows]
        run.gaps[output.request_id] = [first - second for first, second, *_ in best]
        run.logprobs[output.request_id] = [row[token].logprob for token, row in rows]
        run.tops[output.request_id] = [{token: x.logprob for token, x in row.items()} for _, row in rows]


@contextmanager
def _limited(scheduler, limits: Limits):
    """Narrow the scheduler, which reads its limits anew in every step."""
    wanted = {"max_num_scheduled_tokens": limits.chunk, "max_num_active_reqs": limits.seqs}
    saved = {name: getattr(scheduler, name) for name in wanted if wanted[name] is not None}
    for name, value in saved.items():
        setattr(scheduler, name, min(wanted[name], value))
    pool, held = scheduler.kv_cache_manager.block_pool, []
    if limits.blocks is not None:
        allowed = limits.blocks * len(scheduler.kv_cache_config.kv_cache_groups)
        held = pool.get_new_blocks(pool.get_num_free_blocks() - allowed)
    try:
        yield
    finally:
        pool.free_blocks(held)
        for name, value in saved.items():
            setattr(scheduler, name, value)


@contextmanager
def _observed(scheduler, run: Run, names: set):
    """Note in `run` what the scheduler really did."""
    schedule, seen, prefilling = scheduler.schedule, set(), set()

    def name(request_id):  # vLLM appends a random suffix to the id a client gave
        return request_id if request_id in names else request_id.rpartition("-")[0]

    def observed(*args, **kwargs):
        output = schedule(*args, **kwargs)
        run.preempted.update(map(name, output.preempted_req_ids or ()))
        new, old = output.scheduled_new_reqs, output.scheduled_cached_reqs
        computed = dict(zip(old.req_ids, old.num_computed_tokens, strict=True))
        started = {request_id: computed[request_id] for request_id in old.resumed_req_ids}
        started |= {request.req_id: request.num_computed_tokens for request in new}
        for request_id, found in started.items():
            if request_id in seen:  # V2 hands a resumed request over as a new one
                count = output.num_scheduled_tokens[request_id]
                run.resumed.append((name(request_id), found, count))
            else:
                run.cached[name(request_id)] = found
            seen.add(request_id)
            prefilling.add(request_id)
        prefills = 0
        for request_id, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[request_id]
            if request_id in prefilling:
                prefills += 1
                run.single[name(request_id)] += count == 1
                # This step's tokens already count as computed.
                if request.num_computed_tokens < request.num_tokens:
                    run.chunks[name(request_id)] += 1
                else:
                    prefilling.discard(request_id)
        rows = len(output.num_scheduled_tokens)
        run.batch = max(run.batch, rows)
        run.mixed += 0 < prefills < rows
        return output

    scheduler.schedule = observed
    try:
        yield
    finally:
        del scheduler.schedule


@dataclass(frozen=True)
class Divergence:
    """The first token on which two runs differ; `gaps` is what each had between its best two there.

    None: the run had ended, or its log-probabilities were not asked for.
    """

    id: str
    position: int
    tokens: tuple
    gaps: tuple


def first_divergence(a: Run, b: Run) -> Divergence | None:
    """None when two runs of one schedule have the same tokens; else their earliest difference."""
    if a.tokens.keys() != b.tokens.keys():
        raise ValueError(f"first_divergence: requests {sorted(a.tokens)} and {sorted(b.tokens)}")
    found = []
    for name in sorted(a.tokens):
        pairs = list(zip_longest(a.tokens[name], b.tokens[name]))
        gaps = list(zip_longest(a.gaps[name], b.gaps[name])) + [(None, None)] * len(pairs)
        differ = (i for i, (x, y) in enumerate(pairs) if x != y)
        found += [Divergence(name, i, pairs[i], gaps[i]) for i in islice(differ, 1)]
    return min(found, key=lambda divergence: divergence.position, default=None)


def mac_counters(llm) -> Counter:
    """MAC's counters over all layers and workers: query heads by outcome, KV tokens by kind.

    Workers in other processes need `worker_extension_cls="vllm_mac.metrics.WorkerExtension"`.
    """
    from vllm_mac import metrics

    apart = llm.llm_engine.vllm_config.parallel_config.world_size > 1
    total = Counter()
    for samples in llm.collective_rpc("mac_counters" if apart else metrics.counters):
        for sample in samples:
            key = sample.labels.get("outcome") or sample.labels.get("kind") or sample.name
            total[key] += sample.value
    return total
