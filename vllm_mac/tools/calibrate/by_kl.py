"""`vllm-mac calibrate --metric kl`: thresholds by the cost of each layer's reuse in the next token's distribution.

`kl_engine` measures and chooses. This module starts it and reports its results; it imports neither vLLM nor torch,
except to make the prompts.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_mac.tools.calibrate.calibration import Calibration, exact_keys, reply, run_engine
from vllm_mac.tools.calibrate.calibration import prompts as prompts_for
from vllm_mac.tools.calibrate.grid import PAPER, PAPER_WINDOW
from vllm_mac.tools.calibrate.output_files import ShownTable, as_markdown, config_with, show_tables, source, write_yaml
from vllm_mac.tools.eval import requests
from vllm_mac.tools.plotting import require_matplotlib
from vllm_mac.tools.resume import same_place

# -P: import the installed package, not a folder of that name in the working directory.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.calibrate.kl_engine")
# Thresholds change from run to run, which CUDA graphs would not see, and every run prefills whole prompts.
FIXED = {"attention_backend": "MAC", "enforce_eager": True, "enable_prefix_caching": False}
SEQUENCES = 16  # decoded together unless --engine has max_num_seqs
FEW = 1000  # tokens; about one token in a hundred decides a mean KL, and fewer tokens do not show their share
PAPER_SHAPE = {"window": PAPER_WINDOW, "band": PAPER.setting.band, "sink": PAPER.setting.sink}
NOTE = (
    "KL: divergence of the next token's distribution from exact attention's under teacher forcing, in nats: the mean over texts of the mean "
    "over a text's tokens. alone: with every other layer exact. KV read: percent of the KV tokens that full attention of the layer reads."
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a choice must reach; one of the first two is given.

    budget: the largest mean KL, in nats a token. saving: the share of KV reads to save, at the least KL.
    min_saving: a layer that saves a smaller share of its own KV reads stays exact.
    """

    budget: float | None
    saving: float | None
    min_saving: float


def prompts(calibration: Calibration) -> list[requests.Request]:
    """As `calibration.prompts`. A prompt without a reply has its last `grid.steps` tokens decoded, and one before them."""
    steps = calibration.grid.steps
    return prompts_for(calibration, FIXED, lambda request: 0 if reply(calibration, request) else steps + 1)


def measure(
    calibration: Calibration, made: list[requests.Request], goal: Goal, environment: dict,
    report: Callable[[str, int, int | None], None], keep: Path | None = None,
) -> dict:  # fmt: skip
    """Measure, choose, and return the results as plain data for JSON.

    made: the prompts. keep: a file for the measurements, from which a stopped run goes on. Raises CalibrateError where
    the engine fails, where that file is of another run, and where no layer saves KV reads within the budget.
    """
    replies = [reply(calibration, request) for request in made]
    config = calibration.mac
    # As many rings as memory allows, and neither audits nor an error budget that could disturb the measurement.
    mac = exact_keys(config) | {"max_sequences": None, "audit": 0.0, "error_budget": None}
    llm = {
        "model": calibration.model, "max_num_seqs": SEQUENCES,
        "max_model_len": max(len(request.ids) + max(1, most) for request, most in zip(made, replies, strict=True)),
        "seed": calibration.seed, "disable_log_stats": True, **calibration.engine, **FIXED,
        "additional_config": {**calibration.engine.get("additional_config", {}), "mac": mac},
    }  # fmt: skip
    spec = {
        "llm": llm, "steps": calibration.grid.steps, "thresholds": list(calibration.grid.thresholds), "budget": goal.budget, "saving": goal.saving,
        "min_saving": goal.min_saving, "paper": all(getattr(config, key) == value for key, value in PAPER_SHAPE.items()),
        "prompts": [{"ids": list(r.ids), "reply": most} for r, most in zip(made, replies, strict=True)],
        "keep": str(keep.absolute()) if keep else None,
    }  # fmt: skip
    spec["about"] = {
        "llm": llm, "files": _files(Path(calibration.model)), "--steps": calibration.grid.steps, "prompts": requests.digest(made),
        "--reply": replies, "runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER"), **same_place(environment),
    }  # fmt: skip
    found, _ = run_engine(
        COMMAND, spec, lambda path: json.loads(path.read_text(encoding="utf-8")), report, calibration.verbose
    )
    names = list(found["layers"])
    keys = {
        key: getattr(config, key)
        for key in ("band", "sink", "reuse", "lag_weight", "max_chain", "distance", "mass_floor")
    }
    return {
        "about": {
            "model": calibration.model, "prompts": calibration.prompt_source, "prompt_tokens": [len(r.ids) for r in made], "text_tokens": found["texts"],
            "rule": {"metric": "kl", "budget": goal.budget, "saving": goal.saving}, "thresholds_tried": list(calibration.grid.thresholds),
            "mac": config.model_dump(mode="json"), "engine": calibration.engine, "exact_layers": found["exact_layers"],
            "environment": environment, "command": environment["command"],
        },
        "config": config_with(names, list(found["layers"].values()), found["thresholds"], keys, config),
        "layers": [
            {"layer": name, "threshold": threshold, "read": read, "alone": alone}
            for name, threshold, read, alone in zip(names, found["thresholds"], found["chosen_read"], found["options"], strict=True)
        ],
        **{key: found[key] for key in ("predicted", "chosen", "held_out", "curve", "singles", "paper")},
    }  # fmt: skip


