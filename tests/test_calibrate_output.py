"""`vllm-mac calibrate --metric output`: the error of a layer's output after W_O, against the formula and against Transformers."""

import json

import numpy as np
import pytest
import torch

from support.calibrate_runs import (
    CANDIDATES,
    ERRORS,
    EXACT64,
    FEW,
    HEADS,
    READS,
    SETTINGS,
    SMALL,
    STEPS,
    WINDOW,
    D,
    invoke,
    layer,
    made_up,
    said,
)
from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.choose import Chooser, Rule
from vllm_mac.tools.calibrate.grid import Candidate, Grid
from vllm_mac.tools.calibrate.measured import figures
from vllm_mac.tools.calibrate.simulate import measure, simulate

WIDTH = 20


def with_output(given):
    """The layer with a random W_O, and a residual whose norm differs from token to token."""
    draw = torch.Generator().manual_seed(9)
    matrix = torch.randn(WIDTH, HEADS * D, generator=draw, dtype=torch.float64)
    residual = 1 + 50 * torch.rand(WINDOW + STEPS, generator=draw, dtype=torch.float64)
    return given._replace(project=lambda x: x @ matrix.T, residual=residual), matrix


def test_the_error_after_the_output_matrix_is_that_of_the_formula(monkeypatch):
    """However many candidates are simulated at a time."""
    given, matrix = with_output(layer())
    counts = measure(given, CANDIDATES, STEPS, EXACT64)
    exact = simulate(given, [Candidate(SETTINGS[0], 1.0)], STEPS, EXACT64, keep_out=True).out[0]
    trace = simulate(given, CANDIDATES, STEPS, EXACT64, keep_out=True)
    wanted = torch.zeros(len(CANDIDATES), dtype=torch.float64)
    for i in range(STEPS):
        for c in range(len(CANDIDATES)):
            wrong = matrix @ (trace.out[c, :, i] - exact[:, i]).flatten()
            wanted[c] += wrong.square().sum() / given.residual[WINDOW + i]
    # Exact attention is a sum in another order for each candidate's band and sink.
    np.testing.assert_allclose(counts["output"], wanted.numpy(), rtol=1e-9, atol=1e-20)
    strict = [candidate.threshold == 1.0 for candidate in CANDIDATES]
    assert max(counts["output"][strict]) < 1e-20 and wanted.max() > 0.1
    found = figures(counts)["output"]
    np.testing.assert_allclose(found, wanted / STEPS, rtol=1e-9, atol=1e-20)
    monkeypatch.setattr("vllm_mac.tools.calibrate.simulate.STATE_BYTES", 400_000)
    np.testing.assert_allclose(
        measure(given, CANDIDATES, STEPS, EXACT64)["output"], counts["output"], rtol=1e-9, atol=1e-20
    )
    assert "output" not in measure(layer(), CANDIDATES[:2], STEPS, EXACT64)


def test_what_was_not_measured_cannot_be_chosen_by():
    with pytest.raises(CalibrateError, match="^--metric: received 'output', which these measurements lack"):
        Chooser(made_up(ERRORS, READS), Rule("output"))


def watched(worker):
    """What the hooks of both layers took of a prompt, and W_O of a unit matrix."""
    found = {}
    for name, watch in worker.calibrate_watches.items():
        size = watch.layer.num_heads * watch.layer.head_size
        taken = watch.take()
        found[name] = taken.residual.tolist(), taken.project(torch.eye(size)).T.tolist(), len(taken.query)
    return found


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_residual_and_the_output_matrix_are_the_model_s(name, models):
    """Against Transformers, with the prompt read in chunks."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from support import engine as harness

    folder, prompt = models(name), list(b"a keeper writes down ships and winds; " * 6)
    keys = {"window": 64, "min_context": 150, "band": 32, "threshold": 1.0}
    grid = Grid(64, 150, 20, (0.6,), (32,), (0,), (0.0,), ("anchored",), (None,), ("absolute",), (None,))
    options = {
        "worker_extension_cls": "vllm_mac.tools.calibrate.capture.CalibrateWorker",
        "additional_config": {"mac": keys},
    }
    with harness.engine(folder, backend="MAC", chunk=100, max_num_seqs=1, **options) as llm:
        llm.collective_rpc("calibrate_start", args=(grid.as_dict(), False, True))
        llm.collective_rpc("calibrate_prompt", args=(len(prompt),))
        llm.generate([{"prompt_token_ids": prompt}], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        found = llm.collective_rpc(watched)[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = theirs(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    assert found
    for name_, (residual, matrix, taken) in found.items():
        at = int(name_.split("layers.")[1].split(".")[0])
        norms = states[at][0].square().sum(-1)[-taken:]
        assert taken == len(residual) == 84
        # Two float32 evaluations of the same layers.
        assert torch.allclose(torch.tensor(residual), norms, rtol=1e-3)
        block = next(m for n, m in theirs.named_modules() if n.endswith(f"layers.{at}.self_attn.o_proj"))
        assert torch.equal(torch.tensor(matrix), block.weight)


@pytest.mark.cpu
def test_calibrate_by_the_output_s_error(models, quick, tmp_path):
    out, told, table, plot = (tmp_path / name for name in ("mac.yaml", "r.json", "r.md", "p.png"))
    few = ["output" if part == "p95" else part for part in FEW]
    result = invoke(
        "--model", models("llama3"), "--mac", SMALL, *few, "--tasks", "niah_single,niah_multikey", "--length", 700, "--samples", 1,
        "--budget", 0.5, "--min-saving", 0.01, "--out", out, "--json", told, "--markdown", table, "--plot", plot, "--no-progress",
    )  # fmt: skip
    assert result.exit_code == 0, said(result)
    rows = json.loads(told.read_text())
    layers = rows["by_threshold"]["layers"]
    for figures_ in layers.values():
        assert figures_["output"] == sorted(figures_["output"], reverse=True) and figures_["output"][0] > 0
    assert all(row["output"] <= 0.5 for row in rows["layers"]["chosen"]) and any(
        row["output"] > 0 for row in rows["layers"]["chosen"]
    )
    text = table.read_text()
    assert "## Percent of heads hit: 1000 x output, by threshold, chosen setting" in text and "| output |" in text
    assert (
        "squared error after W_O over the residual's at most 0.5" in out.read_text()
        and plot.read_bytes().startswith(b"\x89PNG")
    )
