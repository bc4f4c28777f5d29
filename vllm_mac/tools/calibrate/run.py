"""`vllm-mac calibrate`: prompts, the engine that measures on them, the choice, and the results.

This side knows neither vLLM nor torch beyond what makes the prompts.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from vllm_mac.config import MacConfig, resolve
from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.grid import PAPER_WINDOW, Grid
from vllm_mac.tools.calibrate.measured import Measured
from vllm_mac.tools.eval import EvalError, requests
from vllm_mac.tools.runs import follow

# -P: the installed package, not a folder of that name where the command happens to run.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.calibrate.engine")
# Without these the layers would not be seen, or not one whole prompt at a time.
FIXED = {"attention_backend": "MAC", "max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False}


@dataclass(frozen=True, slots=True)
class Options:
    """mac: the configuration whose other keys are kept. prompts: a file of JSON lines or of text, instead of
    generated tasks. output: measure the error of each layer's output after `W_O` too. reply: most tokens of the model's own reply that are measured with each prompt, 0 for
    none; None for as many as `grid.steps`. length, samples: of tasks, and of the pieces of a text. engine: further arguments of `vllm.LLM`."""

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


def prompts(
    options: Options, fixed: dict = FIXED, decoded: Callable[[requests.Request], int] | None = None
) -> list[requests.Request]:
    """fixed: arguments of the engine that are not the user's to choose. decoded: how many tokens at the end of a
    prompt are decoded; `grid.steps` of each where it is None.

    Raises CalibrateError where the model, its arguments, the files or the lengths do not allow them.
    """
    for key, value in fixed.items():
        if options.engine.get(key, value) != value:
            raise CalibrateError(
                f"--engine: {key}: received {options.engine[key]!r}; calibration needs {value!r}, leave it out"
            )
    try:
        made = requests.prepare(
            options.model, options.engine, lambda encoder: _made(options, encoder), not options.verbose
        )
    except EvalError as error:  # whose option is a list
        raise CalibrateError(str(error).replace("--lengths", "--length")) from error
    if not made:
        raise CalibrateError(f"--prompts: {options.prompts} holds no prompt")
    grid = options.grid
    for request in made:
        steps = grid.steps if decoded is None else decoded(request)
        least = grid.least() - grid.steps + steps
        if len(request.ids) < least:
            named = "--length" if options.prompts is None else "--prompts"
            raise CalibrateError(
                f"{named}: prompt {request.id} has {len(request.ids)} tokens; calibration needs at least {least}: steps "
                f"{steps} + window {grid.window} + band {max(grid.bands)} + sink {max(grid.sinks)}, "
                f"and min_context {grid.min_context} before the steps. Choose longer prompts or fewer --steps"
            )
    return made


def check(grid: Grid) -> None:
    """Raises MacConfigError where a value of the grid is none that MAC's configuration takes."""
    for band, sink in product(grid.bands, grid.sinks):
        resolve({"window": grid.window, "min_context": grid.min_context, "band": band, "sink": sink}, {})


def with_paper(options: Options, made: list[requests.Request]) -> bool:
    """Whether the paper's setting can be tried beside the grid: its window, and prompts as long as its band asks."""
    needed = options.grid.least(paper=True)
    return options.grid.window == PAPER_WINDOW and all(len(request.ids) >= needed for request in made)


def reply(options: Options, request: requests.Request) -> int:
    """Most tokens of the model's reply that are measured with a prompt."""
    return min(options.grid.steps if options.reply is None else options.reply, request.max_tokens)


def measure(
    options: Options, made: list[requests.Request], environment: dict, tell: Callable[[str, int, int | None], None]
) -> Measured:
    """Run the engine on the prompts. tell(what, advance, total): what goes on, how many prompts more are done, and None.

    Raises CalibrateError where the engine fails.
    """
    replies = [reply(options, request) for request in made]
    llm = {
        "model": options.model,
        # One token follows what is read: the last of the reply, or one that nobody asked for.
        "max_model_len": max(len(request.ids) + max(1, most) for request, most in zip(made, replies, strict=True)),
        "gpu_memory_utilization": 0.5,  # the rest is for what is captured and simulated
        "seed": options.seed,
        "disable_log_stats": True,
        **options.engine,
        **FIXED,
        "additional_config": {
            **options.engine.get("additional_config", {}),
            "mac": exact_keys(options.mac) | {"max_sequences": 1},
        },
    }
    spec = {
        "llm": llm, "grid": options.grid.as_dict(), "paper": with_paper(options, made), "output": options.output,
        "prompts": [{"ids": list(r.ids), "reply": most} for r, most in zip(made, replies, strict=True)],
    }  # fmt: skip
    measured, found = run_engine(COMMAND, spec, Measured.load, tell, options.verbose)
    said = str(options.prompts) if options.prompts else f"{', '.join(options.tasks)}, seed {options.seed}"
    source = {
        "model": options.model, "prompts": said, "mac": options.mac.model_dump(mode="json"), "engine": options.engine,
        "exact_layers": found["exact"], "environment": environment,
    }  # fmt: skip
    return replace(measured, source=source)


def exact_keys(config: MacConfig) -> dict:
    """Inline keys of exact attention on the layers that the configuration selects."""
    keys = config.model_dump(mode="json")
    keys["layers"]["threshold"] = {}
    return keys | {"threshold": 1.0}


def run_engine(
    command: tuple[str, ...],
    spec: dict,
    load: Callable[[Path], Any],
    tell: Callable[[str, int, int | None], None],
    verbose: bool,
) -> tuple[Any, dict]:
    """What `load` makes of the file that an engine of this package wrote, and what the engine said beside its stages.

    tell(what, advance, total): what goes on, how much more is done, and of how much where the engine says it. The
    engine finds the file's path in its spec as `out`. Raises CalibrateError where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-mac-calibrate-") as folder:
        work, found = Path(folder), {}
        (work / "spec.json").write_text(json.dumps(spec | {"out": str(work / "result")}), encoding="utf-8")

        def heard(said: dict) -> None:
            if "stage" in said:
                tell(said["stage"], said["advance"], said.get("total"))
            else:
                found.update(said)

        error = follow([*command, str(work / "spec.json")], work / "engine.log", heard, verbose=verbose)
        if error := error or found.get("error"):
            raise CalibrateError(error)
        return load(work / "result"), found


def _made(options: Options, encoder: requests.Encoder) -> list[requests.Request]:
    if options.prompts is None:
        return list(requests.generated(options.tasks, (options.length,), options.samples, options.seed, encoder))
    if options.prompts.suffix != ".txt":
        return list(requests.from_lines(options.prompts, encoder))
    try:
        ids = tuple(encoder.tokenizer.encode(options.prompts.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CalibrateError(f"--prompts: {options.prompts}: {error}") from error
    if options.length >= encoder.longest:
        raise CalibrateError(
            f"--length: received {options.length}; the model's longest sequence is {encoder.longest} tokens"
        )
    pieces = [ids[i : i + options.length] for i in range(0, len(ids), options.length)][: options.samples]
    whole = [piece for piece in pieces if len(piece) == options.length] or pieces
    return [
        requests.Request(f"piece {i + 1}", requests.PROMPTS, requests.PROMPTS, None, piece, 0, "")
        for i, piece in enumerate(whole)
    ]
