"""`vllm-mac bench kernel`: the data it plants, what it checks, and its rows.

Speed itself needs a GPU. Here the kernels run under Triton's interpreter with clocks that return made-up times.
"""

import io
import math

import pytest
import torch
from rich.console import Console

from support.devices import DEVICE
from vllm_mac import key_index, lookup, paged
from vllm_mac.config import resolve
from vllm_mac.counters import Count
from vllm_mac.tools import environment
from vllm_mac.tools.bench import BenchError, kernel, row_tables, synthetic_index
from vllm_mac.tools.bench import synthetic_step as data

CONFIG = resolve({"rule": "match", "window": 32, "band": 24, "min_context": 64, "miss_engine": "triton"}, {})


def make(batch=3, context=200, heads=(4, 2), layers=2, config=CONFIG, dtype=torch.float16, seed=0):
    shape = data.Shape(batch, context, *heads, 64, 16, dtype)
    pool = torch.randn(2 * shape.cache_elements, device=DEVICE).to(dtype)
    return data.make_step(shape, config, pool, layers, seed)


# What is planted


@pytest.mark.parametrize("law", data.LAGS)
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_real_match_finds_what_was_planted(rate, law):
    step = make(batch=8, heads=(8, 2), layers=3)
    data.plant(step, rate, law, 6, seed=1)
    data.check_planting(step)
    done = data.realised(step)
    source = torch.stack([layer.source for layer in step.layers])
    # Four standard deviations, for 192 heads in 48 groups; the seed is fixed.
    assert done.heads_matched == pytest.approx(rate, abs=0.15)
    assert done.groups_hit == pytest.approx(rate**4, abs=0.15)
    if rate in (0, 1):
        assert done.heads_matched == done.groups_hit == rate
    if rate == 0:
        assert done.lag is None
        return
    assert done.lag == pytest.approx(6, rel=0.4)
    assert (source[source >= 0] >= int(step.first[0])).all()
    if rate == 1:
        assert done.group_lag == 6 if law == "constant" else done.group_lag > done.lag
    if (rate, law) != (1, "constant"):
        assert not torch.equal(source[0], source[1]), "each layer has a pattern of its own"


def test_planting_follows_its_seed():
    patterns = []
    for seed in (1, 1, 2):
        step = make()
        data.plant(step, 0.5, "geometric", 6, seed)
        patterns.append(step.layers[0].source)
    assert torch.equal(patterns[0], patterns[1]) and not torch.equal(patterns[0], patterns[2])


def test_a_planting_that_the_match_does_not_find_is_an_error():
    step = make()
    data.plant(step, 1.0, "geometric", 6, seed=1)
    layer = step.layers[1]
    layer.source[2, 3] -= 1
    with pytest.raises(BenchError, match="1 of 12 heads of layer 1 match another entry"):
        data.check_planting(step)


def test_lags_have_the_mean_asked_for():
    draw = torch.Generator().manual_seed(0)
    for law in data.LAGS:
        lags = data.draw_lags((20000,), law, 64, 511, draw).double()
        assert lags.min() >= 1 and lags.max() <= 511
        assert lags.mean() == pytest.approx(64, rel=0.02)  # the mean's standard deviation is at most 0.7 %
    assert data.draw_lags((9,), "geometric", 1, 5, draw).tolist() == [1] * 9
    with pytest.raises(BenchError, match="lags: 'normal'"):
        data.draw_lags((1,), "normal", 1, 1, draw)


FLOAT8 = {"ring_dtype": "float8_e4m3fn", "distance": "relative"}


