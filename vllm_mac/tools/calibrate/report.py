"""The results of a calibration: the configuration file, JSON, tables and plots."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_mac.config import MacConfig, resolve
from vllm_mac.tools.bench.report import require_matplotlib
from vllm_mac.tools.calibrate.choose import Choice, Chooser, Rule, chosen_counts, outcome, single
from vllm_mac.tools.calibrate.grid import PAPER, Candidate
from vllm_mac.tools.calibrate.measured import METRICS, Measured, figures

CHOSEN, HELD_OUT = 0, 1
_METRIC = {"output": "squared error after W_O over the residual's"}  # others are of the relative error
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
    "heads hit, KV read: percent of heads and steps, and of what full attention reads. p50, p95, p99: relative error of the attention "
    "output of heads that hit (upper edge of a bin of 3.7 %); mean: over all heads, exact ones included. output, where it was "
    "measured: squared error of the layer's output after W_O over the squared norm of the residual, mean over tokens. lag: mean "
    "tokens between step and match. chain: mean hits since the exact read. samples: heads and steps that hit; neighbouring ones are alike."
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def collect(measured: Measured, rule: Rule, budget: float | None, saving: float | None, environment: dict) -> dict:
    """Everything that is reported, as JSON has it. One of budget and saving is given.

    Raises CalibrateError where no layer can be served within the budget, or the saving is out of reach.
    """
    config, about = resolve(measured.source["mac"], {}), measured.source | {"command": environment["command"]}
    chooser = Chooser(measured, rule)
    if saving is not None:
        choice, budget = chooser.saving(saving)
    else:
        choice = chooser.best(budget)
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
    """Numbers as JSON has them: no NaN, no NumPy."""
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
    """Of the chosen setting, each layer's figures at every threshold, over all prompts."""
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


def config_with(
    names: Sequence[str], indices: Sequence[int], thresholds: Sequence[float | None], keys: dict, base: MacConfig
) -> dict:
    """Keys of MAC: `keys`, a threshold for each layer (None: exact), and others of the base that are not the default."""
    defaults = MacConfig().model_dump(mode="json")
    kept = {key: value for key, value in base.model_dump(mode="json").items() if value != defaults[key]}
    # An index says it shorter, where it says it at all.
    pattern = indices if len(set(indices)) == len(indices) else names
    served = {p: t for p, t in zip(pattern, thresholds, strict=True) if t is not None}
    left = [p for p, t in zip(pattern, thresholds, strict=True) if t is None]
    layers = {"exclude": [*base.layers.exclude, *left], "threshold": served}
    if base.layers.include is not None:
        layers = {"include": list(base.layers.include)} | layers
    found = {
        "window": base.window,
        "min_context": base.min_context,
        **keys,
        "threshold": max(served.values()),
        "layers": layers,
    }
    return found | {key: value for key, value in kept.items() if key not in found}


def write_config(results: dict, path: Path) -> None:
    """The YAML file, checked by the reader of such files."""
    about = results["about"]
    rule, tokens = about["rule"], about["prompt_tokens"]
    bounded = _METRIC.get(rule["metric"], f"{rule['metric']} of each layer's relative attention error")
    said = [
        f"prompts: {about['prompts']}; {len(tokens)} of {min(tokens)} to {max(tokens)} tokens, the last {about['grid']['steps']} decoded",
        f"budget: {bounded} at most {rule['budget']:.3g}"
        + (f", the least that saves {rule['saving']:.0%} of KV reads" if rule["saving"] is not None else ""),
    ]
    said += [
        _sentence(label, results["all_layers"][half])
        for label, half in (("expected", "chosen"), ("on held-out prompts", "held_out"))
        if half in results["all_layers"]
    ]
    if "held_out" not in results["all_layers"]:
        said.append("one prompt only: nothing was held out, so the figures flatter the choice")
    write_yaml(about, said, results["config"], path)


def write_yaml(about: dict, said: list[str], config: dict, path: Path) -> None:
    """A file of MAC's keys, with what it comes from and `said` as comments; checked by the reader of such files."""
    env = about["environment"]
    lines = [
        "MAC attention, calibrated.", f"model: {about['model']}", f"command: {about['command']}",
        *([] if about["command"] == env["command"] else [f"measured by: {env['command']}"]),
        f"on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}, {env['timestamp']}", *said,
    ]  # fmt: skip
    text = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n" + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    resolve({"config": str(part)}, {})
    part.replace(path)


def _sentence(label: str, found: dict) -> str:
    errors = ", ".join(f"{key} {_number(found[key])}" for key in METRICS if key in found)
    return (
        f"{label}, all layers: {found['read']:.1%} of KV tokens read, {found['hits']:.1%} of heads hit, error {errors}"
    )


def save(results: dict, path: Path) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def tables(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
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
    """What a reader must know first, in sentences."""
    rule, tokens = results["about"]["rule"], results["about"]["prompt_tokens"]
    halves = results["all_layers"]
    said = [
        f"{len(tokens)} prompts, {results['about']['candidates']} candidates; {rule['metric']} of each layer at most {rule['budget']:.3g}"
    ]
    said += [
        _sentence({"chosen": "Where it was chosen", "held_out": "Held out"}[half], found)
        for half, found in halves.items()
    ]
    metric = rule["metric"]
    if "held_out" not in halves:
        said.append("One prompt: nothing was held out, so these figures flatter the choice. Give more prompts.")
    else:
        over = [r for r in results["layers"]["held_out"] if r[metric] is not None and r[metric] > rule["budget"]]
        if over:
            worst = max(over, key=lambda r: r[metric])
            said.append(
                f"On held-out prompts {len(over)} of {len(results['layers']['held_out'])} layers exceed the budget; the worst, "
                f"{worst['layer']}, has {metric} {worst[metric]:.3g}"
            )
    return said


def show(results: dict, console: Console) -> None:
    show_tables(console, tables(results), NOTE, summary(results))


def show_tables(
    console: Console, some: list[tuple[str, list[str], list[list[str]]]], note: str, said: list[str]
) -> None:
    for title, head, rows in some:
        table = Table(title=title, title_justify="left")
        for name in head:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(note, style="dim")
    for line in said:
        console.print(line, markup=False)


def markdown(results: dict) -> str:
    about = results["about"]
    return as_markdown(source(about, about["model"]), about["command"], tables(results), NOTE, summary(results))


def as_markdown(
    origin: str, command: str, some: list[tuple[str, list[str], list[list[str]]]], note: str, said: list[str]
) -> str:
    parts = ["# Calibration of MAC", origin, f"`{command}`", *said, note]
    for title, head, rows in some:
        lines = [head, ["---"] * len(head), *rows]
        parts += [
            f"## {title}",
            "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines),
        ]
    return "\n\n".join(parts) + "\n"


def source(about: dict, model: str) -> str:
    """Where results are from. model: as it is to be called."""
    env = about["environment"]
    return f"{model} on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}"


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
