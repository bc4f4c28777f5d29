"""The plots of a run. Shares and scores in percent, divergence in nats."""

import math
from pathlib import Path

from vllm_mac.tools.eval.results import EXACT, YARDSTICK, source
from vllm_mac.tools.plotting import require_matplotlib

YARD = "black"


def save(figure, results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(source(results), fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float):
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colours(results: dict) -> dict[str, str]:
    """A colour for each of MAC's configurations, the same in every plot."""
    names = [row["configuration"] for row in results["totals"] if row["configuration"] not in (EXACT, YARDSTICK)]
    return {name: f"C{i}" for i, name in enumerate(names)}


def _label(name: str) -> str:
    """A configuration's name in a legend, which names MAC for readers who see only the plot."""
    return name if name in (EXACT, YARDSTICK) else f"MAC ({name})"


def _title(length: int | None, group: str | None = None) -> str:
    where = f"{length} tokens" if length else "from files"
    return f"{group}, {where}" if group else where


def scores(results: dict):
    """Bars of each configuration's score by task, the yardstick's as a marker, one panel for each length; None without scores."""
    rows = [row for row in results["tasks"] if "score" in row]
    lengths = sorted({row["length"] or 0 for row in rows})
    if not rows:
        return None
    colours = {EXACT: "0.6", **_colours(results)}
    figure = _figure(max(6, 0.9 * len({r["task"] for r in rows}) + 2), 3.2 * len(lengths))
    for i, length in enumerate(lengths):
        axes = figure.add_subplot(len(lengths), 1, i + 1)
        some = [row for row in rows if (row["length"] or 0) == length]
        tasks = list(dict.fromkeys(row["task"] for row in some))
        for j, (name, colour) in enumerate(colours.items()):
            own = {row["task"]: row for row in some if row["configuration"] == name}
            at = [k + (j - (len(colours) - 1) / 2) * 0.8 / len(colours) for k, task in enumerate(tasks) if task in own]
            own_rows = [own[task] for task in tasks if task in own]
            height = [100 * row["score"] for row in own_rows]
            # An end that equals the score can exceed it by rounding.
            spread = [
                [100 * max(row["score"] - row["score_low"], 0.0) for row in own_rows],
                [100 * max(row["score_high"] - row["score"], 0.0) for row in own_rows],
            ]
            axes.bar(
                at, height, 0.8 / len(colours), yerr=spread, label=_label(name), color=colour, error_kw={"lw": 0.8}
            )
        if own := {row["task"]: row for row in some if row["configuration"] == YARDSTICK}:
            at = [k for k, task in enumerate(tasks) if task in own]
            height = [100 * own[tasks[k]]["score"] for k in at]
            axes.hlines(height, [k - 0.45 for k in at], [k + 0.45 for k in at], YARD, "--", label=YARDSTICK)
        axes.set(xticks=range(len(tasks)), ylim=(0, 105), ylabel="score, %", title=_title(length))
        axes.set_xticklabels([task.replace("_", "\n") for task in tasks], fontsize=8)
        axes.grid(axis="y", alpha=0.2)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=len(labels), loc="outside upper center")
    return figure


def trade(results: dict):
    """Score over all prompts against KV tokens read, and beside it tokens per second where they were counted.

    There is a point for each configuration that decoded; exact attention reads everything. None without scores.
    """
    rows = [row for row in results["totals"] if "score" in row and row["configuration"] != YARDSTICK]
    rows = [row for row in rows if row.get("read_share", 1.0) is not None]  # None: it decoded nothing
    if not rows:
        return None
    colours = {EXACT: "0.4", **_colours(results)}
    timed = any("tokens_per_s" in row for row in rows)
    figure = _figure(5.5 * (1 + timed), 4)
    score = figure.add_subplot(1, 1 + timed, 1)
    speed = figure.add_subplot(1, 2, 2) if timed else None
    for row in rows:
        name, read = row["configuration"], 100 * row.get("read_share", 1.0)
        height = 100 * row["score"]
        style = {"color": colours[name], "label": _label(name), "ms": 8}
        # The interval is of the difference from exact attention on the same prompts, which is the effect of reuse.
        low, high = (100 * row.get(f"difference_{end}", row.get("difference", 0.0)) for end in ("low", "high"))
        mean = 100 * row.get("difference", 0.0)
        ends = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
        score.errorbar(read, height, yerr=ends, fmt="o", capsize=3, lw=1, **style)
        if speed is not None and "tokens_per_s" in row:
            speed.plot(read, row["tokens_per_s"], "o", **style)
    exact = next((100 * row["score"] for row in rows if row["configuration"] == EXACT), None)
    if exact is not None:
        score.axhline(exact, ls="--", lw=1, color=colours[EXACT])
    score.set(ylabel="score of all prompts, %", title="Answers, with 95 % intervals of the difference from exact")
    if speed is not None:
        speed.set(ylabel="tokens generated per second", title="Speed, prompts included")
        speed.set_ylim(0, 1.1 * max(row.get("tokens_per_s", 0.0) for row in rows))
    for axes in figure.axes:
        axes.set(xlabel="KV tokens read in decoding, %", xlim=(0, 104))
        axes.grid(alpha=0.2)
    score.legend(fontsize=8)
    return figure


