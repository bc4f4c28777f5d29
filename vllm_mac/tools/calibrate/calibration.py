"""What both ways to calibrate share: what is asked for, the prompts, and how their engines run.

This side knows neither vLLM nor torch beyond what makes the prompts.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from vllm_mac.config import MacConfig, resolve
from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.grid import Grid
from vllm_mac.tools.engine_process import follow
from vllm_mac.tools.eval import EvalError, requests


@dataclass(frozen=True, slots=True)
class Calibration:
    """What to calibrate, on which prompts.

    mac: the configuration; its keys that are not calibrated stay as they are.
    prompts: a file of JSON lines or of text, instead of generated tasks.
    length, samples: tokens and number of a task's prompts, or of the parts that a text is cut into.
    reply: the most tokens of the model's own reply that are measured with each prompt; None for `grid.steps`.
    engine: further arguments of `vllm.LLM`. verbose: show what the engine prints.
    output: also measure the error of each layer's output after `W_O`.
    """

    model: str
    grid: Grid
    mac: MacConfig
    prompts: Path | None = None
    tasks: tuple[str, ...] = ()
    length: int = 8192
    samples: int = 4
    reply: int | None = None
    seed: int = 0
    engine: dict = field(default_factory=dict)
    verbose: bool = False
    output: bool = False

    @property
    def prompt_source(self) -> str:
        """Where the prompts are from, for the results."""
        return str(self.prompts) if self.prompts else f"{', '.join(self.tasks)}, seed {self.seed}"


def prompts(
    calibration: Calibration, fixed: dict, decoded: Callable[[requests.Request], int]
) -> list[requests.Request]:
    """The prompts to calibrate on.

    fixed: arguments of the engine that the user cannot choose. decoded: how many tokens at the end of a prompt are
    decoded. Raises CalibrateError where the model, its arguments, the files or the lengths do not allow the prompts.
    """
    for key, value in fixed.items():
        if calibration.engine.get(key, value) != value:
            raise CalibrateError(
                f"--engine: {key}: received {calibration.engine[key]!r}; calibration needs {value!r}, leave it out"
            )
    try:
        made = requests.prepare(
            calibration.model, calibration.engine, lambda encoder: _made(calibration, encoder), not calibration.verbose
        )
    except EvalError as error:  # eval's option is a list
        raise CalibrateError(str(error).replace("--lengths", "--length")) from error
    if not made:
        raise CalibrateError(f"--prompts: {calibration.prompts} holds no prompt")
    grid = calibration.grid
    for request in made:
        steps = decoded(request)
        least = grid.least() - grid.steps + steps
        if len(request.ids) < least:
            named = "--length" if calibration.prompts is None else "--prompts"
            raise CalibrateError(
                f"{named}: prompt {request.id} has {len(request.ids)} tokens; calibration needs at least {least}: steps "
                f"{steps} + window {grid.window} + band {max(grid.bands)} + sink {max(grid.sinks)}, "
                f"and min_context {grid.min_context} before the steps. Choose longer prompts or fewer --steps"
            )
    return made


def check(grid: Grid) -> None:
    """Raises MacConfigError where MAC's configuration does not accept a value of the grid."""
    for band, sink in product(grid.bands, grid.sinks):
        keys = {"window": grid.window, "min_context": grid.min_context, "band": band, "sink": sink}
        resolve({"rule": "match"} | keys, {})


def reply(calibration: Calibration, request: requests.Request) -> int:
    """The most tokens of the model's reply to measure with a prompt."""
    return min(calibration.grid.steps if calibration.reply is None else calibration.reply, request.max_tokens)


def exact_keys(config: MacConfig) -> dict:
    """Inline keys of exact attention on the layers that the configuration selects."""
    keys = config.model_dump(mode="json")
    keys["layers"]["threshold"] = {}
    return keys | {"threshold": 1.0}


def run_engine(
    command: tuple[str, ...],
    spec: dict,
    load: Callable[[Path], Any],
    report: Callable[[str, int, int | None], None],
    verbose: bool,
) -> tuple[Any, dict]:
    """Run an engine of this package. Returns `load(file)` of the file that it wrote, and its messages other than stages.

    report(what, advance, total): the current stage, the work finished since the last call, and the whole work where the
    engine knows it. The engine gets the file's path in its spec as `out`. Raises CalibrateError where the engine fails.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-mac-calibrate-") as folder:
        work, found = Path(folder), {}
        (work / "spec.json").write_text(json.dumps(spec | {"out": str(work / "result")}), encoding="utf-8")

        def receive(message: dict) -> None:
            if "stage" in message:
                report(message["stage"], message["advance"], message.get("total"))
            else:
                found.update(message)

        error = follow([*command, str(work / "spec.json")], work / "engine.log", receive, verbose=verbose)
        if error := error or found.get("error"):
            raise CalibrateError(error)
        return load(work / "result"), found


def _made(calibration: Calibration, encoder: requests.Encoder) -> list[requests.Request]:
    if calibration.prompts is None:
        return list(
            requests.generated(calibration.tasks, (calibration.length,), calibration.samples, calibration.seed, encoder)
        )
    if calibration.prompts.suffix != ".txt":
        return list(requests.from_lines(calibration.prompts, encoder))
    try:
        ids = tuple(encoder.tokenizer.encode(calibration.prompts.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CalibrateError(f"--prompts: {calibration.prompts}: {error}") from error
    if calibration.length >= encoder.longest:
        raise CalibrateError(
            f"--length: received {calibration.length}; the model's longest sequence is {encoder.longest} tokens"
        )
    parts = [ids[i : i + calibration.length] for i in range(0, len(ids), calibration.length)][: calibration.samples]
    whole = [part for part in parts if len(part) == calibration.length] or parts
    return [
        requests.Request(f"part {i + 1}", requests.PROMPTS, requests.PROMPTS, None, part, 0, "")
        for i, part in enumerate(whole)
    ]
