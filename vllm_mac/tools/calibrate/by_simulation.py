"""`vllm-mac calibrate` by a simulated metric: the engine that simulates, the choice, and its results.

It imports neither vLLM nor torch, except to make the prompts.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from vllm_mac.config import MacConfig, resolve
from vllm_mac.tools.calibrate.calibration import Calibration, exact_keys, reply, run_engine
from vllm_mac.tools.calibrate.calibration import prompts as prompts_for
from vllm_mac.tools.calibrate.choose import Choice, Chooser, Rule, chosen_counts, outcome, single
from vllm_mac.tools.calibrate.grid import PAPER, PAPER_WINDOW, Candidate
from vllm_mac.tools.calibrate.measured import METRICS, Measured, figures
from vllm_mac.tools.calibrate.output_files import ShownTable, as_markdown, config_with, show_tables, source, write_yaml
from vllm_mac.tools.eval import requests
from vllm_mac.tools.plotting import require_matplotlib

# -P: import the installed package, not a folder of that name in the working directory.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.calibrate.simulation_engine")
# With other values the engine would not see the layers, or not one whole prompt at a time.
FIXED = {"attention_backend": "MAC", "max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False}
CHOSEN, HELD_OUT = 0, 1
_METRIC = {"output": "squared error after W_O over the residual's"}  # the other metrics are of the relative error
SHOWN_SETTINGS = 8
COLUMNS = (
    ("layer", lambda r: r["layer"]),
    ("threshold", lambda r: "exact" if r["threshold"] is None else f"{r['threshold']:g}"),
    ("heads hit", lambda r: f"{100 * r['hits']:.1f}"),
    ("KV read", lambda r: f"{100 * r['read']:.1f}"),
    ("p50", lambda r: _number(r["p50"])),
    ("p95", lambda r: _number(r["p95"])),
    ("p99", lambda r: _number(r["p99"])),
    ("mean", lambda r: _number(r["mean"])),
    ("output", lambda r: _number(r["output"])),
    ("lag", lambda r: _number(r["lag"])),
    ("chain", lambda r: _number(r["chain"])),
    ("samples", lambda r: str(r["samples"])),
)
NOTE = (
    "heads hit: percent of heads and steps. KV read: percent of the KV tokens that full attention reads. p50, p95, p99: relative error of the "
    "attention output of heads that hit (upper edge of a bin of 3.7 %); mean: over all heads, exact ones included. output, where it was "
    "measured: squared error of the layer's output after W_O over the squared norm of the residual, mean over tokens. lag: mean tokens between "
    "step and match. chain: mean hits since the exact read. samples: heads and steps that hit; neighbouring steps are not independent."
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _with_paper(calibration: Calibration, made: list[requests.Request]) -> bool:
    """Whether the paper's setting can be tried too: it needs its own window, and prompts that are long enough for its band."""
    needed = calibration.grid.least(paper=True)
    return calibration.grid.window == PAPER_WINDOW and all(len(request.ids) >= needed for request in made)


def prompts(calibration: Calibration) -> list[requests.Request]:
    """As `calibration.prompts`; the last `grid.steps` positions of each are decoded."""
    return prompts_for(calibration, FIXED, lambda request: calibration.grid.steps)


def measure(
    calibration: Calibration,
    made: list[requests.Request],
    environment: dict,
    report: Callable[[str, int, int | None], None],
) -> Measured:
    """Run the engine on the prompts. report(what, advance, None): what happens now, and prompts finished since the last call.

    Raises CalibrateError where the engine fails.
    """
    replies = [reply(calibration, request) for request in made]
    llm = {
        "model": calibration.model,
        # One token follows the prefill: the last of the reply, or the one token that vLLM must generate.
        "max_model_len": max(len(request.ids) + max(1, most) for request, most in zip(made, replies, strict=True)),
        "gpu_memory_utilization": 0.5,  # the rest is for captured tensors and the simulation
        "seed": calibration.seed,
        "disable_log_stats": True,
        **calibration.engine,
        **FIXED,
        "additional_config": {
            **calibration.engine.get("additional_config", {}),
            "mac": exact_keys(calibration.mac) | {"max_sequences": 1},
        },
    }
    spec = {
        "llm": llm, "grid": calibration.grid.as_dict(), "paper": _with_paper(calibration, made), "output": calibration.output,
        "prompts": [{"ids": list(r.ids), "reply": most} for r, most in zip(made, replies, strict=True)],
    }  # fmt: skip
    measured, found = run_engine(COMMAND, spec, Measured.load, report, calibration.verbose)
    source = {
        "model": calibration.model, "prompts": calibration.prompt_source, "mac": calibration.mac.model_dump(mode="json"), "engine": calibration.engine,
        "exact_layers": found["exact"], "environment": environment,
    }  # fmt: skip
    return replace(measured, source=source)


