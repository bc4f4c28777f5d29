"""Audits: histograms and quantiles, the schedule, the budget, and errors counted by whole engines."""

import logging
import math
from bisect import bisect_left
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import engine as harness
from support import shadow
from support.audited import Stepper, close, histogram
from support.devices import DEVICE
from support.engine import Add, Call
from support.hit_batches import Case, unrotate
from support.scenarios import SCENARIOS
from vllm_mac import audit, metrics, reference
from vllm_mac.audit import BUCKETS, COUNT_EDGES, ERROR_EDGES, Audit, Budget, Schedule, quantile
from vllm_mac.counters import Count
from vllm_mac.kernels import audit as kernels
from vllm_mac.layers import mac_layers
from vllm_mac.state import LayerState, RingStore, Rows

# Histograms


def test_edges_grow_and_float32_has_them_in_order():
    for edges in audit.edges("cpu"):
        assert len(edges) == BUCKETS - 1 and (edges[1:] > edges[:-1]).all()
    assert COUNT_EDGES[:8] == (1, 2, 3, 4, 6, 8, 12, 16) and COUNT_EDGES[-1] == 65536
    assert ERROR_EDGES[0] < 1e-4 and ERROR_EDGES[-1] == 4 and 0.125 in ERROR_EDGES
    assert all(a / b == pytest.approx(math.sqrt(2), rel=0.01) for a, b in zip(ERROR_EDGES[1:], ERROR_EDGES))


@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("size", [1, 2, 37, 5000])
def test_quantile_is_within_the_bucket_of_numpy_s(size, spread):
    values = np.random.default_rng(size).lognormal(-3, spread, size)
    counts = histogram(ERROR_EDGES, values)
    for q in (0, 0.01, 0.5, 0.95, 0.99, 1):
        wanted = np.quantile(values, q, method="inverted_cdf")
        i, got = bisect_left(ERROR_EDGES, wanted), quantile(ERROR_EDGES, counts, q)
        if i == 0:
            assert got == ERROR_EDGES[0]
        elif i == len(ERROR_EDGES):
            assert got == math.inf
        else:
            assert ERROR_EDGES[i - 1] * (1 - 1e-12) <= got <= ERROR_EDGES[i] * (1 + 1e-12)


def test_quantile_interpolates_in_the_logarithm():
    assert quantile((1.0, 4.0), [0, 10, 0], 0.5) == pytest.approx(2.0)
    assert quantile((1.0, 4.0), [10, 10, 0], 0.75) == pytest.approx(2.0)
    assert quantile((1.0, 4.0), [0, 0, 0], 0.5) is None
    assert quantile((1.0, 4.0), [3, 0, 1], 0.5) == 1.0
    assert quantile((1.0, 4.0), [3, 0, 1], 0.95) == math.inf


def made_up(group=3, kv_heads=2, d=48, dtype=torch.float32, rows=7, window=16, seed=0):
    """Arguments of `tally`, and what they hold, of a step of `rows` rows: hits, misses, padding."""
    g = torch.Generator().manual_seed(seed)
    heads, ints = group * kv_heads, lambda *size: torch.randint(0, 1 << 20, size, generator=g).int()
    exact = torch.randn(rows, heads, d, generator=g)
    off = 10 ** (-5 * torch.rand(rows, heads, 1, generator=g) + 1) * torch.randn(rows, heads, d, generator=g)
    out = (exact + off).to(dtype)
    exact[1, 0] = out[1, 0] = 0  # exact to the bit, of no length
    exact[1, 1] = 0  # infinitely wrong
    out[1, 2, 3] = torch.nan
    position = 200 + ints(rows) % 100
    position[2] = -1
    hit = ints(rows, kv_heads) % 2
    hit[1], hit[3] = 1, 0
    source = position[:, None] - 1 - ints(rows, heads) % window
    ring = torch.randperm(rows + 2, generator=g)[:rows].int()
    chain = ints(rows + 2, heads, window) % 900
    found = [x.to(DEVICE) for x in (position, ring, hit, source, chain, out, exact, audit.edges("cpu"))]
    return arguments(heads, *found), found


