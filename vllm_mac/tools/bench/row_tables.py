"""Rows of results as tables in the terminal."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from vllm_mac.tools.bench.row_files import middle_rounds
from vllm_mac.tools.environment import PACKAGES
from vllm_mac.tools.folded_table import Column, folded


def show(rows: list[dict], console: Console) -> None:
    """Print the rows: a title for each benchmark, machine and --between, and below it a table for each shape."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((kind(row), row["gpu"], row["commit"], row.get("between_mib")), []).append(row)
    for (bench, gpu, commit_, between), some in groups.items():
        versions = ", ".join(f"{name} {some[0][name]}" for name in PACKAGES if some[0][name])
        title = f"{some[0]['bench']} on {gpu or 'CPU'} ({versions}), commit {commit_}"
        title += f", {between} MiB read between layers" if between else ""
        console.print(title, markup=False, highlight=False)
        columns, place = _TABLES[bench]
        for shape in dict.fromkeys(map(place, some)):
            rows = middle_rounds([row for row in some if place(row) == shape])
            hidden = "p20 p80" if any("rounds" in row for row in rows) else "rounds"  # 80 columns lack room for both
            console.print(folded(shape, [column for column in columns if column[0] != hidden], rows))
            if bench != "index" and (notes := _notes(rows)):
                console.print(*notes, sep="; ", style="dim", markup=False, highlight=False)
        for row in some:
            if row.get("error"):
                reason = row["error"].splitlines()[-1]
                console.print(
                    f"{row['engine']}, batch {row['batch']}, {row['context']} tokens: {reason}",
                    style="red",
                    markup=False,
                    soft_wrap=True,
                )
        console.print(_NOTES[bench], style="dim")


def kind(row: dict) -> str:
    """Which rows share tables and plots: the benchmark, or `index` for decoding by the index of keys."""
    return "index" if row.get("rule") == "index" else row["bench"]


def _us(*names: str) -> Callable[[dict], str]:
    return lambda row: " ".join(f"{1000 * row[name]:.1f}" for name in names)


def _ms(row: dict, name: str) -> str:
    return f"{row[name]:.4f}" if row[name] < 10 else f"{row[name]:.2f}"


def engine_name(row: dict) -> str:
    note = row.get("note")
    return f"{row['engine']} ({note})" if note else row["engine"]


def _notes(rows: list[dict]) -> list[str]:
    """The notes below the table of a shape: variants of the exact engines, and the time that begins a step of MAC."""
    noted = [engine_name(row) for row in rows if row.get("note")]
    begun = next((row for row in rows if "begin_host_ms" in row), None)
    return noted + (
        [f"begin: host {_ms(begun, 'begin_host_ms')}, GPU {_ms(begun, 'begin_device_ms')}"] if begun else []
    )


# For each benchmark: the columns, and the shape by which rows share a table.
_TABLES: dict[str, tuple[list[Column], Callable[[dict], str]]] = {
    "kernel": (
        [
            ("engine", lambda r: r["engine"]),
            ("heads hit", lambda r: f"{r['heads_matched']:.3f}"),
            ("groups hit", lambda r: f"{r['groups_hit']:.3f}"),
            ("ms p50", lambda r: _ms(r, "p50")),
            ("p20 p80", lambda r: f"{_ms(r, 'p20')} {_ms(r, 'p80')}"),
            ("floor", lambda r: _ms(r, "floor_ms")),
            ("x floor", lambda r: f"{r['p50'] / r['floor_ms']:.2f}"),
            ("speed- up", lambda r: f"{r['speedup']:.2f}"),
            ("bound", lambda r: _ms(r, "bound_ms")),
            ("x bound", lambda r: f"{r['p50'] / r['bound_ms']:.3f}"),
        ],
        lambda r: f"{r['heads']} heads, batch {r['batch']}, {r['context']} tokens",
    ),
    "index": (
        [
            ("engine", lambda r: engine_name(r)),
            ("KV read", lambda r: f"{r['read_share']:.3f}"),
            ("us p50", _us("p50")),
            ("p20 p80", _us("p20", "p80")),
            ("weigh", _us("weigh_ms")),
            ("look", _us("look_ms")),
            ("merge", _us("merge_ms")),
            ("floor", _us("floor_ms")),
            ("x floor", lambda r: f"{r['p50'] / r['floor_ms']:.2f}"),
            ("speed- up", lambda r: f"{r['speedup']:.2f}"),
        ],
        lambda r: f"{r['heads']} heads of {r['head_size']}, batch {r['batch']}, {r['context']} tokens",
    ),
    "decode": (
        [
            ("backend", lambda r: r["engine"]),
            ("ms/ token p50", lambda r: f"{r['p50']:.3f}"),
            ("p20 p80", lambda r: f"{r['p20']:.3f} {r['p80']:.3f}"),
            ("rounds", lambda r: f"{r['rounds'][0]:.3f} {r['rounds'][-1]:.3f}"),
            ("mean", lambda r: f"{r['mean']:.3f}"),
            ("speed up", lambda r: f"{r['speedup']:.2f}"),
            ("TTFT ms", lambda r: f"{r['ttft_p50']:.0f}"),
            ("heads hit", lambda r: f"{r['hit_rate']:.3f}"),
            ("KV read", lambda r: f"{r['read_share']:.3f}"),
            ("GPU", lambda r: f"{r['graph_p50']:.3f}"),
            ("host", lambda r: f"{r['metadata_p50']:.3f}"),
        ],
        lambda r: f"{Path(r['model']).name}, batch {r['batch']}, {r['context']} tokens",
    ),
}
_NOTES = {
    "kernel": "p20 p80: percentiles of the times. floor: bytes that must move / read bandwidth measured in this run. "
    "speed-up: over the best exact decode. "
    "bound: all-hit time + missed share of groups x best exact. begin: once a step, for all layers. All times in ms.",
    "index": "p20 p80: percentiles of the times. KV read: the index counted. weigh, look, merge: what each "
    "kernel adds to those before it. floor: bytes that must move / read bandwidth measured in this run. speed-up: over "
    "the best exact decode. All times in us.",
    "decode": "rounds: the least and the greatest p50 of all rounds; the other figures are of the middle one. mean: over "
    "all steps; single steps vary with the time at which their tokens are returned. speed-up: over the "
    "fastest other backend, by p50. heads hit, KV read: over the timed steps, all layers. "
    "GPU: its time for a step's graph, with the graph's launch where the GPU waits for it. host: its time to build a "
    "step's metadata.",
}
