"""What commands share: types of their options, parsers of values, progress, and errors."""

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

Json = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Write a plot to this file (PNG, PDF, SVG). Needs matplotlib.")]
Mac = Annotated[
    str, typer.Option("--mac", help="Keys of MAC's configuration as JSON, as under --additional-config 'mac'.")
]
Seed = Annotated[int, typer.Option(help="Seed of all random data.")]
ShowProgress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress on stderr.")]


def numbers(kind, low: float, high: float):
    """A parser of comma-separated numbers from `low` to `high`."""
    what = "whole numbers" if kind is int else "numbers"
    choices = f"choose {what} of at least {low:g}" if math.isinf(high) else f"choose {what} from {low:g} to {high:g}"

    def parse(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if values and all(low <= value <= high for value in values):
            return values
        raise typer.BadParameter(f"received {text!r}; {choices}, separated by commas")

    return parse


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"received {text!r}; not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f'received {text!r}; choose a JSON object such as {{"threshold": 0.6}}')
    return value


def choice(option: str, value: str, choices) -> str:
    if value not in choices:
        raise typer.BadParameter(f"received {value!r}; choose from {', '.join(choices)}", param_hint=option)
    return value


def parse(option: str, parser, text: str):
    try:
        return parser(text)
    except typer.BadParameter as error:
        error.param_hint = option
        raise


def console() -> Console:
    # Tables that go to a file are as wide as they are.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "220")))


def complain(error: BaseException) -> int:
    print(f"vllm-mac: {error}", file=sys.stderr)
    return 2


def fail(error: BaseException) -> None:
    raise typer.Exit(complain(error))


@contextmanager
def progress(shown: bool, total: int | None, done: bool = False):
    """A function tell(what, advance, total): what begins, each call finishing what was told before, or with `done` what is done.

    A total told there replaces the one given here.
    """
    terminal = Console(stderr=True)
    if shown and not terminal.is_terminal:  # a log: one line for each
        begun, count, known = time.monotonic(), 0, total

        def log(what: str, advance: int = 1, total: int | None = None) -> None:
            nonlocal count, known
            count, known = count + advance, total or known
            of = f"[{count}/{known}] " if done and known else ""
            print(f"{time.monotonic() - begun:6.1f} s  {of}{what}", file=sys.stderr, flush=True)

        yield log
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal, disable=not shown, transient=True) as bar:
        task, first = bar.add_task("", total=total), not done

        def tell(what: str, advance: int = 1, total: int | None = None) -> None:
            nonlocal first
            bar.update(task, description=what, advance=0 if first else int(advance), total=total)  # None leaves it
            first = False

        yield tell
