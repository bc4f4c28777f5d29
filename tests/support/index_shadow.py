"""Runs the rule of the index, written plainly in float64, beside the engine, on the very queries, keys and values it had.

    with index_shadow(llm, opted_out={"b"}) as watch:
        run_schedule(llm, events)
    watch.worst, watch.looked ...

Every row of every layer is checked as it passes, and that each of its complete pages holds the codes of its keys. But for
pages of a request in its first step, where a KV connector may have written them: such a row is to be read whole.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from support.engine import worker
from support.indexed import Case, Row
from vllm_mac import cpu, kv_group, requests
from vllm_mac.key_index import PageLayout, encode


@dataclass
class Watch:
    rows: int = 0  # that decoded one token or verified speculated ones, over all layers
    tokens: int = 0  # of them
    first: int = 0  # of them, those of requests in their first step, whose prefix a KV connector may have loaded
    looked: int = 0  # of them, those that looked up the index
    undecided: int = 0  # of them, those with a token whose share is within rounding of the threshold
    read: int = 0  # KV tokens that decoding had to read
    chunks: int = 0  # rows prefilled, of several tokens
    pages: int = 0  # complete pages whose index was compared
    worst: float = 0.0  # largest |engine - rule| over the largest |value|, but for rows undecided
    kept: dict = field(default_factory=dict)  # {layer: its `_Pages`}


@contextmanager
def index_shadow(llm, opted_out=()):
    """opted_out: requests that are to be read whole."""
    runner, watch, batch = worker(llm).model_runner, Watch(), SimpleNamespace()
    prepare = getattr(runner, "prepare_inputs", None)
    if prepare is not None:  # V2 makes the row order here

        def prepare_inputs(*args, **kwargs):
            made = prepare(*args, **kwargs)
            batch.names = made.req_ids
            return made

        runner.prepare_inputs = prepare_inputs
    forward, step = cpu.MacCPUImpl.forward, kv_group.Group.step

    def watched_step(group, common, block_table):
        if prepare is None:
            batch.names = list(runner.input_batch.req_ids)
        batch.verifying = (
            set() if requests._batch is None else {*requests._batch.scheduled.scheduled_spec_decode_tokens}
        )
        return step(group, common, block_table)

    def watched(impl, layer, query, key, value, kv_cache, metadata, output, **scales):
        result = forward(impl, layer, query, key, value, kv_cache, metadata, output, **scales)
        if metadata is not None and impl.mac.served:
            kv_cache = impl.mac.rows(kv_cache)
            begin, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            for row, name in enumerate(batch.names):
                first = name in (requests._followed[runner].begun or ())
                tokens, blocks = slice(begin[row], begin[row + 1]), metadata.block_table[row]
                whole, one = first or name.rpartition("-")[0] in opted_out, begin[row + 1] - begin[row] == 1
                watch.first += first and one
                if one or name in batch.verifying:
                    _check(watch, impl, query[tokens], kv_cache, blocks, output[tokens], lengths[row], whole)
                else:
                    _check_chunk(watch, query[tokens], kv_cache, blocks, output[tokens], lengths[row])
                if not first:
                    _check_pages(watch, impl, kv_cache, blocks[: lengths[row] // kv_cache.shape[2]])
        return result

    cpu.MacCPUImpl.forward, kv_group.Group.step = watched, watched_step
    try:
        yield watch
    finally:
        cpu.MacCPUImpl.forward, kv_group.Group.step = forward, step
        if prepare is not None:
            del runner.prepare_inputs


class _Pages:
    """The pages of one layer as they were when their index was last compared: encoding all of them in every step is slow."""

    def __init__(self, parts: list[torch.Tensor]):
        self.kept, self.maps = [torch.zeros_like(part) for part in parts], []
        self.compared = torch.zeros(len(parts[0]), dtype=torch.bool)

    def changed(self, pages: torch.Tensor, parts: list[torch.Tensor], maps: list[torch.Tensor]) -> list[int]:
        """Those of the pages of which a byte is another now, or all where the maps are; kept as they are now."""
        if not self.maps or not all(map(torch.equal, self.maps, maps)):
            self.maps = [x.clone() for x in maps]
            self.compared.zero_()
        same = self.compared[pages]
        for part, kept in zip(parts, self.kept, strict=True):
            same = same & (part[pages] == kept[pages]).flatten(1).all(1)
        found = pages[~same]
        for part, kept in zip(parts, self.kept, strict=True):
            kept[found] = part[found]
        self.compared[found] = True
        return found.tolist()


def _check_pages(watch, impl, kv, pages) -> None:
    """That complete pages hold the codes of their keys. Speculated tokens may complete one; it is written anew if they go."""
    maps, pages = impl.mac.index.maps, pages.long()
    if not maps.ready or not len(pages):
        return
    codes, means = parts = PageLayout.of(kv, maps).views(kv)
    if impl.mac.name not in watch.kept:
        watch.kept[impl.mac.name] = _Pages([kv, *parts])
    for block in watch.kept[impl.mac.name].changed(pages, [kv, *parts], [maps.to_key, maps.shift]):
        code, mean = encode(*kv[block].chunk(2, -1), maps)
        assert torch.equal(codes[block], code) and torch.equal(means[block], mean.to(means.dtype))
    watch.pages += len(pages)


def _check_chunk(watch, query, kv, blocks, output, length: int) -> None:
    watch.chunks += 1
    scores = _causal(query, kv, blocks, length)
    watch.worst = max(watch.worst, float((output - scores).abs().max() / scores.abs().max()))


def _check(watch, impl, query, kv, blocks, output, length: int, whole: bool) -> None:
    maps, config, count = impl.mac.index.maps, impl.mac.config, len(query)
    layout = PageLayout.of(kv, maps)
    case = Case(
        (length,), layout.kv_heads, query.shape[1] // layout.kv_heads, layout.head_size, page=layout.page,
        tolerance=config.tolerance, sink=max(config.sink, 16), band=config.band, min_context=config.min_context,
        ready=bool(maps.ready), opted_out=(0,) if whole else (), tokens=(count,),
    )  # fmt: skip
    row = Row(
        SimpleNamespace(
            case=case, layout=layout, kv=kv, table=blocks[None], position=torch.tensor([length - count]), query=query, maps=maps,
            first=[0, count],
        ),
        0,
    )  # fmt: skip
    watch.rows += 1
    watch.tokens += count
    watch.looked += row.end > row.begin
    watch.read += int(row.chosen.sum()) + row.index_tokens * layout.kv_heads
    if config.tolerance and ((row.share * row.own / config.tolerance - 1).abs() < 1e-4).any():
        watch.undecided += 1
        return
    error = (output.double() - row.attention(row.chosen)).abs().max() / row.value.abs().max()
    watch.worst = max(watch.worst, float(error))


def _causal(query, kv, blocks, length: int) -> torch.Tensor:
    """Plain causal attention `[n, H, D]` of a row's last tokens."""
    n, heads, size = query.shape
    token = torch.arange(length)
    rows = kv[blocks[token // kv.shape[2]].long(), :, token % kv.shape[2]].double()
    key, value = (x.repeat_interleave(heads // kv.shape[1], 1) for x in rows.chunk(2, -1))  # [T, H, D]
    score = torch.einsum("nhd,thd->hnt", query.double(), key) * size**-0.5
    score.masked_fill_(token > torch.arange(length - n, length)[:, None], -torch.inf)
    return torch.einsum("hnt,thd->nhd", torch.softmax(score, -1), value).float()
