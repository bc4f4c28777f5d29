"""The results of a run as tables (terminal and Markdown) and plots. Scores and shares in percent."""

import math
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_mac.bench.report import cell, require_matplotlib
from vllm_mac.eval.results import EXACT

Column = tuple[str, Callable[[dict], str]]


def _percent(row: dict, key: str) -> str:
    return f"{100 * row[key]:.1f}"


def _nats(row: dict, key: str) -> str:
    return f"{row[key]:.2g}"


def _scored(row: dict) -> str:
    return f"{_percent(row, 'score')} ({_percent(row, 'score_low')} to {_percent(row, 'score_high')})"


def _difference(row: dict) -> str:
    points = {key: f"{100 * row[key] + 0.0:+.1f}" for key in ("difference", "difference_low", "difference_high") if key in row}
    spread = f"{points['difference_low']} to {points['difference_high']}" if "difference_low" in row else "on each"
    return f"{points['difference']} ({spread})"


CONFIGURATION: Column = ("configuration", lambda r: r["configuration"])
WHERE: list[Column] = [
    ("tasks", lambda r: r.get("task") or r["group"]),
    ("length", lambda r: str(r["length"] or "-")),
    ("prompts", lambda r: str(r["requests"])),
]
SCORES: list[Column] = [("score", _scored), ("from exact", _difference)]
FIGURES: list[Column] = [
    *SCORES,
    ("same answers", lambda r: _percent(r, "same_answers")),
    ("KL mean", lambda r: _nats(r, "kl_mean")),
    ("KL p99", lambda r: _nats(r, "kl_p99")),
    ("same best token", lambda r: _percent(r, "same_best")),
    ("heads hit", lambda r: _percent(r, "hit_rate")),
    ("KV read", lambda r: _percent(r, "read_share")),
]
LAYER: list[Column] = [
    CONFIGURATION,
    ("layer", lambda r: r["layer"]),
    ("heads hit", lambda r: _percent(r, "hit_rate")),
    ("KV read", lambda r: _percent(r, "read_share")),
    *((f"error {q}", lambda r, q=q: _nats(r, f"error_{q}")) for q in ("p50", "p95", "p99")),
]
NOTE = (
    "Percent, except KL (nats) and error. score: mean, 95 % interval (Wilson). from exact: points on the same prompts, "
    "95 % interval (paired bootstrap). same answers: all greedy tokens are exact's. KL: of the next token from exact's, under "
    "teacher forcing. heads hit, KV read: in decoding, of all heads and of what full attention reads."
)


def tables(results: dict) -> list[tuple[str, list[Column], list[dict]]]:
    """Title, columns and rows of each table."""
    layers = [
        {"configuration": name, "layer": layer, **figures}
        for name, some in results["layers"].items()
        for layer, figures in some.items()
    ]
    places = list(dict.fromkeys((row["group"], row["length"]) for row in results["rows"]))
    by_place = sorted(results["rows"], key=lambda row: places.index((row["group"], row["length"])))
    return [
        ("All prompts", [CONFIGURATION, WHERE[-1], *FIGURES], results["totals"]),
        ("By tasks and length", [*WHERE, CONFIGURATION, *FIGURES], by_place),
        ("By task", [*WHERE, CONFIGURATION, *SCORES], sorted(results["tasks"], key=lambda r: (r["task"], r["length"] or 0))),
        ("By layer", LAYER, layers),
    ]


def _source(results: dict) -> str:
    env = results["environment"]
    model = Path(results["configuration"]["model"]).name
    return f"{model} on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}"


def show(results: dict, console: Console) -> None:
    """The first two tables; the others are in results.md."""
    for title, columns, rows in tables(results)[:2]:
        table = Table(title=f"{title}: {_source(results)}", title_justify="left")
        for name, _ in columns:
            table.add_column(name, justify="right", no_wrap=True)
        last = None
        for row in rows:
            place = row.get("group"), row.get("length")
            if last not in (None, place):
                table.add_section()
            last = place
            table.add_row(*(escape(cell(read, row)) for _, read in columns))
        console.print(table)
    for name, error in results["errors"].items():
        console.print(f"{name}: {error.splitlines()[-1]}", style="red", markup=False, soft_wrap=True)
    console.print(NOTE, style="dim")


def markdown(results: dict) -> str:
    parts = ["# MAC against exact attention", _source(results), f"`{results['environment']['command']}`", NOTE]
    for title, columns, rows in tables(results):
        if rows:
            lines = [[name for name, _ in columns], ["---"] * len(columns)]
            lines += [[cell(read, row).replace("|", "\\|") for _, read in columns] for row in rows]
            parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += [f"{name} gave no figures: {error.splitlines()[-1]}" for name, error in results["errors"].items()]
    return "\n\n".join(parts) + "\n"


def write(results: dict, folder: Path) -> list[Path]:
    """results.md and the plots that there is something to show in. Needs the extra `bench`."""
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    drawings = {"scores": scores, "layers": by_layer, "heads": by_head, "histograms": histograms, "divergence": divergence}
    written = [folder / "results.md"]
    for name, draw in drawings.items():
        figure = draw(results)
        if figure is not None:
            written.append(folder / f"{name}.png")
            save(figure, results, written[-1])
    return written