@pytest.mark.parametrize("changes", [{}, {"sink": 5}, {"reuse": "chained"}, {"min_context": 4096}, FLOAT8])
def test_counters_and_bytes_are_those_of_the_method(changes):
    step = make(config=resolve(CONFIG.model_dump(include={"rule", "window", "band", "min_context"}) | changes, {}))
    data.plant(step, 0.6, "geometric", 6, seed=3)
    data.check_planting(step)
    layer = step.layers[0]
    position, shape = step.position.long(), step.shape
    with torch.device(DEVICE):
        pre = step.rotary.undo(layer.query, position)
        done = paged.decode(step.rows(), layer.query, pre, layer.kv, layer.store, step.config, step.scale)
    counts = dict(zip(Count, data.expected_counts(step, layer), strict=True))
    hit, miss, short, read, skipped = (
        counts.pop(x) for x in (Count.HIT, Count.MISS, Count.SHORT_CONTEXT, Count.READ, Count.SKIPPED)
    )
    assert hit == int(done.hit.sum()) * 2 and read == int(done.read.sum())
    assert hit + miss + short == shape.batch * shape.heads and not any(counts.values())
    assert read + skipped == shape.batch * shape.kv_heads * shape.context
    assert (short > 0) == ("min_context" in changes) and (hit > 0) != (short > 0)
    least = 2 * 64 * 2 * min(data.expected_counts(step, x)[Count.READ] for x in step.layers)
    assert least < data.realised(step).step_bytes < shape.exact_bytes() + 4 * shape.batch * shape.heads * 32 * 64 * 2


def test_float8_rings_save_a_byte_of_each_element_of_a_query():
    keys = CONFIG.model_dump(include={"rule", "window", "band", "min_context"})
    steps = [make(config=resolve(keys | changes, {})) for changes in ({}, FLOAT8)]
    for step in steps:
        data.plant(step, 1.0, "geometric", 6, seed=3)
    saved = data.realised(steps[0]).step_bytes - data.realised(steps[1]).step_bytes
    assert saved == 3 * 4 * 64 * (32 + 1 + 1)  # all entries are read to match, one to reuse it; one is written


def test_replays_find_what_the_first_step_found():
    """What a step records must not be matched when the same step runs again."""
    step = make()
    data.plant(step, 0.5, "geometric", 6, seed=1)
    layer, position = step.layers[0], step.position.long()
    with torch.device(DEVICE):
        for _ in range(2):
            pre = step.rotary.undo(layer.query, position)
            paged.decode(step.rows(), layer.query, pre, layer.kv, layer.store, step.config, step.scale)
    data.check_planting(step)


# What is checked


def test_the_oracles_agree_where_nothing_is_reused():
    step = make()
    data.plant(step, 0.0, "geometric", 6, seed=1)
    layer = step.layers[0]
    before = layer.store.query.clone()
    torch.testing.assert_close(data.reference(step, layer), data.exact_reference(step, layer), rtol=1e-4, atol=1e-5)
    assert torch.equal(before, layer.store.query)


@pytest.mark.parametrize("spoil", [lambda x: x * 1.01, lambda x: x.where(x != x[1, 2, 3], torch.nan)])
def test_a_wrong_output_is_an_error(spoil):
    step = make(batch=2)
    right = torch.randn(2, 4, 64)
    assert data.compare("it", step, right.to(torch.float16), right) < 1e-3
    with pytest.raises(BenchError, match="it is wrong: relative error .* No speed is reported"):
        data.compare("it", step, spoil(right).to(torch.float16), right)


def clocks():
    """Clocks that call what they should time once, and say 1, 2 and 3 ms."""

    def clock(calls):
        for call in calls if isinstance(calls, list) else [calls]:
            call()
        return [3.0, 1.0, 2.0]

    return kernel.Timers(clock, clock, clock)


def torch_exact(step, factor=1.0):
    """A baseline in PyTorch."""

    def call(layer):
        return lambda: layer.out.copy_(factor * data.exact_reference(step, layer))

    yield "slow", [call(layer) for layer in step.layers]


def absent(step):
    raise ImportError("no such engine")
    yield


def options(**changes):
    keys = dict(batches=(2,), contexts=(200,), heads=((4, 2),), hit_rates=(0.5, 1.0), config=CONFIG, head_size=64,
                dtype="float16", lags="geometric", mean_lag=6, layers=1, baselines=("EXACT", "ABSENT"))  # fmt: skip
    return kernel.KernelBench(**keys | changes)


