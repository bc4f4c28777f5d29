"""What both ways to calibrate write: the configuration file, JSON and Markdown; and how both show their tables."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_mac.config import MacConfig, resolve

ShownTable = tuple[str, list[str], list[list[str]]]  # title, head, rows


def config_with(
    names: Sequence[str], indices: Sequence[int], thresholds: Sequence[float | None], keys: dict, base: MacConfig
) -> dict:
    """Keys of MAC: `keys`, a threshold for each layer (None: exact), and others of the base that are not the default."""
    defaults = MacConfig().model_dump(mode="json")
    kept = {key: value for key, value in base.model_dump(mode="json").items() if value != defaults[key]}
    # An index is shorter than a name, but two layers may share one.
    pattern = indices if len(set(indices)) == len(indices) else names
    with_mac = {p: t for p, t in zip(pattern, thresholds, strict=True) if t is not None}
    left = [p for p, t in zip(pattern, thresholds, strict=True) if t is None]
    layers = {"exclude": [*base.layers.exclude, *left], "threshold": with_mac}
    if base.layers.include is not None:
        layers = {"include": list(base.layers.include)} | layers
    found = {
        "rule": base.rule,  # thresholds are of this one, whatever the default becomes
        "window": base.window,
        "min_context": base.min_context,
        **keys,
        "threshold": max(with_mac.values()),
        "layers": layers,
    }
    return found | {key: value for key, value in kept.items() if key not in found}


def write_yaml(about: dict, notes: list[str], config: dict, path: Path) -> None:
    """Write a file of MAC's keys, with its origin and `notes` as comments. MAC's own reader checks it first."""
    env = about["environment"]
    lines = [
        "MAC attention, calibrated.", f"model: {about['model']}", f"command: {about['command']}",
        *([] if about["command"] == env["command"] else [f"measured by: {env['command']}"]),
        f"on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}, {env['timestamp']}", *notes,
    ]  # fmt: skip
    text = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n" + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    resolve({"config": str(part)}, {})
    part.replace(path)


def save(results: dict, path: Path) -> None:
    """Write results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def show_tables(console: Console, some: list[ShownTable], note: str, notes: list[str]) -> None:
    for title, head, rows in some:
        table = Table(title=title, title_justify="left")
        for name in head:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(note, style="dim")
    for line in notes:
        console.print(line, markup=False)


def as_markdown(origin: str, command: str, some: list[ShownTable], note: str, notes: list[str]) -> str:
    parts = ["# Calibration of MAC", origin, f"`{command}`", *notes, note]
    for title, head, rows in some:
        lines = [head, ["---"] * len(head), *rows]
        parts += [
            f"## {title}",
            "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines),
        ]
    return "\n\n".join(parts) + "\n"


def source(about: dict, model: str) -> str:
    """Where results come from, in one line. model: its name in that line."""
    env = about["environment"]
    return f"{model} on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}"