def save(figure, results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(_source(results), fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float):
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _names(results: dict) -> list[str]:
    return [row["configuration"] for row in results["totals"]]


def scores(results: dict):
    """Bars of each configuration's score by task, one panel for each length; None without scores."""
    rows = [row for row in results["tasks"] if "score" in row]
    lengths = sorted({row["length"] or 0 for row in rows})
    if not rows:
        return None
    names = _names(results)
    figure = _figure(max(6, 0.9 * len({r["task"] for r in rows}) + 2), 3.2 * len(lengths))
    for i, length in enumerate(lengths):
        axes = figure.add_subplot(len(lengths), 1, i + 1)
        some = [row for row in rows if (row["length"] or 0) == length]
        tasks = list(dict.fromkeys(row["task"] for row in some))
        for j, name in enumerate(names):
            own = {row["task"]: row for row in some if row["configuration"] == name}
            at = [k + (j - (len(names) - 1) / 2) * 0.8 / len(names) for k, task in enumerate(tasks) if task in own]
            own_rows = [own[task] for task in tasks if task in own]
            height = [100 * row["score"] for row in own_rows]
            # An end that is the score itself can lie beyond it by rounding.
            spread = [
                [100 * max(row["score"] - row["score_low"], 0.0) for row in own_rows],
                [100 * max(row["score_high"] - row["score"], 0.0) for row in own_rows],
            ]
            color = "0.6" if name == EXACT else f"C{j - 1}"
            axes.bar(at, height, 0.8 / len(names), yerr=spread, label=name, color=color, error_kw={"lw": 0.8})
        axes.set(xticks=range(len(tasks)), ylim=(0, 105), ylabel="score, %", title=f"{length} tokens" if length else "from files")
        axes.set_xticklabels([task.replace("_", "\n") for task in tasks], fontsize=8)
        axes.grid(axis="y", alpha=0.2)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, ncols=len(names), loc="outside upper center")
    return figure


def by_layer(results: dict):
    """Hit rate by layer, and the audited error (p50 with p95 and p99 above it) where it was counted."""
    layers = {name: list(some.values()) for name, some in results["layers"].items() if some}
    if not layers:
        return None
    audited = any("error_p50" in row for rows in layers.values() for row in rows)
    figure = _figure(6 * (1 + audited), 4)
    hits = figure.add_subplot(1, 1 + audited, 1)
    for j, (name, rows) in enumerate(layers.items()):
        hits.plot([100 * (row["hit_rate"] or 0) for row in rows], "o-", color=f"C{j}", label=name)
    hits.set(xlabel="layer", ylabel="heads that hit, %", ylim=(0, 102))
    if audited:
        errors = figure.add_subplot(1, 2, 2)
        for j, (name, rows) in enumerate(layers.items()):
            for key, style in (("error_p50", "o-"), ("error_p95", "s--"), ("error_p99", "^:")):
                at = [i for i, row in enumerate(rows) if row.get(key) is not None]
                # Colours are those of the other panel, and styles are named once.
                label = None if j else key[6:]
                errors.plot(at, [rows[i][key] for i in at], style, color=f"C{j}", ms=4, label=label)
        errors.set(xlabel="layer", ylabel="relative error of heads that hit", yscale="log")
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.2, which="both")
        axes.legend(fontsize=8)
    if audited:
        for line in errors.get_legend().get_lines():
            line.set_color("black")
    return figure


def by_head(results: dict):
    """Hit rate of each query head, one map for each configuration; None where nothing was audited."""
    maps = {
        name: [row["head_hit_rates"] for row in some.values() if "head_hit_rates" in row] for name, some in results["layers"].items()
    }
    maps = {name: rows for name, rows in maps.items() if rows and len({len(row) for row in rows}) == 1}
    if not maps:
        return None
    figure = _figure(1 + 4 * len(maps), 4)
    for i, (name, rows) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), i + 1)
        image = axes.imshow([[100 * rate for rate in row] for row in rows], vmin=0, vmax=100, aspect="auto", cmap="viridis")
        axes.set(title=name, xlabel="query head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=figure.axes, label="steps that hit, %")
    return figure


def histograms(results: dict):
    """Distributions of errors, lags and chain lengths; None where nothing was audited."""
    found = {name: some for name, some in results["histograms"].items() if some}
    kinds = [kind for kind in ("error", "lag", "chain") if any(kind in some for some in found.values())]
    if not kinds:
        return None
    labels = {"error": "relative error", "lag": "lag, tokens", "chain": "hits since the exact read"}
    figure = _figure(5 * len(kinds), 4)
    for i, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), i + 1)
        for j, (name, some) in enumerate(found.items()):
            edges, shares = [], []
            passed, total = 0, sum(count for _, count in some.get(kind, ()))
            for edge, count in some.get(kind, ()):
                if edge is None or passed == total:  # above the last edge, or above all that was counted
                    break
                passed += count
                edges.append(edge)
                shares.append(100 * passed / total)
            axes.plot(edges, shares, color=f"C{j}", label=name)
        axes.set(xscale="log", xlabel=labels[kind], ylabel="hits up to there, %", ylim=(0, 102))
        axes.grid(alpha=0.2, which="both")
        axes.legend(fontsize=8)
    return figure


def divergence(results: dict):
    """Share of prompts whose tokens are still exact's, by position; None without prompts to compare."""
    if not results["divergence"]:
        return None
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    last = 1 + max((p for some in results["divergence"].values() for p in some if p is not None), default=0)
    for j, (name, positions) in enumerate(results["divergence"].items()):
        ends = sorted(math.inf if position is None else position for position in positions)
        x, y = [1.0], [100.0]
        for i, end in enumerate(ends, 1):
            if end < math.inf:
                x.append(1.0 + end)
                y.append(100 * (1 - i / len(ends)))
        axes.step([*x, 1.0 + last], [*y, y[-1]], where="post", color=f"C{j}", label=name)
    axes.set(xscale="log", xlabel="tokens generated", ylabel="prompts with exact's tokens so far, %", ylim=(0, 102))
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=8)
    return figure