def arguments(heads, position, ring, hit, source, chain, out, exact, edges):
    store = RingStore(chain, None, None, chain)  # of which only chain, and the shape of query, are read
    layer = LayerState(store, None, None, None, audited=audit.histograms(heads, DEVICE))
    step = SimpleNamespace(hit=hit, source=source, pdl=False)
    return layer, Rows(position, ring, None, None, None), step, out, exact, edges


@pytest.mark.parametrize("tally", [audit.tally, kernels.tally])
@pytest.mark.parametrize(
    "group, kv_heads, d, dtype",
    [(1, 1, 32, torch.float32), (3, 2, 48, torch.float32), (4, 2, 64, torch.bfloat16), (7, 1, 128, torch.float16), (16, 1, 96, torch.float32)],
)  # fmt: skip
def test_tally_counts_what_the_definition_says(tally, group, kv_heads, d, dtype):
    given, found = made_up(max(group, 3) if kv_heads == 1 else group, kv_heads, d, dtype)
    position, ring, hit, source, chain, out, exact, _ = [x.cpu() for x in found]
    heads, window = source.shape[1], chain.shape[2]
    errors, lags, chains = [[] for _ in range(heads)], [], []
    for b, m in enumerate(position.tolist()):
        for h in range(heads):
            if m < 0 or not hit[b, h // (heads // kv_heads)]:
                continue
            true = exact[b, h].double()
            distance = float((out[b, h].double() - true).norm())
            errors[h].append(0.0 if distance == 0 else distance / max(float(true.norm()), 1e-300))
            lags.append(m - int(source[b, h]))
            chains.append(int(chain[ring[b], h, m % window]))
    for times in (1, 2):
        tally(*given)
        got = given[0].audited.cpu()
        # No error lies so near an edge that float32 would put it on the other side.
        assert got[:-2].tolist() == [[times * n for n in histogram(ERROR_EDGES, one)] for one in errors]
        assert got[-2].tolist() == [times * n for n in histogram(COUNT_EDGES, lags)]
        assert got[-1].tolist() == [times * n for n in histogram(COUNT_EDGES, chains)]
    # The exact one, the infinitely wrong one and NaN of row 1.
    assert got[0, 0] >= 2 and got[1, -1] >= 2 and got[2, -1] >= 2


def test_tally_of_nothing_counts_nothing():
    for tally in (audit.tally, kernels.tally):
        _, (position, ring, hit, *rest) = made_up()
        for given in (
            arguments(6, torch.full_like(position, -1), ring, hit, *rest),
            arguments(6, position, ring, torch.zeros_like(hit), *rest),
        ):
            tally(*given)
            assert not given[0].audited.any()


# Schedule


@pytest.mark.parametrize("share, stretch", [(0.25, 4), (0.1, 10), (0.01, 100), (1.0, 1)])
def test_one_step_of_each_stretch_is_audited(share, stretch):
    schedule = Schedule(share)
    audited = [schedule.take() for _ in range(200 * stretch)]
    places = [audited[i : i + stretch] for i in range(0, len(audited), stretch)]
    assert all(sum(place) == 1 for place in places)
    # Text with a period does not hide: every place of a stretch has its turn.
    assert len({place.index(True) for place in places}) > 0.8 * stretch
    again = Schedule(share)
    assert [again.take() for _ in audited] == audited


@pytest.mark.parametrize("share", [0.3, 0.75, 0.9, 2 / 3, 1e-9])
def test_any_share_is_kept(share):
    schedule = Schedule(share)
    audited = sum(schedule.take() for _ in range(3000))
    assert abs(audited - 3000 * share) <= 1


# Budget


def errors_of(value: float, heads: int) -> np.ndarray:
    return heads * np.array(histogram(ERROR_EDGES, [value]))


def judged(budget: Budget, step: int, counts: np.ndarray) -> str:
    changed = budget.judge(step, counts.tolist())
    return ("exact" if budget.exact else "again") if changed else "-"


def test_a_layer_that_stays_above_its_budget_goes_exact_and_is_tried_again():
    budget, counts, said = Budget(0.1), errors_of(0.01, 0), []
    at = lambda step, value, heads=audit.LEAST: said.append(judged(budget, step, counts_plus(value, heads)))

    def counts_plus(value, heads):
        nonlocal counts
        counts = counts + errors_of(value, heads)
        return counts

    at(1, 0.3)  # once above is not yet "stays above"
    at(2, 0.05)
    at(3, 0.3)
    at(4, 0.3)
    assert said == ["-", "-", "-", "exact"] and budget.until == 4 + audit.RETRY and 0.25 < budget.p95 < 0.36
    at(5, 0.3, 0)
    at(3 + audit.RETRY, 0.3, 0)
    at(4 + audit.RETRY, 0.3, 7)  # the last of the steps under way when it went exact: not held against it
    assert said[4:] == ["-", "-", "again"]
    at(2000, 0.3, audit.LEAST - 1)  # too few
    at(2001, 0.3, 1)  # tried again and no better: at once, for twice as long
    assert said[7:] == ["-", "exact"] and budget.until == 2001 + 2 * audit.RETRY
    at(budget.until, 0.3, 0)
    at(5000, 0.01)  # within it: halves the next pause, and forgives
    at(5001, 0.3)
    at(5002, 0.3)
    assert said[9:] == ["again", "-", "-", "exact"] and budget.until == 5002 + 2 * audit.RETRY


def test_a_budget_looks_at_the_p95_and_at_what_is_new():
    budget = Budget(0.1)
    few = errors_of(0.01, 96 * audit.LEAST) + errors_of(2.0, 4 * audit.LEAST)  # 4 % are bad
    assert [judged(budget, i, i * few) for i in range(1, 9)] == ["-"] * 8 and budget.p95 < 0.1
    # All that came since is bad, though of all there ever was it is 5 % at most.
    more = [8 * few + errors_of(2.0, i * audit.LEAST) for i in range(1, 3)]
    assert [judged(budget, 9 + i, counts) for i, counts in enumerate(more)] == ["-", "exact"]


@pytest.fixture
def said(monkeypatch):
    """What audits log. Not as `vllm.mac`: a process's first engine sets up vLLM's loggers anew."""
    lines, logger, handler = [], logging.Logger("said", logging.INFO), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    monkeypatch.setattr(audit, "logger", logger)
    return lines


def audited(share, budget):
    """The state of a layer of which a share of steps is audited."""
    paused = None if budget is None else torch.zeros(1, dtype=torch.int32, device=DEVICE)
    settings = SimpleNamespace(audit=share, error_budget=budget)
    return LayerState(None, settings, None, None, audited=audit.histograms(4, DEVICE), paused=paused)


def test_each_layer_has_its_own_budget_and_says_so_once(said):
    layers = {name: audited(0.5, 0.1) for name in ("bad", "good")}
    watch, paused = Audit(layers), []
    count, bucket = 0, {name: bisect_left(ERROR_EDGES, e) for name, e in zip(layers, (0.3, 0.05))}
    for _ in range(2 * audit.EVERY + audit.RETRY + 3 * audit.EVERY):
        chosen = watch.begin_step()
        count += chosen
        paused.append([int(x.paused) for x in layers.values()])
        for name, x in layers.items():
            x.audited[:-2, bucket[name]] += int(chosen and not x.paused)
    steps = len(paused)
    assert count == steps / 2
    assert not any(good for _, good in paused)
    bad = [i for i in range(1, steps) if paused[i][0] != paused[i - 1][0]]
    assert len(bad) == 3
    # Judged when the copy has arrived, which is a step after it was asked for, or a few.
    assert 2 * audit.EVERY < bad[0] <= 2 * audit.EVERY + 9
    assert audit.RETRY <= bad[1] - bad[0] <= audit.RETRY + audit.EVERY + 9
    assert len(said) == 3 and all("bad" in line and "good" not in line for line in said)
    assert f"leaves bad exact for {audit.RETRY} decode steps" in said[0] and "error_budget 0.1" in said[0]
    assert "serves bad again" in said[1]
    assert f"exact for {2 * audit.RETRY} decode steps" in said[2]


def test_no_budget_no_verdict(said):
    layer = audited(1.0, None)
    watch = Audit({"any": layer})
    layer.audited[:, -1] = 10**6
    assert all(watch.begin_step() for _ in range(3 * audit.EVERY)) and not said


# Both sides evaluate attention in float32, over a few hundred keys.
ROUNDING = 1e-5


@pytest.mark.parametrize("pattern, sink", [("all", 5), ("mixed", 0)])
def test_the_decoder_counts_the_errors_of_its_hits(pattern, sink):
    case = Case(lengths=(200, 0, 131, 30, 170), pattern=pattern, ringless=(4,))
    Stepper(case, ROUNDING, sink=sink).check()


def test_rows_that_asked_are_audited_in_steps_that_are_not():
    """Rows 1 and 3 of five, of which 3 is padding. A step whose rows are all audited counts theirs once, too."""
    stepper = Stepper(Case(lengths=(100, 90, 131, 0, 85), pattern="all"), ROUNDING)
    counts = {}
    for asked in ((), (1, 3), (0, 1, 2, 3, 4)):
        stepper.decoder.spared.fill_(-1)
        stepper.decoder.spared[list(asked)] = 0
        plain, counts[asked] = stepper.step(False)
        out, everything = stepper.step(True)
        torch.testing.assert_close(out, plain, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(everything, stepper.step(True)[1])
    errors, lags, chains = stepper.expected(out)
    assert not counts[()].any() and torch.equal(counts[0, 1, 2, 3, 4], everything)
    mine = slice(8, 16)  # eight heads of each row hit
    assert counts[1, 3][-2].tolist() == histogram(COUNT_EDGES, lags[mine])
    assert counts[1, 3][-1].tolist() == histogram(COUNT_EDGES, chains[mine])
    for got, one in zip(counts[1, 3][:-2].tolist(), errors, strict=True):
        close(ERROR_EDGES, got, one[1:2], ROUNDING)


def test_the_entry_that_leaves_the_window_has_its_chain_counted():
    """Its slot is the one that the step writes to."""
    stepper = Stepper(Case(lengths=(200,), pattern="none"), ROUNDING)
    batch, kv_heads = stepper.batch, stepper.batch.case.kv_heads
    pre = unrotate(batch.query.double().cpu(), batch.cos_sin.cpu(), batch.position.cpu().long(), True)[0]
    batch.store.query[int(batch.ring[0]), :, (199 - 32) % 32] = pre.to(batch.store.query)
    stepper.before = [getattr(batch.store, name).clone() for name in stepper.names]
    stepper.check()
    assert stepper.expected(batch.out.cpu())[1] == [32] * (4 * kv_heads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group, kv_heads, d", [(4, 8, 128), (8, 4, 64), (7, 2, 128)])
def test_one_graph_serves_audited_steps_and_others(group, kv_heads, d, dtype):
    lengths = (1, 2500, 0, 3011, 2100, 4097, 300, 2048)
    case = Case(lengths, "all", group, kv_heads, d, 16, dtype, ringless=(5,))
    # Weights and output are rounded to the dtype.
    stepper = Stepper(case, 2 * torch.finfo(dtype).eps, window=512, band=256, min_context=1024)
    stepper.check()
    graph = torch.cuda.CUDAGraph()
    stepper.step(False)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        stepper.decode()
    stepper.check(graph.replay)


# Whole engines on CPUs

SMALL = dict(window=32, band=16, min_context=64, threshold=0.45)
TESTBED = Path(__file__).resolve().parent.parent / "examples" / "testbed"
LINES = "\n".join(f"line {i}: the value of key {7 * i % 13} is {i * i}." for i in range(12))
NEW = 40


@pytest.fixture
def decoded(monkeypatch):
    """Of every layer and step of an engine: its name, whether the step is audited, its output."""
    from vllm_mac import cpu, cpu_decoder

    seen, name = [], []
    decode, forward = cpu_decoder.decode, cpu.MacCPUImpl.forward

    def watched(layer, rows, audited, query, kv, scale):
        out = decode(layer, rows, audited, query, kv, scale)
        assert audited.all() or not audited.any()  # no request asked for audits of its own
        seen.append((name[0], bool(audited[0]), out.clone()))
        return out

    def named(impl, *rest, **more):
        name[:] = [impl.mac.name]
        return forward(impl, *rest, **more)

    monkeypatch.setattr(cpu_decoder, "decode", watched)
    monkeypatch.setattr(cpu.MacCPUImpl, "forward", named)
    return seen


@pytest.fixture
def beside(monkeypatch):
    """Of every layer, `(error, lag, chain length)` of the heads that hit in the reference of `shadow`."""
    found, layer, plain, row = {}, [], reference.decode, shadow._decode

    def named(watch, impl, *rest):
        layer[:] = [impl.mac.name]
        return row(watch, impl, *rest)

    def decode(m, query, pre_query, key, value, rings, config, scale):
        step = plain(m, query, pre_query, key, value, rings, config, scale)
        for g in range(len(query) if step.hit else 0):
            true = reference.attend(query[g], key, value, 0, m + 1, scale).out
            error = float((step.out[g] - true).norm() / true.norm())
            found.setdefault(layer[0], []).append((error, m - step.source[g], rings[g][m].chain))
        return step

    monkeypatch.setattr(shadow, "_decode", named)
    monkeypatch.setattr(reference, "decode", decode)
    return found


def run(model, config, runner="v1", name="chunked33", watched=False):
    """Tokens, samples and the shadow's findings of one scenario."""
    scenario, watch = SCENARIOS[name], None
    with harness.engine(model, runner=runner, backend="MAC", additional_config={"mac": SMALL | config}) as llm:
        if watched:
            with shadow.shadow(llm) as watch:
                done = harness.run_schedule(llm, scenario.events, scenario.limits)
        else:
            done = harness.run_schedule(llm, scenario.events, scenario.limits)
        [samples] = llm.collective_rpc(metrics.counters)
        [heads] = llm.collective_rpc(metrics.head_errors)
    return done, samples, heads, watch


@pytest.mark.cpu
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_an_engine_counts_the_errors_of_the_reference_beside_it(model, beside, runner):
    changes = {} if runner == "v1" else {"reuse": "chained", "sink": 4}
    _, samples, heads, watch = run(model, {"audit": 1.0} | changes, runner, watched=True)
    assert watch.worst < 1e-4 and watch.hits > 100
    error, lag, chain = (metrics.histograms(samples, name) for name in (metrics.ERROR, metrics.LAG, metrics.CHAIN))
    assert error.keys() == lag.keys() == chain.keys() == heads.keys() == beside.keys() and len(beside) == 2
    value = {(s.name, *s.labels.values()): s.value for s in samples}
    for layer, hits in beside.items():
        errors, lags, chains = zip(*hits)
        # The outputs differ by at most 1e-4 of their largest element, so of their length.
        close(ERROR_EDGES, error[layer].counts, errors, 1e-4)
        assert tuple(error[layer].edges) == ERROR_EDGES
        assert lag[layer].counts == histogram(COUNT_EDGES, lags)
        assert chain[layer].counts == histogram(COUNT_EDGES, chains)
        assert np.sum(heads[layer], 0).tolist() == error[layer].counts and len(heads[layer]) == 8
        assert value["vllm_mac_error_count", layer] == len(hits) == value[metrics.HEADS, layer, "hit"]
        wanted = np.quantile(errors, 0.95, method="inverted_cdf")
        assert error[layer].quantile(0.95) == pytest.approx(wanted, rel=math.sqrt(2) - 1)


@pytest.mark.cpu
def test_audits_change_nothing_and_take_their_share(model, decoded):
    plain, samples, heads, _ = run(model, {})
    assert not heads and not any(s.name.startswith((metrics.ERROR, metrics.LAG, metrics.CHAIN)) for s in samples)
    before = decoded[:]
    decoded.clear()
    audited, samples, _, _ = run(model, {"audit": 0.25})
    assert audited.tokens == plain.tokens
    assert [s.value for s in samples if s.labels == {"reason": "error_budget"}] == [0]
    assert len(before) == len(decoded) and not any(flag for _, flag, _ in before)
    for (name, _, out), (same, _, got) in zip(before, decoded, strict=True):
        assert name == same and torch.equal(out, got)
    for layer, found in metrics.histograms(samples, metrics.ERROR).items():
        flags = [flag for name, flag, _ in decoded if name == layer]
        assert abs(sum(flags) - len(flags) / 4) <= 1 and sum(flags) > 5
        hits = next(s.value for s in samples if s.labels == {"layer": layer, "outcome": "hit"})
        assert 0.1 * hits < sum(found.counts) < 0.5 * hits


@pytest.mark.cpu
def test_a_tiny_budget_makes_every_layer_exact_and_each_is_tried_again(model, monkeypatch, decoded, said):
    for name, value in {"EVERY": 4, "LEAST": 8, "RETRY": 8}.items():
        monkeypatch.setattr(audit, name, value)
    _, samples, _, _ = run(model, {"audit": 1.0, "error_budget": 1e-4}, name="mixed8")
    value = {(s.name, *s.labels.values()): s.value for s in samples}
    layers = list(metrics.histograms(samples, metrics.ERROR))
    assert len(layers) == 2 and value[metrics.EXACT, "error_budget"] > 1000
    for layer in layers:
        mine = [line for line in said if layer in line]
        assert len(mine) >= 3 and all("again" in line for line in mine[1::2])
        assert all("exact for" in line for line in mine[::2])
        assert value[metrics.HEADS, layer, "hit"] > 0 and value[metrics.HEADS, layer, "exact"] > 500
        rows = sum(len(out) for name, _, out in decoded if name == layer)
        assert sum(value[metrics.HEADS, layer, outcome] for outcome in ("hit", "miss", "exact")) == 8 * rows


@pytest.mark.cpu
def test_a_layer_whose_ring_is_wrong_goes_exact(monkeypatch, said):
    """In a trained model, whose errors are small. After the prefill the outputs in the first layer's rings are negated."""
    for name, value in {"EVERY": 4, "LEAST": 8}.items():
        monkeypatch.setattr(audit, name, value)
    config = {"window": 64, "band": 32, "min_context": 64, "threshold": 0.85, "audit": 1.0, "error_budget": 0.9}
    layers = lambda llm: mac_layers(harness.worker(llm).vllm_config)
    negate = Call(1, lambda llm: layers(llm)[0].state.store.out.neg_())
    errors, over, hits = [], [], []
    for events in ([], [negate]):
        assert not said
        with harness.engine(TESTBED, backend="MAC", additional_config={"mac": config}) as llm:
            harness.run_schedule(llm, [Add(0, "a", list(LINES.encode()), NEW), *events])
            first = layers(llm)[0]
            errors.append(first.state.audited[:-2].sum(0).tolist())
            hits.append(int(first.counts[Count.HIT]))
            over.append([int(layer.counts[Count.OVER_BUDGET]) for layer in layers(llm)])
    assert sum(errors[0]) == hits[0] > 200 and sum(errors[1]) == hits[1] > 20
    assert quantile(ERROR_EDGES, errors[0], 0.95) < 0.05 and quantile(ERROR_EDGES, errors[1], 0.5) > 0.9
    # It is judged after 4 and 8 steps, each time a step later, and then exact to the end.
    assert over == [[0] * 6, [8 * (NEW - 1 - 9), *[0] * 5]]
    assert len(said) == 1 and f"leaves {first.name} exact" in said[0]


def test_histograms_of_workers_add_up():
    bucket = lambda layer, *values: [
        metrics.Sample("vllm_mac_lag_bucket", {"layer": layer, "le": le}, v)
        for le, v in zip(("1", "2.5", "+Inf"), values)
    ]
    samples = [*bucket("a", 1, 3, 3), *bucket("b", 0, 0, 5), *bucket("a", 0, 1, 2)]
    found = metrics.histograms(samples, metrics.LAG)
    assert found == {"a": ([1.0, 2.5], [1, 3, 1]), "b": ([1.0, 2.5], [0, 0, 5])}
    assert found["b"].quantile(0.5) == math.inf and metrics.histograms(samples, metrics.ERROR) == {}
