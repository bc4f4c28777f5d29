"""The results of a run as tables, for the terminal and as Markdown. Scores and shares in percent."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_mac.tools.eval import plots
from vllm_mac.tools.eval.results import YARDSTICK, source
from vllm_mac.tools.eval.statistics import KL_FLOOR
from vllm_mac.tools.folded_table import Column, cell, folded

SHOWN = 4  # tables in the terminal


def _percent(row: dict, key: str) -> str:
    return f"{100 * row[key]:.1f}"


def _nats(row: dict, key: str) -> str:
    return f"{row[key]:.2g}"


def _scored(row: dict) -> str:
    if "score" not in row:
        return "no score"
    return f"{_percent(row, 'score')} ({_percent(row, 'score_low')} to {_percent(row, 'score_high')})"


def _prompts(row: dict) -> str:
    """The number of prompts, and of those with a score where only some have one."""
    return (
        str(row["requests"]) if row["scored"] in (0, row["requests"]) else f"{row['requests']} ({row['scored']} scored)"
    )


def _difference(row: dict) -> str:
    points = {
        key: f"{100 * row[key] + 0.0:+.1f}" for key in ("difference", "difference_low", "difference_high") if key in row
    }
    spread = f"{points['difference_low']} to {points['difference_high']}" if "difference_low" in row else "on each"
    return f"{points['difference']} ({spread})"


CONFIGURATION: Column = ("configuration", lambda r: r["configuration"])
WHERE: list[Column] = [("tasks", lambda r: r.get("task") or r["group"]), ("length", lambda r: str(r["length"] or "-"))]
ANSWERS: list[Column] = [
    ("prompts", _prompts),
    ("score", _scored),
    ("from exact", _difference),
    ("same answers", lambda r: _percent(r, "same_answers")),
    ("agreed", lambda r: _percent(r, "agreed_share")),
    ("agreed tokens", lambda r: f"{r['agreed_p50']:.0f}"),
]
NEXT: list[Column] = [
    ("forced tokens", lambda r: str(r["kl_tokens"])),
    ("KL mean", lambda r: _nats(r, "kl_mean")),
    ("x yardstick", lambda r: f"{r['kl_times']:.3g}"),
    ("KL p99", lambda r: _nats(r, "kl_p99")),
    ("same best token", lambda r: f"{100 * r['same_best']:.2f}"),
]
READS: list[Column] = [
    ("heads hit", lambda r: _percent(r, "hit_rate")),
    ("KV read", lambda r: _percent(r, "read_share")),
]
LAYER: list[Column] = [
    CONFIGURATION,
    ("layer", lambda r: r["layer"]),
    *READS,
    *((f"error {q}", lambda r, q=q: _nats(r, f"error_{q}")) for q in ("p50", "p95", "p99")),
]
NOTE = (
    "Percent, except KL (nats), x yardstick and error. score: mean, 95 % interval (Wilson); none for tasks without a right answer. "
    "from exact: difference in points on the same prompts, 95 % interval (paired bootstrap). same answers: answers whose greedy tokens all equal "
    "exact's. agreed: share of tokens before the first difference; agreed tokens: their number in the median answer. KL: of the next token from "
    "exact's, under teacher forcing. x yardstick: KL mean over the yardstick's. heads hit: share of all heads in decoding. KV read: share of the "
    "KV tokens that full attention reads in decoding."
)


def yardstick(results: dict) -> str:
    """What the yardstick is, and whether it measures anything."""
    chosen, found = results["configuration"].get("yardstick"), results.get("yardstick")
    if not chosen:
        return "No yardstick (--yardstick): the divergence that rounding alone would cause is not known."
    what = f"yardstick: {chosen['said']}, on the same prompts and forced texts."
    if not found:
        return f"{what} It has no results."
    if found["identical"] is None:
        return f"{what} Without forced texts (--kl 0) it measures no divergence."
    if found["identical"]:
        return f"{what} Its results are identical to exact's: it rounds in the same way and measures nothing."
    row = next(row for row in results["totals"] if row["configuration"] == YARDSTICK)
    if row["kl_mean"] <= KL_FLOOR:
        return f"{what} Its KL of {row['kl_mean']:.2g} is not above {KL_FLOOR:g} nats, the precision of KL: no multiples of it."
    return what


def exact_heads(results: dict) -> list[str]:
    """Of each configuration that decoded some heads exactly: how many, and why. Its figures are a mixture then."""
    said = []
    for row in results["totals"]:
        if shares := row.get("exact_share"):
            reasons, whole = (
                ", ".join(f"{reason} {share:.1%}" for reason, share in shares.items()),
                sum(shares.values()),
            )
            said.append(f"{row['configuration']}: {whole:.1%} of the heads were decoded exactly: {reasons}.")
    return said


def tables(results: dict) -> list[tuple[str, list[Column], list[dict]]]:
    """Title, columns and rows of each table."""
    layers = [
        {"configuration": name, "layer": layer, **figures}
        for name, some in results["layers"].items()
        for layer, figures in some.items()
    ]
    places = list(dict.fromkeys((row["group"], row["length"]) for row in results["rows"]))
    by_place = sorted(results["rows"], key=lambda row: places.index((row["group"], row["length"])))
    by_task = sorted(results["tasks"], key=lambda r: (r["task"], r["length"] or 0))
    forced = lambda rows: [row for row in rows if "kl_mean" in row]
    return [
        ("Answers to all prompts", [CONFIGURATION, *ANSWERS], results["totals"]),
        ("Next token, all forced texts", [CONFIGURATION, *NEXT, *READS], forced(results["totals"])),
        ("Answers by tasks and length", [*WHERE, CONFIGURATION, *ANSWERS], by_place),
        ("Next token by tasks and length", [*WHERE, CONFIGURATION, *NEXT, *READS], forced(by_place)),
        ("Answers by task", [*WHERE, CONFIGURATION, *ANSWERS], by_task),
        ("Next token by task", [*WHERE, CONFIGURATION, *NEXT], forced(by_task)),
        ("By layer", LAYER, layers),
    ]


def show(results: dict, console: Console) -> None:
    """Print the first tables, folded to fit 80 columns or more; results.md has all."""
    console.print(source(results), markup=False)
    for title, columns, rows in tables(results)[:SHOWN]:
        if rows:
            console.print(_table(title, columns, rows))
    for name, error in results["errors"].items():
        console.print(f"{name}: {error.splitlines()[-1]}", style="red", markup=False, soft_wrap=True)
    console.print("\n".join((NOTE, yardstick(results), *exact_heads(results))), style="dim", markup=False)


def _table(title: str, columns: list[Column], rows: list[dict]) -> Table:
    """A table in which tasks and length are a line above their rows instead of columns."""
    if columns[: len(WHERE)] != WHERE:
        return folded(title, columns, rows)
    place = lambda row: " ".join(read(row) for _, read in WHERE).removesuffix(" -")
    return folded(title, columns[len(WHERE) :], rows, place)


def markdown(results: dict) -> str:
    parts = [
        "# MAC against exact attention",
        source(results),
        f"`{results['environment']['command']}`",
        NOTE,
        yardstick(results),
        *exact_heads(results),
    ]
    for title, columns, rows in tables(results):
        if rows:
            lines = [[name for name, _ in columns], ["---"] * len(columns)]
            lines += [[cell(read, row).replace("|", "\\|") for _, read in columns] for row in rows]
            parts += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += [f"{name} has no results: {error.splitlines()[-1]}" for name, error in results["errors"].items()]
    return "\n\n".join(parts) + "\n"


def write(results: dict, folder: Path) -> list[Path]:
    """Write results.md and every plot that has data. Returns the files. Needs matplotlib."""
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    written = [folder / "results.md"]
    for name, draw in plots.ALL.items():
        figure = draw(results)
        if figure is not None:
            written.append(folder / f"{name}.png")
            plots.save(figure, results, written[-1])
    return written
