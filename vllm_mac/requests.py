"""Which request each row of a batch belongs to, and which ring that request holds.

Attention metadata names no requests: a row's place changes from step to step, and V2's request
index is given to another request at once. vLLM's model runners know them, so `follow` wraps
their `execute_model`, which every executor calls with the scheduler's output, and V2's `prepare_inputs`,
which decides the order of the rows. The wrapping goes when vLLM's metadata names requests.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_mac.config import MacConfig
from vllm_mac.counters import OPTED_OUT
from vllm_mac.layers import MacLayer, mac_layers
from vllm_mac.owners import Arrival, Growth, RingOwners
from vllm_mac.per_request import NOTHING, Ask, RequestError, read

logger = init_logger("vllm.mac")

RUNNERS = {False: "vllm.v1.worker.gpu_model_runner", True: "vllm.v1.worker.gpu.model_runner"}  # V1, V2


@dataclass
class Batch:
    """The batch that a runner is executing. inputs: vLLM's own `InputBatch`, which V2 makes anew for each step."""

    runner: object
    scheduled: SchedulerOutput
    inputs: object = None


@dataclass
class Followed:
    """What is kept of a runner.

    owners: None where no layer has rings. groups: the KV-cache groups with a layer that MAC runs. layer: one of its
    layers. settings: the configuration of one of those that MAC runs. asks: what running requests asked for, of those
    that asked for something. prompts: of each running request the tokens of its prompt, and those there when it began.
    begun: where a KV connector may have written pages, the requests that begin in this step, or begin again, with tokens
    that are computed already; None where there is no connector.
    held: by index `[blocks]` int16, the KV-cache group that each block was last given to, -1 for none yet; else None.
    """

    owners: RingOwners | None
    groups: tuple[int, ...]
    layer: MacLayer | None = None
    settings: MacConfig = field(default_factory=MacConfig)
    asks: dict[str, Ask] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    begun: set[str] | None = None
    held: np.ndarray | None = None


class RowRings(NamedTuple):
    """What each row of a batch may do, by its request.

    ring: `[B]` int32, the request's ring, -1 for none, `OPTED_OUT` for none because the request wants none.
    fresh: `[B]` bool, whether it has just been given the ring, with nothing in it. skips: `[B]` bool, whether the row
    neither reads nor records, as those that verify speculated tokens do. slack: `[B]` float32, see `limits.limit`.
    audited: `[B]` bool, whether the request asked that its hits are audited. verifies: `[B]` bool, whether the row verifies
    speculated tokens, also of a request that wants no ring. begun: `[B]` bool, see `Followed`; such a row is read whole.
    """

    ring: np.ndarray
    fresh: np.ndarray
    skips: np.ndarray
    slack: np.ndarray
    audited: np.ndarray
    verifies: np.ndarray
    begun: np.ndarray


_batch: Batch | None = None
_followed: WeakKeyDictionary = WeakKeyDictionary()  # model runner -> Followed, or None where no layer is MAC's