def by_reads(results: dict):
    """KL of the next token, mean and 99th percentile, against KV tokens read. None without forced texts.

    There is a panel for each group of tasks and length, in it a point for each configuration, and lines for the
    yardstick.
    """
    rows = [row for row in results["rows"] if row.get("kl_mean") is not None]
    places = list(dict.fromkeys((row["group"], row["length"]) for row in rows))
    if not places:
        return None
    colours, across = _colours(results), min(3, len(places))
    down = math.ceil(len(places) / across)
    figure = _figure(max(5, 4.2 * across), 3.4 * down + 0.5)
    for i, place in enumerate(places):
        axes = figure.add_subplot(down, across, i + 1)
        for row in (row for row in rows if (row["group"], row["length"]) == place):
            name, ends = row["configuration"], (row["kl_mean"], row["kl_p99"])
            if not all(ends):
                continue  # a logarithmic axis has no 0
            if name == YARDSTICK:
                axes.axhline(ends[0], ls="--", color=YARD, lw=1.2, label=YARDSTICK)
                axes.axhline(ends[1], ls=":", color=YARD, lw=1)
            elif row.get("read_share") is not None:
                read = [100 * row["read_share"]] * 2
                axes.plot(read, ends, "-", color=colours[name], lw=0.8)
                axes.plot(read[0], ends[0], "o", color=colours[name], ms=7, label=_label(name))
                axes.plot(read[1], ends[1], "_", color=colours[name], ms=10)
        axes.set(xlabel="KV tokens read, %", ylabel="KL, nats a token", yscale="log", xlim=(0, 102))
        axes.set_title(f"{_title(place[1], place[0])}: mean and p99", fontsize=9)
        axes.grid(alpha=0.2, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def by_layer(results: dict):
    """Hit rate by layer, and where it was audited the error: p50, p95 and p99. None without counters."""
    layers = {name: list(some.values()) for name, some in results["layers"].items() if some}
    if not layers:
        return None
    colours = _colours(results)
    audited = any("error_p50" in row for rows in layers.values() for row in rows)
    figure = _figure(6 * (1 + audited), 4)
    hits = figure.add_subplot(1, 1 + audited, 1)
    for name, rows in layers.items():
        hits.plot([100 * (row["hit_rate"] or 0) for row in rows], "o-", color=colours[name], label=_label(name))
    hits.set(xlabel="layer", ylabel="heads that hit, %", ylim=(0, 102))
    if audited:
        errors = figure.add_subplot(1, 2, 2)
        for j, (name, rows) in enumerate(layers.items()):
            for key, style in (("error_p50", "o-"), ("error_p95", "s--"), ("error_p99", "^:")):
                at = [i for i, row in enumerate(rows) if row.get(key) is not None]
                # The other panel names the colours; this one names each style once.
                label = None if j else key[6:]
                errors.plot(at, [rows[i][key] for i in at], style, color=colours[name], ms=4, label=label)
        errors.set(xlabel="layer", ylabel="relative error of heads that hit", yscale="log")
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.2, which="both")
        axes.legend(fontsize=8)
    if audited:
        for line in figure.axes[1].get_legend().get_lines():
            line.set_color("black")
    return figure


def by_head(results: dict):
    """Hit rate of each query head, a map for each configuration. None where nothing was audited."""
    maps = {
        name: [row["head_hit_rates"] for row in some.values() if "head_hit_rates" in row]
        for name, some in results["layers"].items()
    }
    maps = {name: rows for name, rows in maps.items() if rows and len({len(row) for row in rows}) == 1}
    if not maps:
        return None
    figure, image = _figure(1 + 4 * len(maps), 4), None
    for i, (name, rows) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), i + 1)
        image = axes.imshow(
            [[100 * rate for rate in row] for row in rows], vmin=0, vmax=100, aspect="auto", cmap="viridis"
        )
        axes.set(title=_label(name), xlabel="query head", ylabel="layer")
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
        for name, some in found.items():
            edges, shares = [], []
            passed, total = 0, sum(count for _, count in some.get(kind, ()))
            for edge, count in some.get(kind, ()):
                if edge is None or passed == total:  # above the last edge, or all hits are counted
                    break
                passed += count
                edges.append(edge)
                shares.append(100 * passed / total)
            axes.plot(edges, shares, color=_colours(results)[name], label=_label(name))
        axes.set(xscale="log", xlabel=labels[kind], ylabel="hits up to there, %", ylim=(0, 102))
        axes.grid(alpha=0.2, which="both")
        axes.legend(fontsize=8)
    return figure


def divergence(results: dict):
    """Share of prompts whose tokens still equal exact attention's, by position. None without prompts to compare."""
    if not results["divergence"]:
        return None
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    last = 1 + max((p for some in results["divergence"].values() for p in some if p is not None), default=0)
    colours = _colours(results)
    for name, positions in results["divergence"].items():
        ends = sorted(math.inf if position is None else position for position in positions)
        x, y = [1.0], [100.0]
        for i, end in enumerate(ends, 1):
            if end < math.inf:
                x.append(1.0 + end)
                y.append(100 * (1 - i / len(ends)))
        style = {"color": YARD, "ls": "--"} if name == YARDSTICK else {"color": colours[name]}
        axes.step([*x, 1.0 + last], [*y, y[-1]], where="post", label=_label(name), **style)
    axes.set(xscale="log", xlabel="tokens generated", ylabel="prompts with exact's tokens so far, %", ylim=(0, 102))
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=8)
    return figure


ALL = {
    "trade": trade, "scores": scores, "reads": by_reads, "layers": by_layer, "heads": by_head, "histograms": histograms,
    "divergence": divergence,
}  # fmt: skip