def _files(model: Path) -> dict[str, list]:
    """Path, size and time of each file in a model's folder; empty for a model that is not a folder."""
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []
    return {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def write_config(results: dict, path: Path) -> None:
    """Write the YAML file. MAC's own reader checks it first."""
    about, rule = results["about"], results["about"]["rule"]
    aim = (
        f"at most {rule['budget']:g} nats"
        if rule["saving"] is None
        else f"the least that saves {rule['saving']:.0%} of KV reads"
    )
    lines = [
        f"prompts: {about['prompts']}; {len(about['prompt_tokens'])} of {min(about['prompt_tokens'])} to {max(about['prompt_tokens'])} tokens",
        f"budget: mean KL of the next token from exact attention, {aim}", *summary(results),
    ]  # fmt: skip
    write_yaml(about, lines, results["config"], path)


def decoded(calibration: Calibration, made: list[requests.Request]) -> int:
    """The most tokens that the choice can be made from: half of the prompts' replies, or of their ends."""
    return sum(reply(calibration, request) or calibration.grid.steps for request in made[::2])


def few(tokens: int) -> str | None:
    """A warning where `tokens` are too few to choose from, else None."""
    if tokens >= FEW:
        return None
    return f"{tokens} tokens to choose from are few, and the worst of them decide a mean KL: give at least {FEW}, with --samples, --reply or --steps"


def summary(results: dict) -> list[str]:
    chosen, held = results["chosen"], results["held_out"]
    lines = [
        f"where it was chosen: KL {chosen['kl']:.3g}, {chosen['read']:.1%} of KV tokens read ({chosen['tokens']} tokens decoded)"
    ]
    if warning := few(chosen["tokens"]):
        lines.append(warning)
    if held is None:
        return [*lines, "one prompt only: nothing was held out, so these figures are too favourable"]
    lines.append(
        f"on held-out prompts: KL {held['kl']:.3g}, {held['read']:.1%} of KV tokens read ({held['tokens']} tokens decoded)"
    )
    budget = results["about"]["rule"]["budget"]
    if budget is not None and held["kl"] > budget:
        lines.append(
            f"held-out prompts exceed the budget of {budget:g} {held['kl'] / budget:.1f} times: give more prompts, or a smaller budget"
        )
    return lines


def tables(results: dict) -> list[ShownTable]:
    """Title, head and rows of each table."""
    number = lambda x: f"{x:.3g}"
    rows = []
    for layer in results["layers"]:
        alone = next(o for o in layer["alone"] if o["threshold"] == layer["threshold"])
        shown = "exact" if layer["threshold"] is None else f"{layer['threshold']:g}"
        loosest = layer["alone"][-1]
        rows.append([
            layer["layer"], shown, f"{100 * layer['read']:.1f}", number(alone["cost"]),
            f"{number(loosest['cost'])} at {loosest['threshold']:g}" if loosest["threshold"] is not None else "-",
        ])  # fmt: skip
    found = [("The choice", ["layer", "threshold", "KV read", "KL alone", "KL alone, loosest tried"], rows)]
    rows = [["the file written", *_figures(next(c for c in results["curve"] if c["chosen"]))]]
    rows += [[f"one threshold, {some['threshold']:g}", *_figures(some)] for some in results["singles"]]
    if results["paper"] is not None:
        rows.append(["the paper's setting", *_figures(results["paper"])])
    kind = "Prompts it was chosen by" if results["held_out"] is None else "Held-out prompts"
    return [*found, (kind, ["", "KV read", "KL", "largest KL", "same likeliest token"], rows)]


def _figures(some: dict) -> list[str]:
    return [f"{100 * some['read']:.1f}", f"{some['kl']:.3g}", f"{some['kl_max']:.3g}", f"{100 * some['same_best']:.2f}"]


def show(results: dict, console: Console) -> None:
    show_tables(console, tables(results), NOTE, summary(results))


def markdown(results: dict) -> str:
    return as_markdown(_source(results), results["about"]["command"], tables(results), NOTE, summary(results))


def _source(results: dict) -> str:
    return source(results["about"], Path(results["about"]["model"]).name)


def plot(results: dict, path: Path) -> None:
    """Divergence against KV reads, and what each layer costs by itself. Needs matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    place = lambda some: [(100 * one["read"], one["kl"]) for one in some if one["kl"] > 0]
    curves: list[tuple[list, dict[str, Any], str]] = [
        (results["singles"], {"marker": ".", "ls": "--", "color": "C0", "lw": 1}, "one threshold for all layers"),
        (results["curve"], {"marker": "o", "color": "C2", "ms": 4}, "thresholds by layer"),
        ([results["paper"]] if results["paper"] else [], {"marker": "D", "ls": "", "color": "C3", "ms": 9}, "the paper's: 0.45, chained, nearest"),
        ([c for c in results["curve"] if c["chosen"]], {"marker": "*", "ls": "", "color": "C2", "ms": 16, "mec": "black"}, "the file written"),
    ]  # fmt: skip
    for some, style, label in curves:
        if points := sorted(place(some)):  # a logarithmic axis has no 0
            axes.plot(*zip(*points), **style, label=label)
    kind = "the prompts chosen by" if results["held_out"] is None else "held-out prompts"
    axes.set(
        xlabel="KV tokens read, % of full attention",
        ylabel="KL, nats a token",
        yscale="log",
        title=f"Measured on {kind}",
    )
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=8)
    axes = figure.add_subplot(1, 2, 2)
    for i, layer in enumerate(results["layers"]):
        if points := [(100 * o["read"], o["cost"]) for o in layer["alone"] if o["cost"] > 0]:
            color = f"C{i}" if len(results["layers"]) <= 10 else None
            line = axes.plot(*zip(*sorted(points)), ".-", lw=1, color=color, label=str(i))[0]
            chosen = [
                (100 * o["read"], o["cost"])
                for o in layer["alone"]
                if o["threshold"] == layer["threshold"] and o["cost"] > 0
            ]
            if chosen:
                axes.plot(*chosen[0], "o", color=line.get_color())
    axes.set(
        xlabel="KV tokens read by the layer, %",
        ylabel="KL, nats a token",
        yscale="log",
        title="Each layer alone, all others exact",
    )
    axes.grid(alpha=0.2, which="both")
    if len(results["layers"]) <= 20:
        axes.legend(fontsize=7, ncols=2, title="layer")
    figure.supxlabel(_source(results), fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