def collect(measured: Measured, rule: Rule, budget: float | None, saving: float | None, environment: dict) -> dict:
    """Choose, and return the results as plain data for JSON. One of budget and saving is given.

    Raises CalibrateError where no layer saves KV reads within the budget, or no choice reaches the saving.
    """
    config, about = (
        resolve({"rule": "match"} | measured.source["mac"], {}),
        measured.source | {"command": environment["command"]},
    )
    chooser = Chooser(measured, rule)
    if saving is not None:
        choice, budget = chooser.saving(saving)
    elif budget is not None:
        choice = chooser.best(budget)
    else:
        raise ValueError("neither budget nor saving is given")
    halves = {"chosen": CHOSEN, "held_out": HELD_OUT} if measured.held_out else {"chosen": CHOSEN}
    index = {candidate: i for i, candidate in enumerate(measured.candidates)}
    singles = [(c, single(measured, c)) for c in measured.candidates if c.setting in (choice.setting, PAPER.setting)]
    point = lambda some: {half: _plain(outcome(measured, some, number)) for half, number in halves.items()}
    return {
        "about": about | {
            "rule": {"metric": rule.metric, "budget": budget, "saving": saving, "min_saving": rule.min_saving, "min_samples": rule.min_samples},
            "grid": measured.grid.as_dict(), "prompt_tokens": list(measured.tokens), "candidates": len(index),
        },
        "choice": {"setting": choice.setting._asdict(), "thresholds": dict(zip(measured.names, choice.thresholds, strict=True))},
        "config": config_of(measured, choice, config),
        "all_layers": point(choice),
        "paper": point(single(measured, PAPER)) if PAPER in index else None,
        "layers": {
            half: [_row(measured, choice, layer, counts) for layer, counts in enumerate(chosen_counts(measured, choice, number))]
            for half, number in halves.items()
        },
        "heads": _heads(measured, choice),
        "settings": [_setting(measured, some, halves) for some in chooser.ranking(budget)],
        "single_thresholds": [c.setting._asdict() | {"threshold": c.threshold} | point(some) for c, some in singles],
        "budgets": [{"budget": b, **point(some)} for b, some in _budgets(chooser)],
        "by_threshold": _by_threshold(measured, choice),
    }  # fmt: skip


def _plain(found: dict) -> dict:
    """Plain numbers for JSON: no NaN, no NumPy types."""
    whole = ("samples", "longest")
    return {k: int(v) if k in whole else float(v) if np.isfinite(v) else None for k, v in found.items()}


def _row(measured: Measured, choice: Choice, layer: int, counts: dict) -> dict:
    found = _plain(figures({name: value for name, value in counts.items() if name != "heads"}))
    return {
        "layer": measured.names[layer],
        "index": measured.indices[layer],
        "threshold": choice.thresholds[layer],
    } | found


def _heads(measured: Measured, choice: Choice) -> dict[str, list[float]]:
    """Share of steps in which each query head of a layer hit, over all prompts."""
    index = {candidate: i for i, candidate in enumerate(measured.candidates)}
    steps = measured.grid.steps * len(measured.tokens)
    return {
        name: (measured.counts["heads"][:, layer, index[Candidate(choice.setting, threshold)]].sum(0) / steps).tolist()
        for layer, (name, threshold) in enumerate(zip(measured.names, choice.thresholds, strict=True))
        if threshold is not None
    }


def _setting(measured: Measured, choice: Choice, halves: dict) -> dict:
    return {
        "setting": choice.setting._asdict(), "thresholds": list(choice.thresholds),
        **{half: _plain(outcome(measured, choice, number)) for half, number in halves.items()},
    }  # fmt: skip


def _budgets(chooser: Chooser) -> list[tuple[float, Choice]]:
    """The choice at budgets of equal ratio, where it saves anything."""
    found = [(float(budget), chooser.ranking(budget)[0]) for budget in 0.001 * 10 ** (np.arange(25) / 8)]
    return [(budget, choice) for budget, choice in found if any(t is not None for t in choice.thresholds)]


