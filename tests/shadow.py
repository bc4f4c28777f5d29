"""Runs the plain reference beside the engine, on the very queries, keys and values it had.

    with shadow(llm) as watch:
        run_schedule(llm, events)
    watch.worst, watch.decoded, watch.hits ...

The shadow knows what the engine may not: which request each row of a batch belongs to. It
keeps one ring per request, KV group and layer, and empties them whenever the request does
not go on where it stopped, or under another index of the runner's (V2 gives a resumed request
a new one, V1 tells none). It checks every row of every layer as it passes.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from engine import worker

from vllm_mac import cpu, paged, reference, steps
from vllm_mac.ring import narrow


@dataclass
class Rings:
    """One request's rings in one layer, `groups[k][g]`, and the last position they know."""

    groups: list
    index: int
    last: int = -1


@dataclass
class Watch:
    decoded: int = 0  # rows that decoded one token, over all layers
    hits: int = 0  # KV groups that hit
    misses: int = 0  # KV groups that tried and did not
    chunks: int = 0  # rows prefilled
    worst: float = 0.0  # largest |engine - reference| over the largest |reference| of its row
    rings: dict = field(default_factory=dict)
    restarts: int = 0  # times a request began anew after it had begun


@contextmanager
def shadow(llm):
    runner = worker(llm).model_runner
    watch, names = Watch(), []
    prepare = getattr(runner, "prepare_inputs", None)
    if prepare is not None:  # V2 makes the row order here

        def prepare_inputs(*args, **kwargs):
            batch = prepare(*args, **kwargs)
            names[:] = batch.req_ids
            return batch

        runner.prepare_inputs = prepare_inputs
    forward, step = cpu.MacCPUImpl.forward, steps.Group.step
    facts = []  # of each row: whether it still reads its prompt, and its index

    def watched_step(group, common):
        prompts = common.is_prefilling.tolist()
        facts[:] = zip(prompts, [-1] * len(prompts) if common.req_idx is None else common.req_idx.tolist())
        return step(group, common)

    def watched(impl, layer, query, key, value, kv_cache, metadata, output, **scales):
        result = forward(impl, layer, query, key, value, kv_cache, metadata, output, **scales)
        if metadata is not None and impl.mac.store is not None:
            rows = names if prepare is not None else runner.input_batch.req_ids
            _check(watch, impl, query, kv_cache, metadata, output, rows, facts)
        return result

    cpu.MacCPUImpl.forward, steps.Group.step = watched, watched_step
    try:
        yield watch
    finally:
        cpu.MacCPUImpl.forward, steps.Group.step = forward, step
        if prepare is not None:
            del runner.prepare_inputs


def _check(watch, impl, query, kv_cache, metadata, output, rows, facts) -> None:
    begin, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    for row, name in enumerate(rows):
        b, e = begin[row], begin[row + 1]
        start = lengths[row] - (e - b)
        prompt, index = facts[row]
        rings = _rings(watch, impl, name, index, start)
        rings.last = lengths[row] - 1
        key, value = paged.gather(kv_cache, metadata.block_table[row], torch.arange(lengths[row]))
        pre = impl.mac.rotary.undo(query[b:e], torch.arange(start, lengths[row]))
        run = _decode if e - b == 1 and not prompt else _prefill
        wanted = run(watch, impl, start, query[b:e].float(), pre, key, value, rings)
        _round(rings, impl.mac.store.query.dtype)
        if lengths[row] < impl.mac.config.min_context:
            for ring in (ring for group in rings.groups for ring in group):
                ring.clear()  # a sequence records from where matching begins
        error = (output[b:e].float() - wanted).abs().amax() / wanted.abs().amax()
        watch.worst = max(watch.worst, float(error))


def _rings(watch, impl, name, index, start) -> Rings:
    mac = impl.mac
    group = mac.num_heads // mac.num_kv_heads
    known = watch.rings.get((name, mac.name))
    if known is None or known.last != start - 1 or known.index != index:
        watch.restarts += known is not None
        known = Rings([[{} for _ in range(group)] for _ in range(mac.num_kv_heads)], index)
        watch.rings[name, mac.name] = known
    return known


def _round(rings: Rings, dtype: torch.dtype) -> None:
    """Queries decide by a hair which entry matches, so the shadow stores them as the engine does."""
    if dtype == torch.float32:
        return
    for ring in (ring for group in rings.groups for ring in group):
        for p, entry in ring.items():
            ring[p] = replace(entry, query=narrow(entry.query, dtype).to(entry.query.dtype))


def _decode(watch, impl, m, query, pre, key, value, rings) -> torch.Tensor:
    config, heads = impl.mac.config, impl.mac.num_kv_heads
    grouped, grouped_pre = query[0].unflatten(0, (heads, -1)), pre[0].unflatten(0, (heads, -1))
    outs = []
    for k in range(heads):
        step = reference.decode(m, grouped[k], grouped_pre[k], key[k], value[k], rings.groups[k], config, impl.scale)
        outs.append(step.out)
        watch.hits += step.hit
        watch.misses += not step.hit and m + 1 >= config.min_context
    watch.decoded += 1
    return torch.cat(outs)[None]


def _prefill(watch, impl, start, query, pre, key, value, rings) -> torch.Tensor:
    config, heads = impl.mac.config, impl.mac.num_kv_heads
    grouped, grouped_pre = query.unflatten(1, (heads, -1)), pre.unflatten(1, (heads, -1))
    outs = []
    for k in range(heads):
        reference.seed(start, grouped[:, k], grouped_pre[:, k], key[k], value[k], rings.groups[k], config, impl.scale)
        score = torch.einsum("ngd,td->ngt", grouped[:, k], key[k]) * impl.scale
        position = start + torch.arange(len(query))
        score.masked_fill_((torch.arange(key.shape[1]) > position[:, None])[:, None], -torch.inf)
        outs.append(score.softmax(-1) @ value[k])
    watch.chunks += 1
    return torch.cat(outs, 1)
