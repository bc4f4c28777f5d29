"""What the tests of `vllm-mac calibrate` share: a layer, candidates, made-up measurements, its command line."""

import json

import numpy as np
import torch
from typer.testing import CliRunner

from vllm_mac.config import MacConfig
from vllm_mac.tools import cli
from vllm_mac.tools.calibrate.bins import BINS, UPPER
from vllm_mac.tools.calibrate.grid import Candidate, Grid, Setting
from vllm_mac.tools.calibrate.measured import Measured
from vllm_mac.tools.calibrate.simulate import Layer

U64 = torch.finfo(torch.float64).eps / 2
HEADS, KV_HEADS, D, TOKENS, WINDOW, STEPS = 6, 2, 8, 120, 24, 40
SCALE = D**-0.5
EXACT64 = (torch.float64, torch.float64)


def layer(seed: int = 0, dtype=torch.float64, tokens: int = TOKENS) -> Layer:
    """Queries that move slowly and jump now and then, so that heads hit, miss and disagree."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=dtype)
    n = WINDOW + STEPS
    query = draw(n, HEADS, D)
    for i in range(1, n):
        if i % 11:
            query[i] = 0.85 * query[i - 1] + 0.35 * query[i]
    # What is compared differs from what attends, as it does with RoPE.
    return Layer(query + 0.3 * query.flip(0), query, draw(KV_HEADS, tokens, D), draw(KV_HEADS, tokens, D) + 1, SCALE)


SETTINGS = [
    Setting(8, 0, "anchored", 0.0, None, "absolute", None),
    Setting(8, 3, "anchored", 2.0, None, "absolute", None),
    Setting(16, 0, "chained", 0.0, None, "absolute", None),
    Setting(16, 3, "chained", 1.0, 3, "relative", None),
    Setting(4, 5, "anchored", 0.0, 2, "relative", None),
    Setting(8, 2, "anchored", 1.0, None, "absolute", 0.2),
]
CANDIDATES = [Candidate(setting, threshold) for setting in SETTINGS for threshold in (0.3, 0.5, 0.7, 1.0)]


A, B = (
    Setting(128, 0, "anchored", 0.0, None, "absolute", None),
    Setting(256, 0, "anchored", 0.0, None, "absolute", None),
)
GRID = Grid(512, 2048, 100, (0.3, 0.5, 0.7), (128, 256), (0,), (0.0,), ("anchored",), (None,), ("absolute",), (None,))


def made_up(errors: dict, reads: dict, heads: int = 8, prompts: int = 2) -> Measured:
    """Two layers; errors and reads `[candidate][layer]`, equal for all heads. In the second half errors double."""
    candidates = GRID.candidates(False)
    shape = (2, 2, len(candidates))
    counts = {
        name: np.zeros(shape) for name in ("error", "matched", "lag", "chain", "longest", "read", "full", "steps")
    }
    counts |= {"bins": np.zeros((*shape, BINS), int), "heads": np.zeros((*shape, heads), int)}
    counts["steps"][:], counts["full"][:] = 100 * heads, 1000
    for c, candidate in enumerate(candidates):
        key = "AB"[candidate.setting == B], candidate.threshold
        for row in range(2):
            for half in range(2):
                value = errors[key][row] * (1 + half)
                counts["bins"][half, row, c, np.searchsorted(UPPER, value)] = 100 * heads
                counts["error"][half, row, c] = value * 100 * heads
                counts["read"][half, row, c] = 1000 * reads[key][row]
    environment = dict.fromkeys(("command", "gpu", "vllm", "torch", "commit", "timestamp"), "?")
    source = {
        "model": "m",
        "prompts": "p",
        "mac": MacConfig(rule="match").model_dump(mode="json"),
        "environment": environment,
    }
    names = "model.layers.0.attn", "model.layers.1.attn"
    return Measured(counts, names, (0, 1), GRID, False, (4000,) * prompts, source)


ERRORS = {("A", 0.3): (0.2, 0.9), ("A", 0.5): (0.1, 0.8), ("A", 0.7): (0.04, 0.7)}
ERRORS |= {("B", 0.3): (0.1, 0.3), ("B", 0.5): (0.05, 0.2), ("B", 0.7): (0.02, 0.02)}
READS = {("A", 0.3): (0.1, 0.1), ("A", 0.5): (0.2, 0.2), ("A", 0.7): (0.5, 0.98)}
READS |= {("B", 0.3): (0.2, 0.2), ("B", 0.5): (0.3, 0.3), ("B", 0.7): (0.6, 0.97)}


def invoke(*args):
    return CliRunner().invoke(cli.app, ["calibrate", *map(str, args)], env={"COLUMNS": "300"})


def said(result) -> str:
    return " ".join((result.output + result.stderr).replace("│", " ").split())


SMALL = json.dumps({"window": 64, "min_context": 200})
FEW = (
    "--metric",
    "p95",
    "--bands",
    "32",
    "--sinks",
    "0,4",
    "--thresholds",
    "0.3,0.6,0.8",
    "--lag-weights",
    "0",
    "--reuse",
    "anchored",
    "--steps",
    48,
)