def follow(vllm_config: VllmConfig) -> None:
    """Have the model runner of this configuration report what it executes; once a process."""
    runner = importlib.import_module(RUNNERS[bool(vllm_config.use_v2_model_runner)]).GPUModelRunner
    original = runner.execute_model
    if hasattr(original, "followed_by_mac"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def execute_model(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        if arguments.get("dummy_run"):
            return original(self, *args, **kwargs)
        with _executing(self, arguments["scheduler_output"]):
            return original(self, *args, **kwargs)

    execute_model.followed_by_mac = True
    runner.execute_model = execute_model
    if vllm_config.use_v2_model_runner:
        prepare = runner.prepare_inputs

        @functools.wraps(prepare)
        def prepare_inputs(self, *args, **kwargs):
            inputs = prepare(self, *args, **kwargs)
            if _batch is not None:
                _batch.inputs = inputs
            return inputs

        runner.prepare_inputs = prepare_inputs


def executing() -> bool:
    """Whether a batch of requests is being executed, as opposed to a dummy one or a graph's capture."""
    return _batch is not None


def row_rings(common: CommonAttentionMetadata) -> RowRings:
    """What a batch's rows may do; nothing where no batch of requests is being executed."""
    rows = common.num_reqs
    no = lambda: np.zeros(rows, dtype=bool)
    rings = RowRings(np.full(rows, -1, dtype=np.int32), no(), no(), np.ones(rows, dtype=np.float32), no(), no(), no())
    if _batch is not None:
        followed, verifying = _followed[_batch.runner], _batch.scheduled.scheduled_spec_decode_tokens
        if followed.owners is None and not (verifying or followed.asks or followed.begun):
            return rings  # as of almost all steps by index
        for row, request in enumerate(_batch.inputs.req_ids):  # without the padding at the end
            if followed.owners is not None:
                rings.ring[row], rings.fresh[row] = followed.owners.ring(request)
            rings.skips[row] = rings.verifies[row] = request in verifying
            if (ask := followed.asks.get(request)) is not None:
                rings.slack[row], rings.audited[row] = ask.slack, ask.audited
                if ask.exact:
                    rings.ring[row], rings.skips[row] = OPTED_OUT, False
            if followed.begun and request in followed.begun:
                rings.ring[row], rings.begun[row] = OPTED_OUT, True
    return rings


def prompt_lengths(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts of a batch's rows, and how many of them were there when their requests began; `[rows]` int64.

    0 for padding, and where no batch of requests is being executed.
    """
    lengths = np.zeros((2, rows), dtype=np.int64)
    if _batch is not None:
        known = [_followed[_batch.runner].prompts.get(request, (0, 0)) for request in _batch.inputs.req_ids]
        lengths[:, : len(known)] = np.array(known, dtype=np.int64).reshape(-1, 2).T
    return lengths[0], lengths[1]


def held_blocks(name: str) -> tuple[Tensor, int] | None:
    """The blocks `[n]` int64 of the KV-cache group of that layer, and how many blocks there are in all. None where no batch of
    requests is being executed. A block is that group's which it was last given to, also while it is in the prefix cache."""
    held = None if _batch is None else _followed[_batch.runner].held
    if held is None:
        return None
    groups = _batch.runner.kv_cache_config.kv_cache_groups
    own = next(i for i, group in enumerate(groups) if name in group.layer_names)
    return torch.from_numpy(np.flatnonzero(held == own)), len(held)


def ring_states(runner) -> dict[str, int]:
    """See `RingOwners.states`; empty before a runner's first batch and where all of its layers are exact."""
    followed = _followed.get(runner)
    return followed.owners.states() if followed is not None and followed.owners is not None else {}


@contextmanager
def _executing(runner, scheduled: SchedulerOutput) -> Iterator[None]:
    global _batch
    if runner not in _followed:
        _followed[runner] = _make(runner)
    if (followed := _followed[runner]) is None:
        yield
        return
    if followed.groups:
        _note(followed, scheduled)
        _batch = Batch(runner, scheduled, getattr(runner, "input_batch", None))  # V1 has one, which it edits
    try:
        yield
    finally:
        _batch = None
    if followed.layer is not None and followed.layer.publisher is not None:
        try:
            followed.layer.publisher.after_batch(ring_states(runner), idle=not scheduled.num_scheduled_tokens)
        except Exception:  # of which serving is no part
            logger.exception("MAC's counters are no longer published")
            followed.layer.publisher = None


def _make(runner) -> Followed | None:
    layers = mac_layers(runner.vllm_config)
    if not layers:
        return None
    served = [layer for layer in layers if layer.served]
    if not served:
        return Followed(None, (), layers[0])
    names = {layer.name for layer in served}
    all_groups = runner.kv_cache_config.kv_cache_groups
    groups = tuple(i for i, group in enumerate(all_groups) if names & set(group.layer_names))
    sizes = tuple(all_groups[i].kv_cache_spec.block_size for i in groups)
    # With pipeline stages that many batches are in flight, each with its own requests.
    stages = runner.vllm_config.parallel_config.pipeline_parallel_size
    owners = None
    if served[0].state is not None:
        owners = RingOwners(served[0].state.store.rings, served[0].config.min_context, sizes, stages)
    transfer = runner.vllm_config.kv_transfer_config
    begun = set() if transfer is not None and transfer.is_kv_transfer_instance else None
    held = None
    if served[0].index is not None:
        held = np.full(runner.kv_cache_config.num_blocks, -1, dtype=np.int16)
    return Followed(owners, groups, layers[0], served[0].config, begun=begun, held=held)


def _note(followed: Followed, scheduled: SchedulerOutput) -> None:
    """Pass the scheduler's output of a step on to the owners."""
    of_groups = lambda blocks: tuple(blocks[i] for i in followed.groups)
    going_on, asks, prompts = scheduled.scheduled_cached_reqs, followed.asks, followed.prompts
    for request in scheduled.finished_req_ids:
        asks.pop(request, None), prompts.pop(request, None)
    for x in scheduled.scheduled_new_reqs:
        asks.pop(x.req_id, None)
        length = length_from_prompt_token_ids_or_embeds(x.prompt_token_ids, x.prompt_embeds)
        prompts[x.req_id] = length, min(x.num_computed_tokens, length)
        # Pooling requests have no such parameters.
        try:
            ask = read(x.sampling_params.extra_args if x.sampling_params else None, followed.settings)
        except (
            RequestError
        ) as error:  # from a front end that checks nothing, such as vLLM's in Rust: other requests must go on
            logger.warning("MAC decodes request %s exactly: %s", x.req_id, error)
            ask = Ask(exact=True)
        if ask != NOTHING:
            asks[x.req_id] = ask
    if followed.held is not None:
        given = [x.block_ids for x in scheduled.scheduled_new_reqs]
        for each in (*given, *(blocks for blocks in going_on.new_block_ids if blocks is not None)):
            for i, blocks in enumerate(each):
                followed.held[list(blocks)] = i
        followed.held[0] = -1  # vLLM gives it to no request
    if followed.begun is not None:
        computed = zip(going_on.req_ids, going_on.num_computed_tokens, strict=True)
        resumed = [(request, n) for request, n in computed if request in going_on.resumed_req_ids]
        begun = [(x.req_id, x.num_computed_tokens) for x in scheduled.scheduled_new_reqs] + resumed
        followed.begun = {request for request, n in begun if n}
    if followed.owners is None:
        return
    arrived = [Arrival(x.req_id, x.num_computed_tokens, of_groups(x.block_ids)) for x in scheduled.scheduled_new_reqs]
    grown, length = [], {x.req_id: x.num_computed_tokens for x in scheduled.scheduled_new_reqs}
    for request, blocks, computed in zip(
        going_on.req_ids, going_on.new_block_ids, going_on.num_computed_tokens, strict=True
    ):
        length[request] = computed
        if request in going_on.resumed_req_ids:  # V1; the blocks are all that it has
            arrived.append(Arrival(request, computed, of_groups(blocks)))
        elif blocks is not None:
            grown.append(Growth(request, of_groups(blocks)))
    followed.owners.begin_step(
        {*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())},
        arrived,
        grown,
        {
            request: length[request] + tokens
            for request, tokens in scheduled.num_scheduled_tokens.items()
            if not asks.get(request, NOTHING).exact  # whose blocks are noted, as all are
        },
    )