@pytest.fixture
def baselines(monkeypatch):
    pytest.importorskip("triton", reason="Triton kernels")
    monkeypatch.setattr(kernel, "BASELINES", {"EXACT": torch_exact, "ABSENT": absent})
    return kernel.BASELINES


def test_kernel_rows(baselines):
    told, opts = [], options(contexts=(50, 200))
    rows = list(kernel.run(opts, told.append, DEVICE, clocks()))
    assert len(rows) == opts.measurements() == 7
    assert sum("MAC" in what for what in told) == 3
    exact, missing, short = rows[:3]
    assert exact["engine"] == "EXACT" and exact["relative_error"] < 1e-3 and exact["bytes"] > 2 * 50 * 2 * 128 * 2
    assert missing["error"] == "ImportError: no such engine"
    # Below min_context nothing is tried, whatever was asked for.
    assert (short["context"], short["hit_rate"], short["heads_matched"]) == (50, 0.0, 0.0)
    full, half = rows[5:]
    assert (full["hit_rate"], full["groups_hit"], half["hit_rate"]) == (1.0, 1.0, 0.5)
    assert 0 < half["heads_matched"] < 1 and half["bytes"] > full["bytes"]
    for row in (full, half):
        assert (row["p20"], row["p50"], row["p80"], row["begin_host_ms"]) == (1.0, 2.0, 3.0, 2.0)
        assert row["best_exact_ms"] == 2.0 and row["speedup"] == 1.0
        assert row["bound_ms"] == pytest.approx(2.0 + (1 - row["groups_hit"]) * 2.0)
        assert row["lags"] == "geometric, mean 6" and "window=32" in row["config"]


def test_reads_between_layers_are_taken_off(baselines):
    """Made up: a read takes 5 ms and anything else 2, apart from what differs between replays."""
    asked = []

    def clock(calls):
        calls = calls if isinstance(calls, list) else [calls]
        for call in calls:
            call()
        reads = sum(call.__qualname__.startswith("reader") for call in calls)
        asked.append((reads, len(calls)))
        return [(5 * reads + 2 * (len(calls) - reads)) / len(calls) + noise for noise in (-0.5, 0.0, 0.5)]

    timers = kernel.Timers(clock, lambda call: [0.0], lambda call: [0.0])
    rows = list(kernel.run(options(baselines=("EXACT",), layers=3, between=1), lambda _: None, DEVICE, timers))
    assert asked == [(3, 6), (3, 3), (3, 6), (3, 6)], "each layer after a read; so many reads alone only once"
    for row in rows:
        assert (row["p20"], row["p50"], row["p80"]) == pytest.approx((1.0, 2.0, 3.0)) and row["between_mib"] == 1
    shown = io.StringIO()
    row_tables.show([row | environment.environment(["x"]) for row in rows], Console(file=shown, width=200))
    assert "1 MiB read between layers" in shown.getvalue()


@pytest.mark.parametrize("audit, audited", [(0.0, None), (0.5, False), (1.0, True)])
def test_audits_are_timed_where_every_step_is_one(baselines, monkeypatch, audit, audited):
    counted, decode = [], kernel._decode

    def watched(step, decoder, layer):
        decode(step, decoder, layer)
        counted.append(None if layer.audited is None else bool(layer.audited.any()))

    monkeypatch.setattr(kernel, "_decode", watched)
    config = CONFIG.model_copy(update={"audit": audit})
    [row] = kernel.run(options(baselines=(), hit_rates=(1.0,), config=config), lambda _: None, DEVICE, clocks())
    assert row["hit_rate"] == 1.0 and f"audit={audit}" in row["config"] and set(counted) == {audited}


def test_no_speed_of_a_wrong_baseline(baselines):
    baselines["EXACT"] = lambda step: torch_exact(step, 1.01)
    baselines["EXACT"].__name__ = "EXACT"
    rows = kernel.run(options(), lambda _: None, DEVICE, clocks())
    with pytest.raises(BenchError, match="EXACT .* is wrong"):
        list(rows)


