"""Rows of results, and the JSON files that hold them.

A row is a flat dictionary. Times are in milliseconds; rates and shares are between 0 and 1.
"""

import json
from pathlib import Path

from vllm_mac.tools.bench import BenchError

BENCHMARKS = ("kernel", "decode")


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of at least one sample, by nearest rank."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {f"p{q}": ordered[round(q / 100 * last)] for q in (20, 50, 80)}


def middle_rounds(rows: list[dict]) -> list[dict]:
    """Of rows that differ by their `round` alone the one whose p50 is in the middle, the lower one of two; others as they
    are. It gets `rounds`, the p50 of all of them in rising order."""
    same = "engine", "model", "batch", "context", "mac", "engine_args", "gpu", "commit"
    turns: dict[str, list[dict]] = {}
    for i, row in enumerate(rows):
        several = "round" in row and "p50" in row
        turns.setdefault(json.dumps([row.get(name) for name in same] if several else i), []).append(row)
    for several in turns.values():
        if "round" in several[0] and "p50" in several[0]:
            several.sort(key=lambda row: row["p50"])
            middle = several[(len(several) - 1) // 2]
            several[:] = [{**middle, "rounds": [row["p50"] for row in several]}]
    return [several[0] for several in turns.values()]


def save(rows: list[dict], path: str | Path) -> None:
    """Write rows as one JSON file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: str | Path) -> list[dict]:
    """The rows of a file that `save` wrote. Raises BenchError for any other file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        if all(row["bench"] in BENCHMARKS for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: no results of vllm-mac bench ({type(error).__name__}: {error})") from error
    raise BenchError(f"{path}: rows of an unknown benchmark; know {', '.join(BENCHMARKS)}")
