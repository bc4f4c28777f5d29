"""Plots of the rows of one benchmark."""

from pathlib import Path

from vllm_mac.tools.bench import BenchError
from vllm_mac.tools.bench.row_files import middle_rounds
from vllm_mac.tools.bench.row_tables import engine_name, kind
from vllm_mac.tools.plotting import require_matplotlib


def plot(rows: list[dict], path: str | Path) -> None:
    """A PNG (or what the suffix names) of rows of one benchmark. Needs matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = middle_rounds([row for row in rows if not row.get("error")])
    if not rows:
        raise BenchError("plot: no rows to plot")
    kinds = {kind(row) for row in rows}
    if len(kinds) > 1:
        raise BenchError(f"plot: rows of {' and '.join(sorted(kinds))}; choose files of one benchmark")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = (_plot_kernel if kinds == {"kernel"} else _plot_bars)(rows, Figure)
    last = rows[-1]
    source = f"{last['gpu'] or 'CPU'}, vLLM {last['vllm']}, torch {last['torch']}, commit {last['commit']}"
    figure.supxlabel(source, fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _plot_kernel(rows: list[dict], Figure):
    shapes = sorted({(r["heads"], r["context"]) for r in rows})
    figure = Figure(figsize=(6.5 * len(shapes), 5), layout="constrained")
    for i, (heads, context) in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), i + 1)
        some = [r for r in rows if (r["heads"], r["context"]) == (heads, context)]
        for j, batch in enumerate(sorted({r["batch"] for r in some})):
            color = f"C{j}"
            mac = sorted(
                (r for r in some if r["batch"] == batch and r["engine"] == "MAC"), key=lambda r: r["heads_matched"]
            )
            x = [r["heads_matched"] for r in mac]
            if mac:
                axes.plot(x, [r["p50"] for r in mac], "o-", color=color, label=f"MAC, batch {batch}")
                axes.fill_between(x, [r["p20"] for r in mac], [r["p80"] for r in mac], color=color, alpha=0.25)
                axes.plot(x, [r["floor_ms"] for r in mac], ":", color=color, lw=1, label="floor" if j == 0 else None)
            exact = [r["p50"] for r in some if r["batch"] == batch and r["engine"] != "MAC"]
            if exact:
                axes.axhline(min(exact), ls="--", color=color, lw=1, label="best exact" if j == 0 else None)
        axes.set(yscale="log", xlabel="share of heads with a match", ylabel="ms per layer and step")
        axes.set_title(f"{heads} heads, {context} tokens")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
    return figure


def _plot_bars(rows: list[dict], Figure):
    place = lambda r: (r.get("heads", ""), r.get("head_size", 0), r["context"], r["batch"])
    shapes = sorted(set(map(place, rows)))
    step = "layer and step" if kind(rows[0]) == "index" else "output token"
    figure = Figure(figsize=(1.5 + 3 * len(shapes), 4.5), layout="constrained")
    for i, shape in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), i + 1)
        heads, size, context, batch = shape
        some = [r for r in rows if place(r) == shape]
        height = [r["p50"] for r in some]
        spread = [[r["p50"] - r["p20"] for r in some], [r["p80"] - r["p50"] for r in some]]
        axes.bar(
            [engine_name(r) for r in some],
            height,
            yerr=spread,
            color=[f"C{int(r['engine'] != 'MAC')}" for r in some],
            capsize=4,
        )
        of = f"{heads} heads of {size}, " if heads else ""
        axes.set(ylabel=f"ms per {step}", title=f"{of}batch {batch}, {context} tokens")
        axes.tick_params(axis="x", labelsize=8)
    return figure