@pytest.mark.parametrize(
    "spoil, said", [("out", "MAC is wrong"), ("hits", "counters of layer 0"), ("nan", "unwritten")]
)
def test_no_speed_of_a_wrong_decode(baselines, monkeypatch, spoil, said):
    right = kernel._decode

    def wrong(step, decoder, layer):
        if spoil == "hits":
            layer.store.query.normal_(5.0)
        right(step, decoder, layer)
        if spoil != "hits":
            layer.out[1, 1] = torch.nan if spoil == "nan" else layer.out[1, 1] * 1.02

    monkeypatch.setattr(kernel, "_decode", wrong)
    got = []
    with pytest.raises(BenchError, match=said):
        got.extend(kernel.run(options(baselines=(), hit_rates=(1.0,)), lambda _: None, DEVICE, clocks()))
    assert not got


# Decoding by the index of keys

INDEX = resolve({"band": 64, "sink": 16, "min_context": 128}, {})


def make_indexed(batch=3, context=300, heads=(6, 2), layers=2, caches=2, seed=0):
    pytest.importorskip("triton", reason="Triton kernels")
    shape = data.Shape(batch, context, *heads, 64, 16, torch.float16, directions=48)
    pool = torch.full((caches * shape.cache_elements,), math.nan, dtype=torch.float16, device=DEVICE)
    return synthetic_index.make_index_step(shape, INDEX, pool, layers, seed)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_about_as_many_tokens_weigh_enough_as_was_asked_for(group):
    count, draw, found = 30000, torch.Generator().manual_seed(0), []
    for _ in range(20):
        weight = (torch.randn(group, count, generator=draw) * synthetic_index.sharpness(group, count)).exp()
        enough = synthetic_index.WEIGHTY * weight[:, :: lookup.SAMPLE].mean(1, keepdim=True)
        found.append((weight >= enough).any(0).float().mean())
    assert 0.5 < torch.stack(found).mean() / synthetic_index.CHOSEN < 1


def test_keys_and_queries_have_the_logits_asked_for():
    step = make_indexed(batch=4, context=400, heads=(12, 2), caches=1)
    wanted, shape = synthetic_index.sharpness(6, 400) ** 2, step.shape
    found = []
    for layer in step.layers:
        for row, blocks in enumerate(step.block_table.long()):
            key, _ = paged.gather(layer.kv, blocks, torch.arange(shape.context, device=DEVICE))
            logits = layer.query[row].float().view(2, 6, 64) @ key.transpose(1, 2) * step.scale
            found.append(logits.var(-1).flatten())
    # Four deviations of the variance of 400 normal numbers, as if all heads shared them.
    assert torch.cat(found).mean() == pytest.approx(wanted, rel=4 * math.sqrt(2 / 400))


@pytest.mark.parametrize("caches", [1, 2])
def test_pages_are_indexed_by_the_maps_of_their_cache(caches):
    step = make_indexed(caches=caches)
    for layer in step.layers:
        codes, means = step.shape.page_layout.views(layer.kv)
        page = int(step.block_table[1, 3])
        code, mean = key_index.encode(*layer.kv[page].chunk(2, -1), layer.maps)
        differ = sum((part(codes[page]) != part(code)).sum().item() for part in (lambda x: x & 15, lambda x: x >> 4))
        assert differ <= 0.01 * 2 * code.numel()  # codes of what lies between two, by the order of additions
        torch.testing.assert_close(means[page].float(), mean, rtol=2**-10, atol=1e-6)
    first, second = step.layers
    assert torch.equal(first.kv, second.kv) == (caches == 1) == (first.maps is second.maps)
    assert not torch.equal(first.query, second.query)


def test_stages_are_launched_one_by_one():
    step = make_indexed(layers=1)
    [layer] = step.layers
    for stages in range(3):
        step.decode(layer, stages)
        assert layer.out.isnan().all() and not layer.counts.any()
    step.decode(layer)
    assert not layer.out.isnan().any() and layer.counts[Count.HIT] == 3 * 6
    assert synthetic_index.check(step) < 2e-3


