"""`vllm-mac bench kernel`: the data it plants, what it checks, and its rows.

Speed itself needs a GPU. Here the kernels run under Triton's interpreter with clocks that return made-up times.
"""

import io

import pytest
import torch
from rich.console import Console

from support.devices import DEVICE
from vllm_mac import paged
from vllm_mac.config import resolve
from vllm_mac.tools import environment
from vllm_mac.tools.bench import BenchError, kernel, row_tables
from vllm_mac.tools.bench import synthetic_step as data

CONFIG = resolve({"window": 32, "band": 24, "min_context": 64, "miss_engine": "triton"}, {})


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
    step = make(config=resolve(CONFIG.model_dump(include={"window", "band", "min_context"}) | changes, {}))
    data.plant(step, 0.6, "geometric", 6, seed=3)
    data.check_planting(step)
    layer = step.layers[0]
    position, shape = step.position.long(), step.shape
    with torch.device(DEVICE):
        pre = step.rotary.undo(layer.query, position)
        done = paged.decode(step.rows(), layer.query, pre, layer.kv, layer.store, step.config, step.scale)
    hit, miss, short, no_ring, over, request, read, skipped = data.expected_counts(step, layer)
    assert hit == int(done.hit.sum()) * 2 and read == int(done.read.sum())
    assert hit + miss + short == shape.batch * shape.heads and no_ring == over == request == 0
    assert read + skipped == shape.batch * shape.kv_heads * shape.context
    assert (short > 0) == ("min_context" in changes) and (hit > 0) != (short > 0)
    least = 2 * 64 * 2 * min(sum(data.expected_counts(step, x)[-2:-1]) for x in step.layers)
    assert least < data.realised(step).step_bytes < shape.exact_bytes() + 4 * shape.batch * shape.heads * 32 * 64 * 2


def test_float8_rings_save_a_byte_of_each_element_of_a_query():
    keys = CONFIG.model_dump(include={"window", "band", "min_context"})
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
