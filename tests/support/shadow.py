"""Runs the plain reference beside the engine, on the very queries, keys and values it had.

    with shadow(llm) as watch:
        run_schedule(llm, events)
    watch.worst, watch.decoded, watch.hits ...

The shadow keeps a ring of its own for each ring of the engine, in every layer, and beside it the
tokens that it was recorded from (`Span`): whoever reads a ring must have them as its own. It checks
every row of every layer as it passes.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from support.engine import worker
from support.spans import Span, Texts
from vllm_mac import cpu, kv_group, paged, reference, requests
from vllm_mac.ring import narrow


@dataclass
class Watch:
    decoded: int = 0  # rows that decoded one token, over all layers
    hits: int = 0  # KV groups that hit
    misses: int = 0  # KV groups that tried and did not
    chunks: int = 0  # rows prefilled
    worst: float = 0.0  # largest |engine - reference| over the largest |reference| of its row
    rings: dict = field(default_factory=dict)  # (ring, layer) -> (Span, groups[k][g])
    empty: int = 0  # rows that were given a ring with nothing in it
    taken_over: int = 0  # rows of a request that begin in a ring with something in it
    readers: dict = field(default_factory=dict)  # (ring, layer) -> the latest request, and its length


@contextmanager
def shadow(llm):
    runner = worker(llm).model_runner
    watch, batch, texts = Watch(), SimpleNamespace(), Texts(runner)
    prepare = getattr(runner, "prepare_inputs", None)
    if prepare is not None:  # V2 makes the row order here

        def prepare_inputs(*args, **kwargs):
            made = prepare(*args, **kwargs)
            batch.names, batch.inputs = made.req_ids, made.input_ids
            return made

        runner.prepare_inputs = prepare_inputs
    forward, step = cpu.MacCPUImpl.forward, kv_group.Group.step

    def watched_step(group, common, block_table):
        if prepare is None:
            batch.names, batch.inputs = list(runner.input_batch.req_ids), runner.input_ids.gpu
        batch.prompts, batch.rings = common.is_prefilling.tolist(), requests.row_rings(common)
        batch.tokens = None
        return step(group, common, block_table)

    def watched(impl, layer, query, key, value, kv_cache, metadata, output, **scales):
        result = forward(impl, layer, query, key, value, kv_cache, metadata, output, **scales)
        if metadata is not None and impl.mac.served:
            begin, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            if batch.tokens is None:
                spans = zip(batch.names, begin, begin[1:], lengths)
                batch.tokens = [texts.of(name, n - (e - b), batch.inputs[b:e].tolist()) for name, b, e, n in spans]
            for row in range(len(batch.names)):
                _check(watch, impl, query, kv_cache, metadata, output, batch, row, begin[row : row + 2], lengths[row])
        return result

    cpu.MacCPUImpl.forward, kv_group.Group.step = watched, watched_step
    try:
        yield watch
    finally:
        cpu.MacCPUImpl.forward, kv_group.Group.step = forward, step
        if prepare is not None:
            del runner.prepare_inputs


def _check(watch, impl, query, kv_cache, metadata, output, batch, row, ends, length) -> None:
    b, e = ends
    start = length - (e - b)
    span, groups = _rings(watch, impl, batch, row, start)
    key, value = paged.gather(kv_cache, metadata.block_table[row], torch.arange(length))
    pre = impl.mac.rotary.undo(query[b:e], torch.arange(start, length))
    run = _decode if e - b == 1 and not batch.prompts[row] else _prefill
    wanted = run(watch, impl, start, query[b:e].float(), pre, key, value, groups)
    _round(groups, impl.mac.state.store.query.dtype)
    span.end(length, batch.tokens[row])
    error = (output[b:e].float() - wanted).abs().amax() / wanted.abs().amax()
    watch.worst = max(watch.worst, float(error))


def _rings(watch, impl, batch, row, start) -> tuple[Span, list]:
    """What the row's ring holds; a ring for nobody where it has none."""
    mac, (ring, fresh, skips) = impl.mac, (int(x[row]) for x in batch.rings[:3])
    nothing = Span(), [[{} for _ in range(mac.num_heads // mac.num_kv_heads)] for _ in range(mac.num_kv_heads)]
    if ring < 0 or skips:
        return nothing
    span, groups = watch.rings.setdefault((ring, mac.name), nothing)
    span.begin(start, batch.tokens[row], bool(fresh), mac.config.window)
    for entries in (entries for group in groups for entries in group):
        for p in [p for p in entries if not span.first <= p < start]:
            del entries[p]
    watch.empty += fresh
    before = watch.readers.get((ring, mac.name))
    watch.taken_over += span.first < start and before != (batch.names[row], start)
    watch.readers[ring, mac.name] = batch.names[row], len(batch.tokens[row])
    return span, groups


def _round(groups: list, dtype: torch.dtype) -> None:
    """Queries decide by a hair which entry matches, so the shadow stores them as the engine does."""
    if dtype == torch.float32:
        return
    for ring in (ring for group in groups for ring in group):
        for p, entry in ring.items():
            ring[p] = replace(entry, query=narrow(entry.query, dtype).to(entry.query.dtype))


def _decode(watch, impl, m, query, pre, key, value, groups) -> torch.Tensor:
    config, heads = impl.mac.config, impl.mac.num_kv_heads
    grouped, grouped_pre = query[0].unflatten(0, (heads, -1)), pre[0].unflatten(0, (heads, -1))
    outs = []
    for k in range(heads):
        step = reference.decode(m, grouped[k], grouped_pre[k], key[k], value[k], groups[k], config, impl.scale)
        outs.append(step.out)
        watch.hits += step.hit
        watch.misses += not step.hit and m + 1 >= config.min_context
    watch.decoded += 1
    return torch.cat(outs)[None]


def _prefill(watch, impl, start, query, pre, key, value, groups) -> torch.Tensor:
    config, heads = impl.mac.config, impl.mac.num_kv_heads
    grouped, grouped_pre = query.unflatten(1, (heads, -1)), pre.unflatten(1, (heads, -1))
    outs = []
    for k in range(heads):
        reference.seed(start, grouped[:, k], grouped_pre[:, k], key[k], value[k], groups[k], config, impl.scale)
        score = torch.einsum("ngd,td->ngt", grouped[:, k], key[k]) * impl.scale
        position = start + torch.arange(len(query))
        score.masked_fill_((torch.arange(key.shape[1]) > position[:, None])[:, None], -torch.inf)
        outs.append(score.softmax(-1) @ value[k])
    watch.chunks += 1
    return torch.cat(outs, 1)