@pytest.fixture
def launched(monkeypatch):
    """How many stages each timed call launches; with it, clocks by which `n` stages take `4^n` ms."""
    asked, decode = [], synthetic_index.IndexStep.decode

    def watched(step, layer, stages=3):
        asked.append(stages)
        decode(step, layer, stages)

    def clock(calls):
        for call in calls:
            call()
        return [4.0 ** asked[-1]]

    monkeypatch.setattr(synthetic_index.IndexStep, "decode", watched)
    return kernel.Timers(clock, clock, clock)


def indexed_options(**changes):
    return options(**dict(heads=((6, 2),), contexts=(300,), config=INDEX, baselines=()) | changes)


def test_index_rows(baselines, launched):
    told, opts = [], indexed_options(contexts=(100, 300), baselines=("ABSENT",))
    rows = list(kernel.run(opts, told.append, DEVICE, launched))
    assert len(rows) == opts.measurements() == 5 and all(row["rule"] == "index" for row in rows)
    short, looked_up, whole = rows[1], *rows[3:]
    assert [row["note"] for row in (short, looked_up, whole)] == ["read whole", "looked up", "read whole"]
    assert short["context"] == 100 and short["read_share"] == whole["read_share"] == 1
    shape = opts.shapes()[1]
    assert whole["bytes"] == shape.exact_bytes() and looked_up["directions"] == shape.directions == 48
    # What is read at least: the near tokens, and the index of the others.
    near = 64 + 300 - (300 - 64) // 64 * 64
    layout = shape.page_layout
    index = (300 - near) * layout.index_bytes // layout.kv_bytes
    assert near + index < looked_up["read_share"] * 300 < 299
    kv = looked_up["read_share"] * 2 * 2 * 300 * 2 * 64 * 2
    assert looked_up["bytes"] == pytest.approx(kv + 2 * 2 * 6 * 64 * 2)
    for row in (short, looked_up, whole):
        assert (row["weigh_ms"], row["look_ms"], row["merge_ms"]) == (4, 12, 48)
        assert row["p50"] == 64 and row["relative_error"] < 2e-3 and "rule=index" in row["config"]


def test_index_rows_beside_the_best_exact_one(baselines):
    looked_up = list(kernel.run(indexed_options(baselines=("EXACT",)), lambda _: None, DEVICE, clocks()))[1]
    assert looked_up["best_exact_ms"] == 2.0 and looked_up["speedup"] == 1.0


@pytest.mark.parametrize(
    "spoil, said",
    [("out", "MAC is wrong"), ("maps", "counters of layer 0"), ("nan", "unwritten"), ("late", "reads other")],
)
def test_no_speed_of_a_wrong_lookup(baselines, monkeypatch, spoil, said):
    right, calls = synthetic_index.IndexStep.decode, []

    def wrong(step, layer, stages=3):
        calls.append(stages)
        layer.maps.ready.fill_(spoil != "maps")
        if spoil == "late" and calls.count(3) > 3:
            layer.query.zero_()
        right(step, layer, stages)
        if spoil in ("out", "nan"):
            layer.out[1, 1] = torch.nan if spoil == "nan" else layer.out[1, 1] * 1.02

    monkeypatch.setattr(synthetic_index.IndexStep, "decode", wrong)
    with pytest.raises(BenchError, match=said):
        list(kernel.run(indexed_options(), lambda _: None, DEVICE, clocks()))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"page": 48}, "page: 48, choose 16, 32 or 64"),
        (
            {"config": INDEX.model_copy(update={"index_size": 80})},
            "index_size: received 80, more than the head size 64",
        ),
    ],
)
def test_what_has_no_index(changes, said):
    with pytest.raises(BenchError, match=said):
        list(kernel.run(indexed_options(**changes), lambda _: None, DEVICE, clocks()))