def _by_threshold(measured: Measured, choice: Choice) -> dict:
    """Each layer's figures at every threshold of the chosen setting, over all prompts."""
    some = [i for i, c in enumerate(measured.candidates) if c.setting == choice.setting]
    counts = {
        name: value.sum(0)[:, some] for name, value in measured.counts.items() if name not in ("heads", "longest")
    }
    found = figures(counts | {"longest": measured.counts["longest"].max(0)[:, some]})
    finite = lambda values: [float(v) if np.isfinite(v) else None for v in values]
    return {
        "thresholds": [measured.candidates[i].threshold for i in some],
        "layers": {
            name: {key: finite(found[key][layer]) for key in (*METRICS, "hits", "read") if key in found}
            for layer, name in enumerate(measured.names)
        },
    }


def config_of(measured: Measured, choice: Choice, base: MacConfig) -> dict:
    """Keys of MAC for the choice; others of the base only where they are not the default."""
    return config_with(measured.names, measured.indices, choice.thresholds, choice.setting._asdict(), base)


def write_config(results: dict, path: Path) -> None:
    """Write the YAML file. MAC's own reader checks it first."""
    about = results["about"]
    rule, tokens = about["rule"], about["prompt_tokens"]
    bounded = _METRIC.get(rule["metric"], f"{rule['metric']} of each layer's relative attention error")
    lines = [
        f"prompts: {about['prompts']}; {len(tokens)} of {min(tokens)} to {max(tokens)} tokens, the last {about['grid']['steps']} decoded",
        f"budget: {bounded} at most {rule['budget']:.3g}"
        + (f", the least that saves {rule['saving']:.0%} of KV reads" if rule["saving"] is not None else ""),
    ]
    lines += [
        _sentence(label, results["all_layers"][half])
        for label, half in (("expected", "chosen"), ("on held-out prompts", "held_out"))
        if half in results["all_layers"]
    ]
    if "held_out" not in results["all_layers"]:
        lines.append("one prompt only: nothing was held out, so these figures are too favourable")
    write_yaml(about, lines, results["config"], path)


def _sentence(label: str, found: dict) -> str:
    errors = ", ".join(f"{key} {_number(found[key])}" for key in METRICS if key in found)
    return (
        f"{label}, all layers: {found['read']:.1%} of KV tokens read, {found['hits']:.1%} of heads hit, error {errors}"
    )


def tables(results: dict) -> list[ShownTable]:
    """Title, head and rows of each table."""
    found = []
    titles = {"chosen": "Prompts that the choice was made by", "held_out": "Held-out prompts"}
    for half, rows in results["layers"].items():
        whole = {"layer": "all", "threshold": None, **results["all_layers"][half]}
        columns = [column for column in COLUMNS if column[0] != "output" or "output" in whole]
        cells = [[read(row) for _, read in columns] for row in rows] + [[read(whole) for _, read in columns]]
        cells[-1][1] = ""
        if results["paper"] is not None:
            paper = {"layer": "all, paper's setting", "threshold": PAPER.threshold, **results["paper"][half]}
            cells.append([read(paper) for _, read in columns])
        found.append((titles[half], [name for name, _ in columns], cells))
    last = list(results["all_layers"])[-1]
    rows = [
        [*("-" if value is None else str(value) for value in some["setting"].values()), f"{100 * some[last]['read']:.1f}",
         *(_number(some[last][key]) for key in ("p50", "p95", "p99", "mean")), str(sum(t is None for t in some["thresholds"]))]
        for some in results["settings"][:SHOWN_SETTINGS]
    ]  # fmt: skip
    head = [*results["settings"][0]["setting"], "KV read", "p50", "p95", "p99", "mean", "exact layers"]
    found.append((f"The best settings within the budget ({titles[last].lower()})", head, rows))
    by_share = results["by_threshold"]
    if any("output" in layer for layer in by_share["layers"].values()):
        rows = [
            [
                name,
                *(
                    f"{100 * hit:.0f}: {_number(1e3 * wrong)}"
                    for hit, wrong in zip(layer["hits"], layer["output"], strict=True)
                ),
            ]
            for name, layer in by_share["layers"].items()
        ]
        found.append(
            (
                "Percent of heads hit: 1000 x output, by threshold, chosen setting",
                ["layer", *map(str, by_share["thresholds"])],
                rows,
            )
        )
    return found


