"""What commands show: the console for tables, errors in one line, and progress."""

import os
import sys
import time
from contextlib import contextmanager
from typing import NoReturn

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


def console() -> Console:
    # In a file, tables are not cut to the width of a terminal.
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "220")))


def complain(error: BaseException) -> int:
    """Print an error in one line. Returns the exit status for it."""
    print(f"vllm-mac: {error}", file=sys.stderr)
    return 2


def fail(error: BaseException) -> NoReturn:
    raise typer.Exit(complain(error))


@contextmanager
def progress(shown: bool, total: int | None, done: bool = False):
    """A function report(what, advance, total) that shows progress on stderr.

    Without `done`, `what` begins now and the last one is finished. With `done`, `what` is done. The `total` of a call
    replaces the one given here.
    """
    terminal = Console(stderr=True)
    if shown and not terminal.is_terminal:  # a log file: one line for each call
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

        def report(what: str, advance: int = 1, total: int | None = None) -> None:
            nonlocal first
            bar.update(
                task, description=what, advance=0 if first else int(advance), total=total
            )  # None changes nothing
            first = False

        yield report
