"""Types of the options that commands share, and parsers of their values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Write a plot to this file (PNG, PDF, SVG). Needs matplotlib.")]
Mac = Annotated[
    str,
    typer.Option("--mac", help="Keys of MAC's configuration as JSON, as in vLLM's --additional-config under 'mac'."),
]
Engine = Annotated[str, typer.Option("--engine", help="Further arguments of vllm.LLM as JSON.")]
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


def pairs(between: str, choices: str, fits=lambda first, second: True):
    """A parser of comma-separated pairs of positive whole numbers."""

    def parse(text: str) -> tuple[tuple[int, int], ...]:
        try:
            pairs = [(int(first), int(second)) for first, second in (pair.split(between) for pair in text.split(","))]
        except ValueError:
            pairs = []
        if pairs and all(min(pair) > 0 and fits(*pair) for pair in pairs):
            return tuple(pairs)
        raise typer.BadParameter(f"received {text!r}; choose {choices}, separated by commas")

    return parse


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"received {text!r}; not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f'received {text!r}; choose a JSON object such as {{"tolerance": 1.0}}')
    return value


def only_of_match(given: dict[str, Any], how: str) -> None:
    """Refuse options, by name, that were given though only `rule: match` has what they mean. how: to choose it."""
    for option, value in given.items():
        if value is not None:
            raise typer.BadParameter(
                f"received {value!r}, which only rule: match has, and the rule is index; leave it out, or give {how}",
                param_hint=option,
            )


def choice(option: str, value: str, choices) -> str:
    if value not in choices:
        raise typer.BadParameter(f"received {value!r}; choose from {', '.join(choices)}", param_hint=option)
    return value


def parse(option: str, parser: Callable[[str], Any], text: str) -> Any:
    """`parser(text)`. An error names the option."""
    try:
        return parser(text)
    except typer.BadParameter as error:
        error.param_hint = option
        raise