def summary(results: dict) -> list[str]:
    """What a reader must know first, as sentences."""
    rule, tokens = results["about"]["rule"], results["about"]["prompt_tokens"]
    halves = results["all_layers"]
    lines = [
        f"{len(tokens)} prompts, {results['about']['candidates']} candidates; {rule['metric']} of each layer at most {rule['budget']:.3g}"
    ]
    lines += [
        _sentence({"chosen": "Where it was chosen", "held_out": "Held out"}[half], found)
        for half, found in halves.items()
    ]
    metric = rule["metric"]
    if "held_out" not in halves:
        lines.append("One prompt: nothing was held out, so these figures are too favourable. Give more prompts.")
    else:
        over = [r for r in results["layers"]["held_out"] if r[metric] is not None and r[metric] > rule["budget"]]
        if over:
            worst = max(over, key=lambda r: r[metric])
            lines.append(
                f"On held-out prompts {len(over)} of {len(results['layers']['held_out'])} layers exceed the budget; the worst, "
                f"{worst['layer']}, has {metric} {worst[metric]:.3g}"
            )
    return lines


def show(results: dict, console: Console) -> None:
    show_tables(console, tables(results), NOTE, summary(results))


def markdown(results: dict) -> str:
    about = results["about"]
    return as_markdown(source(about, about["model"]), about["command"], tables(results), NOTE, summary(results))


def plot(results: dict, path: Path) -> None:
    """Error against KV reads, and error and hits of each layer against the threshold. Needs matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    metric = results["about"]["rule"]["metric"]
    _pareto(figure.add_subplot(1, 3, 1), results, metric)
    _layers(figure.add_subplot(1, 3, 2), results, metric, _METRIC.get(metric, f"{metric} of relative error"), "log")
    _layers(figure.add_subplot(1, 3, 3), results, "hits", "heads that hit, %", "linear")
    about = results["about"]
    figure.supxlabel(source(about, Path(about["model"]).name), fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _pareto(axes, results: dict, metric: str) -> None:
    half = list(results["all_layers"])[-1]
    place = lambda some: (100 * some[half]["read"], some[half][metric])
    usable = lambda some: [place(one) for one in some if one[half][metric]]
    keys = results["choice"]["setting"]
    curves = {
        "one threshold for all layers, paper's setting": (PAPER.setting._asdict(), "C3"),
        "the same, chosen setting": (keys, "C0"),
    }
    for label, (setting, color) in curves.items():
        some = [one for one in results["single_thresholds"] if all(one[key] == value for key, value in setting.items())]
        if points := usable(some):
            axes.plot(*zip(*points), ".--", color=color, lw=1, label=label)
    if points := usable(results["budgets"]):
        axes.plot(*zip(*sorted(points)), "o-", color="C2", ms=4, label="calibrated, by budget")
    if results["paper"] is not None and results["paper"][half][metric]:
        axes.plot(
            *place(results["paper"]), "D", color="C3", ms=9, label=f"the paper's: {PAPER.threshold:g}, chained, nearest"
        )
    axes.plot(*place(results["all_layers"]), "*", color="C2", ms=16, mec="black", label="the file written")
    kind = "held-out prompts" if half == "held_out" else "the prompts chosen by"
    axes.set(
        xlabel="KV tokens read, % of full attention",
        ylabel=f"{_METRIC.get(metric, f'{metric} of relative error')}, all layers",
        yscale="log",
        title=f"Measured on {kind}",
    )
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=8)


def _layers(axes, results: dict, key: str, label: str, scale: str) -> None:
    found = results["by_threshold"]
    chosen = results["choice"]["thresholds"]
    for j, (name, values) in enumerate(found["layers"].items()):
        factor = 100 if key == "hits" else 1
        points = [
            (t, factor * v)
            for t, v in zip(found["thresholds"], values[key], strict=True)
            if v is not None and (v > 0 or scale == "linear")
        ]
        if not points:
            continue
        shade = ("C" + str(j)) if len(found["layers"]) <= 10 else None
        line = axes.plot(*zip(*points), "-", lw=1, color=shade, label=str(results["layers"]["chosen"][j]["index"]))[0]
        axes.plot(*zip(*[p for p in points if p[0] == chosen[name]] or [(np.nan, np.nan)]), "o", color=line.get_color())
    if key == results["about"]["rule"]["metric"]:
        axes.axhline(results["about"]["rule"]["budget"], color="black", ls=":", lw=1)
    axes.set(xlabel="threshold", ylabel=label, yscale=scale, title="Layers, chosen setting, all prompts")
    axes.grid(alpha=0.2, which="both")
    if len(found["layers"]) <= 20:
        axes.legend(fontsize=7, ncols=2, title="layer")
