"""`vllm-mac eval`: its command line, its plots, and one whole run on the CPU, with a yardstick."""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from support import ROOT
from support.eval_runs import invoke
from vllm_mac.config import resolve
from vllm_mac.tools.eval import (
    evaluation,
    plots,
    results,
    statistics,
)
from vllm_mac.tools.eval.cli import configurations

# The command line


@pytest.mark.parametrize(
    "args, said",
    [
        (["--tasks", "haystack"], "--tasks: received 'haystack'; choose from all, ruler, long, real"),
        (["--lengths", "4k"], "--lengths: received '4k'; choose whole numbers of at least 1"),
        (["--mac", "a=1", "--mac", "a=2"], "--additional-config mac.config: received '1'"),
        (["--mac", "paper", "--mac", "paper"], "received 'paper'; choose NAME=JSON"),
        (["--mac", "exact={}"], "received 'exact={}'; choose NAME=JSON"),
        (["--mac", "yardstick=paper"], "received 'yardstick=paper'; choose NAME=JSON"),
        (["--mac", 'a={"bandd": 1}'], "bandd: unknown key"),
        (["--engine", "[]"], "--engine: received '[]'; choose a JSON object"),
        (
            ["--gpus", "0,,1"],
            "--gpus: received '0,,1'; choose GPUs as CUDA_VISIBLE_DEVICES takes them, separated by commas",
        ),
        (["--gpus", ""], "--gpus: received ''; choose GPUs"),
        *(
            (
                ["--gpus", "0", "--engine", json.dumps({key: 2})],
                f"--engine: {key}: received 2; choose 1, because with --gpus",
            )
            for key in evaluation.PARALLEL
        ),
        (["--resume"], "holds no run"),
    ],
)
def test_a_wrong_argument_is_named(args, said, monkeypatch, tmp_path):
    """Before anything else is missed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, output = invoke("--model", tmp_path, "--out", tmp_path / "out", *args)
    assert code == 2 and said in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_gpus_are_taken_as_they_are():
    assert evaluation.gpus("1, GPU-0c,1", {"tensor_parallel_size": 1, "max_num_seqs": 2}) == ("1", "GPU-0c", "1")


def test_models_that_cannot_be_read(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    out = ("--out", tmp_path / "out")
    assert "--model: no folder" in invoke("--model", tmp_path / "absent", *out)[1]
    assert "has no config.json" in invoke("--model", tmp_path, *out)[1]
    (tmp_path / "config.json").write_text("{}")
    assert "has no tokenizer" in invoke("--model", tmp_path, *out)[1]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "--engine: received {'lenght': 9}" in invoke("--model", tmp_path, *out, "--engine", '{"lenght": 9}')[1]
    code, said = invoke("--model", tmp_path, *out)
    assert code == 2 and "cannot be read" in said and "Traceback" not in said
    code, said = invoke("--model", tmp_path, "--out", tmp_path)
    assert code == 2 and "exists; choose another folder, or --resume" in said


def test_configurations_are_whole_and_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("rule: match\nwindow: 99\n")
    found = configurations(["paper", 'b={"band": 9}', "c=paper", str(tmp_path / "mine.yaml")], audit=False)
    assert list(found) == ["paper", "b", "c", "mine"]
    assert found["paper"] == found["c"] and found["b"]["band"] == 9 and found["mine"]["window"] == 99
    paper = {
        "window": 512,
        "band": 256,
        "threshold": 0.45,
        "reuse": "chained",
        "lag_weight": 0.0,
        "max_chain": None,
        "sink": 0,
        "mass_floor": None,
    }
    assert paper.items() <= found["paper"].items()
    # Only hits of the paper's rule are audited.
    audited = configurations(["default", "paper", 'a={"rule": "match", "audit": 0.5}'], audit=True)
    assert {name: keys["audit"] for name, keys in audited.items()} == {"default": 0, "paper": 1, "a": 0.5}
    assert audited["default"]["rule"] == "index" and resolve(audited["default"], {}).rule == "index"


# A whole run


@pytest.mark.cpu
def test_eval_on_real_engines(tmp_path):
    pytest.importorskip("vllm", reason="whole engines")
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    from support.tiny_models import write

    out, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["red", "green", "blue", "and", "or", "not"], k=150)) for _ in range(2)]
    prompts.write_text("".join(json.dumps({"prompt": text, "max_tokens": 40}) + "\n" for text in texts))
    keys = {"rule": "match", "window": 64, "band": 32, "min_context": 128}
    configurations = {"reuse": keys, "never": keys | {"threshold": 1.0}}
    # A quarter of the length is the reply's; what is left is read in one step by exact, in three by the yardstick.
    engine = {
        "block_size": 32,
        "dtype": "float32",
        "kv_cache_memory_bytes": 32 << 20,
        "enforce_eager": True,
        "max_num_batched_tokens": 2048,
    }
    quick = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
             "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
             "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from vllm_mac.tools.cli import main; main()", "eval", "--model", str(write("llama", tmp_path / "models")),
         "--tasks", "niah_single,real", "--lengths", "2000", "--samples", "1", "--prompts", str(prompts), "--kl", "2",
         "--yardstick", "chunks", *(part for name, some in configurations.items() for part in ("--mac", f"{name}={json.dumps(some)}")),
         "--engine", json.dumps(engine), "--out", str(out), "--plot", str(tmp_path / "plot.png"), "--no-progress"],
        capture_output=True, text=True, timeout=900, check=False,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | quick,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "results.json").read_text())
    exact, yard, reuse, never = found["totals"]
    assert [row["configuration"] for row in found["totals"]] == ["exact", "yardstick", "reuse", "never"]
    # What --yardstick changes on CPUs is rounding: not nothing, and far less than reuse.
    assert found["yardstick"] == {"identical": False} and found["configuration"]["yardstick"]["llm"] == {
        "max_num_batched_tokens": 512
    }
    assert 0 < yard["kl_mean"] < reuse["kl_mean"] / 10
    assert all(0 <= row["agreed_share"] <= 1 for row in (yard, reuse)) and reuse["agreed_share"] <= yard["agreed_share"]
    assert "vLLM's own backend, with prefill in chunks of 512 tokens" in done.stdout
    # Tasks of the standard library have no right answer.
    real = [row for row in found["rows"] if row["group"] == "real"]
    assert {row["task"] for row in found["tasks"]} == {"niah_single", "prompts", "manual", "codebase"}
    assert real and all(row["scored"] == 0 and "score" not in row for row in real)
    assert "no score" in (out / "results.md").read_text()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert never["same_answers"] == 1 and never["hit_rate"] == 0 and never["read_share"] == 1
    assert never["same_best"] > 0.99 > reuse["same_best"]  # ties within rounding may fall either way
    # Attention of the two engines differs by 1e-4 at most (see test_engine_exact), logits by e = 1e-3 (their
    # standard deviation is 10), and KL by e^2/2; log-probabilities of up to 100 are rounded to float32 on both sides.
    assert never["kl_mean"] <= never["kl_max"] < 1e-3**2 / 2 + 2 * 100 * 2**-24
    assert 0 < reuse["hit_rate"] < 1 and 0 < reuse["read_share"] < 1
    assert 100 * never["kl_max"] < reuse["kl_mean"] <= reuse["kl_max"] < math.inf
    # Both forced texts are 256 tokens: the prompts have more.
    assert never["kl_tokens"] == reuse["kl_tokens"] == 512
    assert list(found["layers"]["reuse"]) == [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    for figures in found["layers"]["reuse"].values():
        assert 0 < figures["hit_rate"] <= 1 and 0 < figures["error_p50"] < figures["error_p95"]
        # Every step is audited, so that the heads' rates are exact.
        assert (
            np.mean(figures["head_hit_rates"]) == pytest.approx(figures["hit_rate"])
            and max(figures["head_hit_rates"]) <= 1 + 1e-9
        )
    assert all("error_p50" not in figures for figures in found["layers"]["never"].values())
    lags, chains = found["histograms"]["reuse"]["lag"], found["histograms"]["reuse"]["chain"]
    assert sum(count for _, count in lags) == sum(count for _, count in chains) > 0
    assert all(count == 0 for edge, count in lags if edge is None or edge > 64)  # the window
    groups = {(r["group"], r["length"], r["requests"]) for r in found["rows"]}
    assert groups == {("ruler", 2000, 1), ("real", 2000, 2), ("prompts", None, 2)}
    # What the prompts took to read is part of the time.
    assert all(0 < row["tokens_per_s"] < 1e5 for row in found["totals"] + found["rows"])
    rows = results.read_samples(out / "reuse")
    seconds, tokens = sum(row["seconds"] for row in rows), sum(len(row["tokens"]) for row in rows)
    assert reuse["tokens_per_s"] == pytest.approx(tokens / seconds)
    for name in ("trade.png", "scores.png", "reads.png", "layers.png", "heads.png", "histograms.png", "divergence.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "| never | 5 (1 scored) |" in (out / "results.md").read_text()
    assert not list(out.glob("*/forced.npz")) and len((out / "never" / "samples.jsonl").read_text().splitlines()) == 5


def test_scores_are_drawn_wherever_their_interval_ends():
    """Of 25 right answers Wilson's interval ends at 1 - 1e-16, below their mean."""
    ends = {(score, n): statistics.wilson(score, n) for score in (0.0, 1.0) for n in range(1, 40)}
    assert any(high < score or low > score for (score, _), (low, high) in ends.items())
    rows = [
        {"configuration": "exact", "task": f"{n}", "length": None, "score": score, "score_low": low, "score_high": high}
        for (score, n), (low, high) in ends.items()
    ]
    assert plots.scores({"tasks": rows, "totals": [{"configuration": "exact"}]}) is not None


@pytest.mark.parametrize("timed", [False, True])
def test_what_a_configuration_saves_and_costs_is_one_point(timed):
    """Results of before speed was counted have no panel of it."""
    found = json.loads((ROOT / "examples" / "results" / "testbed-eval-h200.json").read_text())
    if timed:
        for i, row in enumerate(found["totals"], 1):
            row["tokens_per_s"] = 100.0 * i
    figure = plots.trade(found)
    points = [[line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"] for axes in figure.axes]
    share = [100 * row.get("read_share", 1.0) for row in found["totals"]]
    height = [[100 * row["score"] for row in found["totals"]], [row.get("tokens_per_s") for row in found["totals"]]]
    assert points == [[[list(point)] for point in zip(share, heights)] for heights in height[: 1 + timed]]
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["exact", *(f"MAC ({name})" for name in found["configuration"]["mac"])]
    assert plots.trade({"totals": [{"configuration": "exact"}]}) is None
