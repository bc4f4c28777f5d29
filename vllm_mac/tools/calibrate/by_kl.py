"""`vllm-mac calibrate --metric kl`: thresholds by what each layer's reuse costs in the next token's distribution.

This side knows neither vLLM nor torch beyond what makes the prompts: `divergence` measures and chooses.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from vllm_mac.tools.bench.report import require_matplotlib
from vllm_mac.tools.calibrate.grid import PAPER, PAPER_WINDOW
from vllm_mac.tools.calibrate.report import as_markdown, config_with, show_tables, source, write_yaml
from vllm_mac.tools.calibrate.run import Options, exact_keys, reply, run_engine
from vllm_mac.tools.eval import requests
from vllm_mac.tools.runs import same_place

# -P: the installed package, not a folder of that name where the command happens to run.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.calibrate.divergence")
# Thresholds change from run to run, which graphs would not see, and every run reads whole prompts.
FIXED = {"attention_backend": "MAC", "enforce_eager": True, "enable_prefix_caching": False}
SEQUENCES = 16  # decoded together unless --engine says otherwise
FEW = 1000  # tokens: a mean KL hangs on about one token in a hundred, whose share fewer do not tell
PAPER_SHAPE = {"window": PAPER_WINDOW, "band": PAPER.setting.band, "sink": PAPER.setting.sink}
NOTE = (
    "KL: divergence of the next token's distribution from exact attention's under teacher forcing, in nats; mean over a text's tokens, and "
    "of texts, which weigh alike. alone: with every "
    "other layer exact. KV read: percent of what full attention of the layer reads."
)


def measure(
    options: Options, made: list[requests.Request], budget: float | None, saving: float | None, min_saving: float, environment: dict,
    tell: Callable[[str, int, int | None], None], keep: Path | None = None,
) -> dict:  # fmt: skip
    """Everything that is reported, as JSON has it. One of budget, in nats a token, and saving is given.

    keep: file for what was measured, with which a stopped run goes on. Raises CalibrateError where the engine
    fails, where that file is another run's, and where no layer can be served within the budget.
    """
    replies = [reply(options, request) for request in made]
    config = options.mac
    # As many rings as there is room for, and nothing that would count or pause beside the measurement.
    mac = exact_keys(config) | {"max_sequences": None, "audit": 0.0, "error_budget": None}
    llm = {
        "model": options.model, "max_num_seqs": SEQUENCES,
        "max_model_len": max(len(request.ids) + max(1, most) for request, most in zip(made, replies, strict=True)),
        "seed": options.seed, "disable_log_stats": True, **options.engine, **FIXED,
        "additional_config": {**options.engine.get("additional_config", {}), "mac": mac},
    }  # fmt: skip
    spec = {
        "llm": llm, "steps": options.grid.steps, "thresholds": list(options.grid.thresholds), "budget": budget, "saving": saving,
        "min_saving": min_saving, "paper": all(getattr(config, key) == value for key, value in PAPER_SHAPE.items()),
        "prompts": [{"ids": list(r.ids), "reply": most} for r, most in zip(made, replies, strict=True)],
        "keep": str(keep.absolute()) if keep else None,
    }  # fmt: skip
    spec["about"] = {
        "llm": llm, "files": _files(Path(options.model)), "--steps": options.grid.steps, "prompts": requests.digest(made),
        "--reply": replies, "runner": os.environ.get("VLLM_USE_V2_MODEL_RUNNER"), **same_place(environment),
    }  # fmt: skip
    found, _ = run_engine(
        COMMAND, spec, lambda path: json.loads(path.read_text(encoding="utf-8")), tell, options.verbose
    )
    said = str(options.prompts) if options.prompts else f"{', '.join(options.tasks)}, seed {options.seed}"
    names = list(found["layers"])
    keys = {
        key: getattr(config, key)
        for key in ("band", "sink", "reuse", "lag_weight", "max_chain", "distance", "mass_floor")
    }
    return {
        "about": {
            "model": options.model, "prompts": said, "prompt_tokens": [len(r.ids) for r in made], "text_tokens": found["texts"],
            "rule": {"metric": "kl", "budget": budget, "saving": saving}, "thresholds_tried": list(options.grid.thresholds),
            "mac": config.model_dump(mode="json"), "engine": options.engine, "exact_layers": found["exact_layers"],
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
    """Where a model's folder is, and size and time of its files; empty for a model that is no folder."""
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []
    return {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def write_config(results: dict, path: Path) -> None:
    """The YAML file, checked by the reader of such files."""
    about, rule = results["about"], results["about"]["rule"]
    aim = (
        f"at most {rule['budget']:g} nats"
        if rule["saving"] is None
        else f"the least that saves {rule['saving']:.0%} of KV reads"
    )
    said = [
        f"prompts: {about['prompts']}; {len(about['prompt_tokens'])} of {min(about['prompt_tokens'])} to {max(about['prompt_tokens'])} tokens",
        f"budget: mean KL of the next token from exact attention, {aim}", *summary(results),
    ]  # fmt: skip
    write_yaml(about, said, results["config"], path)


def decoded(options: Options, made: list[requests.Request]) -> int:
    """Most tokens that the choice can be made from: half of the prompts' replies, or of their ends."""
    return sum(reply(options, request) or options.grid.steps for request in made[::2])


def few(tokens: int) -> str | None:
    """A warning where so many tokens are few to choose from."""
    if tokens >= FEW:
        return None
    return f"{tokens} tokens to choose from are few, and a mean KL hangs on the worst of them: give at least {FEW}, by --samples, --reply or --steps"


def summary(results: dict) -> list[str]:
    chosen, held = results["chosen"], results["held_out"]
    said = [
        f"where it was chosen: KL {chosen['kl']:.3g}, {chosen['read']:.1%} of KV tokens read ({chosen['tokens']} tokens decoded)"
    ]
    if warning := few(chosen["tokens"]):
        said.append(warning)
    if held is None:
        return [*said, "one prompt only: nothing was held out, so the figures flatter the choice"]
    said.append(
        f"on held-out prompts: KL {held['kl']:.3g}, {held['read']:.1%} of KV tokens read ({held['tokens']} tokens decoded)"
    )
    budget = results["about"]["rule"]["budget"]
    if budget is not None and held["kl"] > budget:
        said.append(
            f"held-out prompts exceed the budget of {budget:g} {held['kl'] / budget:.1f} times: give more prompts, or a smaller budget"
        )
    return said


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    number = lambda x: f"{x:.3g}"
    rows = []
    for layer in results["layers"]:
        alone = next((o for o in layer["alone"] if o["threshold"] == layer["threshold"]), None)
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
    for some, style, label in (
        (results["singles"], {"marker": ".", "ls": "--", "color": "C0", "lw": 1}, "one threshold for all layers"),
        (results["curve"], {"marker": "o", "color": "C2", "ms": 4}, "thresholds by layer"),
        ([results["paper"]] if results["paper"] else [], {"marker": "D", "ls": "", "color": "C3", "ms": 9}, "the paper's: 0.45, chained, nearest"),
        ([c for c in results["curve"] if c["chosen"]], {"marker": "*", "ls": "", "color": "C2", "ms": 16, "mec": "black"}, "the file written"),
    ):  # fmt: skip
        if points := sorted(place(some)):  # without any divergence there is no place on a logarithmic axis
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
