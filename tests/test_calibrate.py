"""`vllm-mac calibrate`: the simulation against the reference, the choice, the files, and whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from support.calibrate_runs import (
    CANDIDATES,
    ERRORS,
    EXACT64,
    FEW,
    GRID,
    HEADS,
    KV_HEADS,
    READS,
    SCALE,
    SETTINGS,
    SMALL,
    STEPS,
    TOKENS,
    U64,
    WINDOW,
    A,
    B,
    D,
    invoke,
    layer,
    made_up,
    said,
)
from support.modules import MODULES, top
from support.rounding import decode_error, largest_score
from vllm_mac import metrics, reference
from vllm_mac.config import MacConfig, resolve
from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.choose import Chooser, Rule, outcome, single
from vllm_mac.tools.calibrate.grid import PAPER, Candidate, Grid, Setting
from vllm_mac.tools.calibrate.measured import Measured, figures
from vllm_mac.tools.calibrate.simulate import Layer, measure, simulate, tally
from vllm_mac.tools.calibrate.simulation_engine import layers_with_mac


def by_reference(given: Layer, candidate: Candidate):
    """Every step as `reference` decodes it: outputs, hits, sources, chains, KV tokens read."""
    config = MacConfig(window=WINDOW, min_context=40, threshold=candidate.threshold, **candidate.setting._asdict())
    first, group = given.key.shape[1] - len(given.query), HEADS // KV_HEADS
    outs, hits, sources, chains, read = [], [], [], [], 0
    for k in range(KV_HEADS):
        own = slice(k * group, (k + 1) * group)
        rings = [{} for _ in range(group)]
        query, pre = given.query[:, own], given.pre_query[:, own]
        reference.seed(first, query[:WINDOW], pre[:WINDOW], given.key[k], given.value[k], rings, config, SCALE)
        steps = []
        for i in range(WINDOW, WINDOW + STEPS):
            m = first + i
            step = reference.decode(m, query[i], pre[i], given.key[k], given.value[k], rings, config, SCALE)
            steps.append(step)
            read += step.read
            chains.append([ring[m].chain for ring in rings])
        outs.append(torch.stack([step.out for step in steps], 1))
        hits.append([step.hit for step in steps])
        sources.append(torch.tensor([step.source for step in steps]).T)
    chain = torch.tensor(chains).view(KV_HEADS, STEPS, group).transpose(1, 2).reshape(HEADS, STEPS)
    return torch.cat(outs), torch.tensor(hits), torch.cat(sources), chain, read


@pytest.mark.parametrize("seed", [0, 1])
def test_the_simulation_is_the_reference(seed):
    """All candidates in one call, each against a run of `reference` by itself, in float64."""
    given = layer(seed)
    trace = simulate(given, CANDIDATES, STEPS, EXACT64, keep_out=True)
    sigma = largest_score(given.query, given.key.flatten(0, 1), SCALE)
    largest = float(given.value.abs().max())
    seen = set()
    for i, candidate in enumerate(CANDIDATES):
        out, hit, source, chain, read = by_reference(given, candidate)
        assert torch.equal(trace.hit[i], hit), candidate
        assert torch.equal(trace.source[i], source), candidate
        assert torch.equal(trace.chain[i].to(chain.dtype), chain) and int(trace.read[i]) == read, candidate
        # Both sides round; neither more than a chain of that length may, and one merge of the parts.
        allowed = 2 * decode_error(TOKENS, D, sigma, int(chain.max()) + 2, U64) * largest
        assert (trace.out[i] - out).abs().max() <= allowed, candidate
        seen.add((bool(hit.any()), bool(hit.all()), bool((source >= 0).all()), int(chain.max()) > 3))
        if candidate.threshold == 1.0:
            assert not hit.any() and read == KV_HEADS * sum(range(TOKENS - STEPS + 1, TOKENS + 1))
    # Chains, partial hits and heads whose group missed all occurred.
    assert (True, False, False, True) in seen and (False, False, False, False) in seen


def test_errors_are_relative_to_exact_attention():
    given = layer()
    trace = simulate(given, CANDIDATES, STEPS, EXACT64, keep_out=True)
    exact = simulate(given, [Candidate(SETTINGS[0], 1.0)], STEPS, EXACT64, keep_out=True).out[0]
    softmax = []
    for i in range(STEPS):
        m, group = TOKENS - STEPS + i, HEADS // KV_HEADS
        key, value = (x[:, : m + 1].repeat_interleave(group, 0) for x in (given.key, given.value))
        score = (key @ given.query[WINDOW + i, :, :, None])[..., 0] * SCALE
        softmax.append((score.softmax(-1)[:, None] @ value)[:, 0])
    assert torch.allclose(exact, torch.stack(softmax, 1), rtol=0, atol=1e4 * U64)
    hit = trace.hit.repeat_interleave(HEADS // KV_HEADS, 1)
    wanted = (trace.out - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert torch.allclose(trace.error[hit], wanted[hit], rtol=1e-9) and trace.error[hit].max() > 0.01
    assert not trace.error[~hit].any()


def test_counts_are_those_of_the_trace(monkeypatch):
    """However many candidates are simulated at a time."""
    given = layer(dtype=torch.float32)
    dtypes = torch.bfloat16, torch.bfloat16
    whole = measure(given, CANDIDATES, STEPS, dtypes)
    monkeypatch.setattr("vllm_mac.tools.calibrate.simulate.STATE_BYTES", 400_000)
    parts = measure(given, CANDIDATES, STEPS, dtypes)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole if name != "error")
    trace = simulate(given, CANDIDATES, STEPS, EXACT64)
    counts = tally(trace, TOKENS)
    hit = trace.hit.repeat_interleave(HEADS // KV_HEADS, 1)
    found = figures(counts)
    for i in range(len(CANDIDATES)):
        errors = np.sort(trace.error[i][hit[i]].numpy())
        assert found["samples"][i] == len(errors) and counts["heads"][i].sum() == len(errors)
        assert found["mean"][i] == pytest.approx(float(trace.error[i].mean()))
        assert counts["longest"][i] == trace.chain[i].max()
        if len(errors):
            for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
                true = errors[int(np.ceil(share * len(errors))) - 1]
                assert true < found[name][i] <= true * 10 ** (1 / 64) * (1 + 1e-9)
            lag = torch.arange(TOKENS - STEPS, TOKENS) - trace.source[i]
            assert found["lag"][i] == pytest.approx(float(lag[hit[i]].double().mean()))
        else:
            assert np.isnan(found["p95"][i]) and found["read"][i] == 1


def test_narrow_rings_add_error():
    given = layer(dtype=torch.float32)
    loose = [Candidate(SETTINGS[2], 0.3)]
    wide, half = (simulate(given, loose, STEPS, (torch.float32, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(wide.hit, half.hit) and not torch.equal(wide.error, half.error)


def test_too_few_tokens_for_a_prefix():
    with pytest.raises(ValueError, match="66 tokens leave no prefix for 64 positions with band 8 and sink 0"):
        simulate(layer(tokens=66), CANDIDATES[:1], STEPS, EXACT64)


def test_who_knows_what():
    """vLLM is known to the capture and the engine; torch to the simulation too, and to none of the rest."""
    knows = {name: top(MODULES[f"tools.calibrate.{name}"], f"tools.calibrate.{name}") & {"vllm", "torch"} for name in
             ("bins", "grid", "measured", "choose", "output_files", "calibration", "simulate", "capture")}  # fmt: skip
    assert knows.pop("simulate") == {"torch"} and "vllm" in knows.pop("capture")
    assert not any(knows.values())


@pytest.mark.parametrize(
    "budget, setting, thresholds, read",
    [
        (1.0, A, (0.3, 0.3), 0.1),  # everything fits
        (0.35, B, (0.3, 0.3), 0.2),  # layer 1 fits under B only
        (0.11, A, (0.5, None), 0.6),  # B saves as much there (0.3: 0.2) and is later in order
        (0.045, A, (0.7, None), 0.75),  # what B's 0.7 saves in layer 1 is below --min-saving
        (0.03, B, (0.7, None), 0.8),
    ],
)
def test_the_fewest_reads_within_the_budget(budget, setting, thresholds, read):
    choice = Chooser(made_up(ERRORS, READS), Rule("p95")).best(budget)
    assert (choice.setting, choice.thresholds, choice.read) == (setting, thresholds, pytest.approx(read))


def test_among_nearly_equal_reads_the_error_decides():
    near = READS | {("A", 0.5): (0.1019, 0.1019)}
    assert Chooser(made_up(ERRORS, near), Rule("p95")).best(1.0).thresholds == (0.5, 0.5)
    both = near | {("B", 0.3): (0.1035, 0.1035)}
    choice = Chooser(made_up(ERRORS, both), Rule("p95")).best(1.0)
    assert (choice.setting, choice.thresholds) == (B, (0.3, 0.3))


def test_a_budget_that_nothing_meets_names_the_nearest():
    with pytest.raises(CalibrateError) as raised:
        Chooser(made_up(ERRORS, READS), Rule("p95")).best(0.001)
    for part in (
        "--budget: received 0.001",
        "Nearest: p95 0.02",
        "model.layers.0.attn",
        "reads 60.0%",
        "threshold 0.7",
        "band 256",
    ):
        assert part in str(raised.value)
    with pytest.raises(CalibrateError, match="no layer saves 95% of its KV reads under any candidate"):
        Chooser(made_up(ERRORS, READS), Rule("p95", min_saving=0.95)).best(0.5)


def test_few_samples_are_no_ground_to_choose():
    chooser = Chooser(made_up(ERRORS, READS), Rule("p95", min_samples=1000))
    assert chooser.within(1.0, A).thresholds == (None, None)


def test_the_least_error_at_a_saving():
    chooser = Chooser(made_up(ERRORS, READS), Rule("p95"))
    choice, budget = chooser.saving(0.7)
    assert choice.setting == B and 1 - choice.read >= 0.7 and 0.2 <= budget < 0.21
    assert 1 - chooser.ranking(budget * 0.99)[0].read < 0.7
    with pytest.raises(CalibrateError, match="--saving: received 0.99; the candidates save 90.0% of KV reads at most"):
        chooser.saving(0.99)


def test_held_out_figures_are_of_the_other_half():
    measured = made_up(ERRORS, READS)
    choice = single(measured, Candidate(A, 0.5))
    chosen, held_out = (outcome(measured, choice, half) for half in (0, 1))
    assert held_out["mean"] == pytest.approx(2 * chosen["mean"]) == pytest.approx(0.9)
    # Exact layers count as read and without error.
    partial = outcome(measured, Chooser(measured, Rule("p95")).best(0.045), 0)
    assert partial["read"] == pytest.approx(0.75) and partial["mean"] == pytest.approx(0.02)


def test_measurements_survive_a_file(tmp_path):
    measured = made_up(ERRORS, READS)
    measured.save(tmp_path / "m.npz")
    again = Measured.load(tmp_path / "m.npz")
    assert again.grid == GRID and again.names == measured.names and again.source == measured.source
    assert all(np.array_equal(again.counts[name], measured.counts[name]) for name in measured.counts)
    (tmp_path / "bad.npz").write_text("x")
    with pytest.raises(CalibrateError, match="bad.npz: not a file of measurements"):
        Measured.load(tmp_path / "bad.npz")


def test_the_paper_is_tried_where_prompts_allow():
    assert PAPER in GRID.candidates(True) and PAPER not in GRID.candidates(False)
    assert len(GRID.candidates(True)) == (2 + 1) * (3 + 1)
    narrow = Grid(512, 2048, 512, (0.5,), (128,), (4,), (0.0,), ("anchored",), (None,), ("absolute",), (None,))
    assert narrow.least() == narrow.least(paper=True) == 512 + 2048
    wide = Grid(512, 300, 512, (0.5,), (128,), (4,), (0.0,), ("anchored",), (None,), ("absolute",), (None,))
    assert wide.least() == 512 + 512 + 128 + 4 and wide.least(paper=True) == wide.least() + 128


def test_the_file_is_read_back_and_says_where_it_came_from(tmp_path):
    made_up(ERRORS, READS).save(tmp_path / "m.npz")
    names = {name: tmp_path / "new" / name for name in ("mac.yaml", "r.json", "t.md", "p.png")}
    out, told, table, plot = names.values()
    result = invoke(
        "--measured",
        tmp_path / "m.npz",
        "--budget",
        0.11,
        "--out",
        out,
        "--json",
        told,
        "--markdown",
        table,
        "--plot",
        plot,
    )
    assert result.exit_code == 0, result.output
    assert "\nrule: match\n" in out.read_text()
    config = resolve({"config": str(out)}, {})
    assert (config.band, config.reuse, config.layers.exclude) == (128, "anchored", (1,))
    assert config.for_layer("model.layers.0.attn", 0).threshold == 0.5
    assert config.covers("model.layers.0.attn", 0) and not config.covers("model.layers.1.attn", 1)
    header = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert any("p95 of each layer's relative attention error at most 0.11" in line for line in header)
    assert any(line.startswith("# expected, all layers: 60.0% of KV tokens read") for line in header)
    assert any(line.startswith("# on held-out prompts") for line in header)
    rows = json.loads(told.read_text())
    assert rows["layers"]["chosen"][0]["threshold"] == 0.5 and rows["layers"]["held_out"][1]["threshold"] is None
    assert rows["layers"]["held_out"][0]["mean"] == pytest.approx(2 * rows["layers"]["chosen"][0]["mean"])
    assert "1 of 2 layers exceed the budget" in result.output and "| model.layers.0.attn | 0.5 |" in table.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_prompt_is_said_to_flatter(tmp_path):
    made_up(ERRORS, READS, prompts=1).save(tmp_path / "m.npz")
    result = invoke("--measured", tmp_path / "m.npz", "--saving", 0.7, "--out", tmp_path / "mac.yaml")
    assert result.exit_code == 0 and "nothing was held out" in said(result)
    assert "nothing was held out" in (tmp_path / "mac.yaml").read_text()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "m"], "choose --prompts FILE or --tasks NAMES"),
        (["--tasks", "ruler"], "choose --model to measure, or --measured to choose from a file"),
        (["--model", "m", "--tasks", "nihil"], "--tasks: received 'nihil'; choose from all, ruler, long"),
        (
            ["--model", "m", "--tasks", "ruler", "--metric", "p90"],
            "--metric: received 'p90'; choose from kl, p50, p95, p99, mean",
        ),
        (
            ["--model", "m", "--tasks", "ruler", "--reuse", "both"],
            "--reuse: received 'both'; choose from anchored, chained",
        ),
        (
            ["--model", "m", "--tasks", "ruler", "--thresholds", "0.5,2"],
            "--thresholds: received '0.5,2'; choose numbers from 0 to 1",
        ),
        (
            ["--model", "m", "--tasks", "ruler", "--max-chain", "0"],
            "--max-chain: received '0'; choose whole numbers of at least 1",
        ),
        (["--model", "m", "--tasks", "ruler", "--saving", "0.9", "--budget", "0.1"], "--saving: received 0.9"),
        (["--model", "m", "--tasks", "ruler", "--bands", "4096"], "band + sink must be less than min_context - 1"),
        (
            ["--model", "m", "--tasks", "ruler", "--mac", '{"rule": "index"}'],
            "rule: received 'index'; what is calibrated are thresholds, which only match has",
        ),
        (
            ["--model", "m", "--tasks", "ruler", "--mac", '{"band": 64}'],
            "band is calibrated; give the values to try with --bands",
        ),
        (
            ["--model", "m", "--tasks", "ruler", "--metric", "p95", "--engine", '{"max_num_seqs": 8}'],
            "--engine: max_num_seqs: received 8; calibration needs 1",
        ),
        (["--model", "/no/such", "--tasks", "niah_single"], "--model: no folder '/no/such'"),
        (["--measured", "/no/such.npz"], "/no/such.npz: not a file of measurements"),
    ],
)
def test_wrong_options_are_named(args, message, tmp_path):
    result = invoke(*args, "--out", tmp_path / "mac.yaml")
    assert result.exit_code == 2 and message.replace("│", " ") in said(result).replace("Invalid value for ", "")
    assert not (tmp_path / "mac.yaml").exists()


@pytest.mark.cpu
def test_calibrate_by_a_text(models, quick, tmp_path):
    """Read in chunks. By tasks, see `test_calibrate_output.py`."""
    out, told, text = tmp_path / "mac.yaml", tmp_path / "r.json", tmp_path / "text.txt"
    text.write_text("The lighthouse keeper writes down ships, winds and lamps. " * 20)
    result = invoke(
        "--model", models("mistral"), "--mac", SMALL, *FEW, "--budget", 3, "--min-saving", 0.01, "--out", out, "--json", told,
        "--prompts", text, "--length", 500, "--samples", 2, "--engine", '{"max_num_batched_tokens": 100}', "--no-progress",
    )  # fmt: skip
    assert result.exit_code == 0, result.output + result.stderr
    rows = json.loads(told.read_text())
    assert set(rows["layers"]) == {"chosen", "held_out"} and len(rows["layers"]["chosen"]) == 2
    config = resolve({"config": str(out)}, {})
    assert config.window == 64 and config.band == 32 and config.min_context == 200
    hits = rows["by_threshold"]["layers"]["model.layers.0.self_attn.attn"]["hits"]
    assert hits[0] > 0 and hits[0] >= hits[1] >= hits[2]
    assert rows["all_layers"]["held_out"]["read"] < 1 and rows["about"]["exact_layers"] == {}
    assert len(rows["about"]["prompt_tokens"]) == 2


@pytest.mark.cpu
@pytest.mark.parametrize(
    "prompts, mac, message",
    [
        (["--tasks", "niah_single", "--length", "300"], SMALL, "calibration needs at least 248"),
        (["--tasks", "plan", "--length", "2000"], SMALL, "--length: 2000 is too short for task plan"),
        (["--prompts", "/no/such.txt"], SMALL, "--prompts: /no/such.txt"),
        (["--prompts", "/no/such.jsonl"], SMALL, "--prompts: /no/such.jsonl"),
    ],
)
def test_wrong_prompts(prompts, mac, message, models, quick, tmp_path):
    result = invoke("--model", models("llama3"), *prompts, "--mac", mac, *FEW, "--out", tmp_path / "mac.yaml")
    assert result.exit_code == 2 and message in said(result)


@pytest.mark.cpu
def test_an_engine_reads_what_the_simulation_says(models):
    """A layer above embeddings sees the same queries whatever MAC did below it: the first one. So what the
    engine counts while it decodes equals what is simulated on a prompt that holds the tokens it decoded."""
    from vllm import SamplingParams

    from support import engine as harness
    from vllm_mac.metrics import HEADS, KV_TOKENS

    first, tokens, prompt = "model.layers.0.self_attn.attn", 60, list(b"a keeper writes down ships and winds; " * 6)
    setting = Setting(32, 4, "anchored", 1.0, 4, "absolute", 0.2)
    keys = {"window": 64, "min_context": 200, "threshold": 0.6, **setting._asdict()}
    grid = Grid(64, 200, tokens - 1, (0.6,), (32,), (4,), (1.0,), ("anchored",), (4,), ("absolute",), (0.2,))
    options = {
        "worker_extension_cls": "vllm_mac.tools.calibrate.capture.CalibrateWorker",
        "additional_config": {"mac": keys},
    }
    with harness.engine(models("qwen3"), backend="MAC", chunk=100, max_num_seqs=1, **options) as llm:
        generate = lambda ids, n: llm.generate(
            [{"prompt_token_ids": ids}], SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True), use_tqdm=False
        )[0].outputs[0].token_ids  # fmt: skip
        reply = list(generate(prompt, tokens))
        counted = {(s.name, s.labels.get("outcome", s.labels.get("kind"))): s.value
                   for s in llm.collective_rpc(metrics.counters)[0] if s.labels.get("layer") == first}  # fmt: skip
        assert llm.collective_rpc("calibrate_start", args=(grid.as_dict(), False))[0]["layers"][0] == (first, 0)
        whole = prompt + reply[:-1]
        llm.collective_rpc("calibrate_prompt", args=(len(whole),))
        generate(whole, 1)
        counts = llm.collective_rpc("calibrate_layer", args=(first,))[0]
    assert counts["heads"].sum() == counted[HEADS, "hit"] > 100 and counted[HEADS, "miss"] > 20
    assert counts["read"][0] == counted[KV_TOKENS, "read"]
    assert counts["full"][0] == counted[KV_TOKENS, "read"] + counted[KV_TOKENS, "skipped"]


def test_no_layer_is_served():
    with pytest.raises(CalibrateError, match=r"^--model: MAC serves no attention layer of m; exact: 2 \(excluded\)$"):
        layers_with_mac("m", [{"layers": []}], {"excluded": 2})


@pytest.mark.cpu
def test_no_tokenizer(models, quick, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((Path(models("llama3")) / "config.json").read_text())
    result = invoke("--model", bare, "--tasks", "niah_single", *FEW, "--mac", SMALL, "--out", tmp_path / "mac.yaml")
    assert result.exit_code == 2 and "has no tokenizer" in said(result)
