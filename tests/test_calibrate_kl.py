"""`vllm-mac calibrate --metric kl`: the choice by sums, and whole runs on tiny models."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.calibrate_runs import invoke, said
from vllm_mac.config import resolve
from vllm_mac.tools import terminal
from vllm_mac.tools.calibrate import CalibrateError, by_kl, knapsack
from vllm_mac.tools.calibrate.journal import Journal
from vllm_mac.tools.calibrate.kl_engine import Run, _calibrate
from vllm_mac.tools.calibrate.knapsack import Option

EXACT = Option(None, 1.0, 0.0)
share = lambda low, high: st.integers(low, high).map(lambda i: i / 128)  # sums are exact
option = st.builds(Option, share(0, 128), share(1, 127), share(1, 128))
layers = st.lists(st.lists(option, max_size=5).map(lambda some: [EXACT, *some]), min_size=1, max_size=4)


@given(layers)
def test_a_path_is_the_best_for_its_cost(given_layers):
    """No other choice costs less and reads less than one on the path, and all of it is in order."""
    path = knapsack.path(given_layers)
    cost = lambda choice: sum(o.cost for o in choice)
    reads = lambda choice: sum(o.read for o in choice)
    assert path[0] == tuple(min(some, key=lambda o: (o.cost, o.read)) for some in given_layers)
    for a, b in itertools.pairwise(path):
        assert cost(a) <= cost(b) and reads(b) < reads(a)
    assert reads(path[-1]) == sum(min(o.read for o in some) for some in given_layers)
    for choice in path:
        for other in itertools.product(*given_layers):
            assert cost(other) >= cost(choice) or reads(other) >= reads(choice), (choice, other)


def test_budgets_and_savings_stop_where_they_should():
    cheap = [EXACT, Option(0.9, 0.5, 0.001), Option(0.1, 0.1, 0.002)]
    dear = [EXACT, Option(0.9, 0.9, 0.1), Option(0.1, 0.2, 1.0)]
    path = knapsack.path([cheap, dear])
    told = lambda i: tuple(o.threshold for o in path[i])
    assert told(knapsack.within(path, 0.0005)) == (None, None)
    assert told(knapsack.within(path, 0.01)) == (0.1, None)
    assert told(knapsack.within(path, 2.0)) == (0.1, 0.1)
    assert told(knapsack.saving(path, 0.4)) == (0.1, None)
    assert told(knapsack.saving(path, 0.6)) == (0.1, 0.1)
    assert knapsack.saving(path, 0.9) is None


# --- whole runs ---------------------------------------------------------------------------------

SMALL = {"window": 64, "min_context": 200}
BUDGET = 1.5  # random weights: a small error changes much
# On CPUs vLLM wants most of the memory that is free, which other tests use at the same time.
MEMORY = '{"gpu_memory_utilization": 0.2}'
FEW = ("--bands", "32", "--thresholds", "0.1,0.6,0.8", "--steps", 48, "--min-saving", 0.01, "--engine", MEMORY)


def check_results(told: Path, out: Path, budget: float) -> dict:
    """The file keeps the budget as measured, and is one that MAC takes. Returns the results."""
    rows = json.loads(told.read_text())
    config = resolve({"config": str(out)}, {})
    assert (config.window, config.band, config.min_context) == (64, 32, 200)
    assert rows["chosen"]["kl"] <= budget and rows["chosen"]["read"] < 1
    assert [len(layer["alone"]) > 1 for layer in rows["layers"]] == [True, True]
    assert any(layer["threshold"] is not None and layer["read"] < 1 for layer in rows["layers"])
    for layer in rows["layers"]:
        alone = layer["alone"]
        assert alone[0] == {"threshold": None, "read": 1.0, "cost": 0.0}
        assert [o["threshold"] for o in alone[1:]] == sorted((o["threshold"] for o in alone[1:]), reverse=True)
        if layer["threshold"] is None:
            assert layer["read"] == 1
    # Under one threshold for all layers a stricter one reads no less.
    reads = [one["read"] for one in rows["singles"]]
    assert reads == sorted(reads, reverse=True) and reads[-1] < 1
    assert rows["paper"] is None  # its window is 512
    assert sum(c["chosen"] for c in rows["curve"]) == 1 and rows["held_out"]["tokens"] > 0
    return rows


@pytest.mark.cpu
def test_calibrate_by_a_text(models, quick, tmp_path):
    """Pieces of a text have no reply: their ends are decoded."""
    out, told, table, plot, text = (tmp_path / name for name in ("mac.yaml", "r.json", "r.md", "r.png", "text.txt"))
    text.write_text("The lighthouse keeper writes down ships, winds and lamps. " * 20)
    result = invoke(
        "--model", models("mistral"), "--mac", json.dumps(SMALL), *FEW, "--prompts", text, "--length", 400, "--samples", 2,
        "--budget", BUDGET, "--out", out, "--json", told, "--markdown", table, "--plot", plot, "--no-progress",
    )  # fmt: skip
    assert result.exit_code == 0, result.output + result.stderr
    rows = check_results(told, out, BUDGET)
    assert rows["about"]["text_tokens"] == [48, 48]
    assert "| the file written |" in table.read_text() and plot.stat().st_size > 10_000


class Told:
    """In place of a `divergence.Trial`: costs and reads by formula."""

    def __init__(self, cost: dict, read: dict):
        self.layers, self.cost, self.read, self.set_to, self.texts = list(cost), cost, read, {}, [0, 1]

    def set(self, thresholds, others=None):
        self.set_to = thresholds, others

    def run(self, half):
        thresholds, others = self.set_to
        read = [self.read[n][thresholds[n]] if n in thresholds else 1.0 for n in self.layers]
        # Together layers cost more than the sum.
        cost = (
            sum(self.cost[n][t] for n, t in thresholds.items())
            * (1 + 0.5 * (len(thresholds) - 1))
            * (9 if others else 1)
        )
        return Run(cost, cost, 1.0, read, 10)


def calibrated(cost, read, **spec):
    thresholds = sorted(next(iter(cost.values())))
    told = {"thresholds": thresholds, "budget": None, "saving": None, "min_saving": 0.05, "paper": True} | spec
    return _calibrate(Told(cost, read), told, range(2), lambda **_: None)


COSTS = {"a": {0.1: 0.02, 0.45: 0.01}, "b": {0.1: 0.5, 0.45: 0.012}}
READS = {"a": {0.1: 0.1, 0.45: 0.3}, "b": {0.1: 0.1, 0.45: 0.6}}


def test_a_choice_is_within_the_budget_as_measured():
    """Layers a at 0.1 and b at 0.45 would fit by their sum, 0.032, but take 0.048 together."""
    found = calibrated(COSTS, READS, budget=0.04)
    assert found["thresholds"] == [0.45, 0.45] and found["chosen"]["kl"] == pytest.approx(0.033)
    assert calibrated(COSTS, READS, budget=0.05)["thresholds"] == [0.1, 0.45]
    with pytest.raises(CalibrateError, match="costs by itself: 0.01$"):
        calibrated(COSTS, READS, budget=0.001)


def test_what_costs_nothing_is_measured_as_a_whole_too():
    free = {"a": {0.1: 0.0, 0.45: 0.0}, "b": {0.1: 0.0, 0.45: 0.0}}
    found = calibrated(free, READS, budget=0.01)
    assert (
        found["thresholds"] == [0.1, 0.1]
        and found["chosen"]["kl"] == 0
        and found["chosen"]["read"] == pytest.approx(0.1)
    )


def test_a_saving_is_reached_as_measured_or_refused():
    found = calibrated(COSTS, READS, saving=0.6)
    assert 1 - found["chosen"]["read"] >= 0.6 and found["thresholds"] == [0.1, 0.45]
    with pytest.raises(CalibrateError, match="save 90.0% of KV reads at most"):
        calibrated(COSTS, READS, saving=0.95)


def test_layers_that_save_little_stay_exact():
    reads = {"a": READS["a"], "b": {0.1: 0.97, 0.45: 0.99}}
    assert calibrated(COSTS, reads, budget=10.0)["thresholds"] == [0.1, None]
    none = {"a": {0.1: 1.0, 0.45: 1.0}, "b": {0.1: 0.97, 0.45: 1.0}}
    with pytest.raises(CalibrateError, match="^no layer saves 5% of its KV reads at any threshold"):
        calibrated(COSTS, none, budget=10.0)


@pytest.mark.cpu
def test_a_stopped_run_goes_on_with_what_was_kept(models, quick, tmp_path):
    """All passes but the first three are lost, the fourth half written: the end is the same."""
    kept, told = tmp_path / "kept" / "kl.jsonl", [tmp_path / "1.json", tmp_path / "2.json"]
    run = lambda *more: invoke(
        "--model", models("qwen3"), "--mac", json.dumps(SMALL), *FEW, "--tasks", "niah_single", "--length", 500, "--samples", 2,
        "--budget", BUDGET, "--keep", kept, "--out", tmp_path / "mac.yaml", *more,
    )  # fmt: skip
    first = run("--json", told[0])
    assert first.exit_code == 0, said(first)
    check_results(told[0], tmp_path / "mac.yaml", BUDGET)
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:5]) + lines[5][:30])
    second = run("--json", told[1])
    assert second.exit_code == 0 and "3 passes were measured before" in said(second), said(second)
    assert kept.read_text().splitlines(keepends=True)[:5] == lines[:5]
    assert [sorted(json.loads(line)) for line in kept.read_text().splitlines()] == [
        sorted(json.loads(line)) for line in lines
    ]
    one, two = (json.loads(path.read_text()) for path in told)
    assert one["config"] == two["config"] and len(one["singles"]) == len(two["singles"]) == 3
    for a, b in zip(one["singles"] + one["curve"], two["singles"] + two["curve"], strict=True):
        assert a["read"] == b["read"] and a["kl"] == pytest.approx(b["kl"], rel=1e-3)
    other = run("--steps", 40)
    assert (
        other.exit_code == 2
        and "holds another run's measurements" in said(other)
        and "--steps: there 48, now 40" in said(other)
    )


def test_a_journal_reads_what_it_wrote_and_nothing_else(tmp_path):
    path, about = tmp_path / "new" / "kl.jsonl", {"llm": {"model": "m" * 300, "mac": {"window": 512}}}
    made = Journal(path, about)
    made.keep_replies([[1], []])
    made.put([{"b": 0.1, "a": 0.2}, None, 0], [0.5, [1.0]])
    with pytest.raises(CalibrateError, match="^--keep: .* is in use by another run"):
        Journal(path, about)
    del made  # and with it the lock
    with open(path, "a") as file:
        file.write('{"pass": [1')  # cut short
    again = Journal(path, about)
    assert again.replies == [[1], []] and len(again) == 1
    assert (
        again.found([{"a": 0.2, "b": 0.1}, None, 0]) == [0.5, [1.0]]
        and again.found([{"a": 0.2, "b": 0.1}, None, 1]) is None
    )
    del again
    content = path.read_bytes()
    assert content.endswith(b"]}\n")
    about["llm"]["mac"]["window"] = 256
    with pytest.raises(CalibrateError, match=r"another file\. llm\.mac\.window: there 512, now 256$"):
        Journal(path, about)
    assert path.read_bytes() == content
    for other in (
        b"\xff\xfe",
        b"[]\n",
        b"PK",
        b'{"about": 1}\n',
        b'{"about": [1]}\n',
        b'{"about": {}}\n{"found": 2}\n',
    ):
        path.write_bytes(other)
        with pytest.raises(CalibrateError, match="^--keep: .*holds no measurements of --metric kl"):
            Journal(path, {})
        assert path.read_bytes() == other
    for begun in (b"", b'{"about": {'):
        path.write_bytes(begun)
        assert Journal(path, {"a": 1}).replies is None
        assert path.read_bytes() == b'{"about": {"a": 1}}\n'
    with pytest.raises(CalibrateError, match="^--keep: .*Is a directory"):
        Journal(tmp_path, {})
    nothing = Journal(None, {})
    nothing.put([1], 2)
    assert nothing.found([1]) == 2 and nothing.replies is None


@pytest.mark.parametrize(
    "args, message",
    [
        (["--bands", "128,256"], "--bands: received '128,256'; --metric kl takes one value, for all layers"),
        (["--budget", "0"], "--budget: received 0; choose a divergence above 0"),
        (["--metric", "kl", "--measured", "m.npz"], "--measured: kl is measured anew"),
        (["--keep", "m.npz"], "--keep: received m.npz; --metric kl keeps lines of JSON"),
        (["--metric", "kld"], "--metric: received 'kld'; choose from kl, p50, p95, p99, mean"),
        (["--engine", '{"enforce_eager": false}'], "--engine: enforce_eager: received False; calibration needs True"),
    ],
)
def test_wrong_options_are_named(args, message, tmp_path):
    result = invoke("--model", "m", "--tasks", "niah_single", *args, "--out", tmp_path / "mac.yaml")
    assert result.exit_code == 2 and message in said(result).replace("Invalid value for ", "")


def test_progress_ends_at_its_total():
    """As far as is known: a search takes what it takes."""
    for budget in (0.04, 10.0, 0.013):
        said = []
        spec = {"thresholds": [0.1, 0.45], "budget": budget, "saving": None, "min_saving": 0.05, "paper": True}
        _calibrate(Told(COSTS, READS), spec, range(2), lambda **told: said.append(told))
        passes = 2 * 2 + 2 + 1  # each layer by itself, all together, and the paper's setting
        assert said[0]["total"] == passes and sum(told["advance"] for told in said) == said[-1]["total"] > passes
        done = 0
        for told in said:
            done += told["advance"]
            assert done <= told["total"]


def test_few_tokens_are_warned_of(tmp_path):
    assert by_kl.few(by_kl.FEW) is None and "40 tokens to choose from are few" in by_kl.few(40)
    run = {"kl": 1e-4, "kl_max": 0.1, "read": 0.5, "same_best": 1.0}
    results = {"chosen": run | {"tokens": 40}, "held_out": run | {"tokens": 4000}, "about": {"rule": {"budget": 1.0}}}
    assert [line for line in by_kl.summary(results) if "are few" in line] == [by_kl.few(40)]
    assert not any("are few" in line for line in by_kl.summary(results | {"chosen": run | {"tokens": 1000}}))
    asked = [SimpleNamespace(max_tokens=most) for most in (5, 99, 300, 99)]
    grid = SimpleNamespace(steps=256)
    # The first and third prompt choose; without a reply the prompt's end is decoded.
    assert by_kl.decoded(SimpleNamespace(grid=grid, reply=None), asked) == 5 + 256
    assert by_kl.decoded(SimpleNamespace(grid=grid, reply=0), asked) == 2 * 256


def test_a_log_says_how_much_of_what_is_done(capsys):
    with terminal.progress(True, None, done=True) as tell:
        tell("starting", 0)
        tell("first", 1, 3)
        tell("second", 1)
        tell("more", 1, 4)
    assert [line.split("s  ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "starting",
        "[1/3] first",
        "[2/3] second",
        "[3/4] more",
    ]
