"""`vllm-mac eval`: one engine after another, or side by side, on the same prompts, exact attention first.

    FOLDER/run.json               configuration and environment
    FOLDER/CONFIGURATION/...      what its engine wrote, see `engine`; samples.jsonl is for reading too
    FOLDER/results.json           see `results.collect`

This side makes the prompts, starts the engines and follows them.
"""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm_mac.tools.eval import EvalError, requests, results
from vllm_mac.tools.eval.results import EXACT, YARDSTICK
from vllm_mac.tools.eval.yardstick import OWN, Yardstick
from vllm_mac.tools.runs import differences, follow, same_place

# -P: the installed package, not a folder of that name where the command happens to run.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.eval.engine")
REQUESTS = "requests.jsonl"
SEQUENCES = 16  # decoded together unless --engine says otherwise
INTERRUPTED = "interrupted"  # in place of a configuration's figures
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")  # engines on several GPUs


@dataclass(frozen=True, slots=True)
class Options:
    """mac: resolved configurations by name. exact: the backend compared with, or `default`. yardstick: what it
    is compared with beside them. engine: further arguments of `vllm.LLM`. kl: texts decoded under teacher
    forcing. out: the run's folder. gpus: one for each engine at a time, see `gpus`; without them engines see
    all, one after another."""

    model: str
    out: Path
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    samples: int = 25
    seed: int = 0
    prompts: Path | None = None
    longbench: Path | None = None
    mac: dict[str, dict] = field(default_factory=lambda: {"default": {}})
    exact: str = OWN
    yardstick: Yardstick | None = None
    engine: dict = field(default_factory=dict)
    kl: int = 0
    resume: bool = False
    verbose: bool = False
    gpus: tuple[str, ...] = ()


def check_folder(out: Path, resume: bool) -> None:
    """Raises EvalError where a run in `out` would mix with, or lose, what is there."""
    if resume and not (out / "run.json").is_file():
        raise EvalError(f"--resume: {out} holds no run; leave --resume out, or name a run's folder with --out")
    if not resume and out.exists():
        raise EvalError(f"--out: {out} exists; choose another folder, or --resume to go on with the run there")


def gpus(text: str, engine: dict) -> tuple[str, ...]:
    """The entries of a list such as `0,1`. Raises EvalError for empty ones, and for engines on several GPUs.

    engine: arguments of `vllm.LLM`.
    """
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise EvalError(
            f"--gpus: received {text!r}; choose GPUs as CUDA_VISIBLE_DEVICES takes them, separated by commas, such as 0,1"
        )
    for key in PARALLEL:
        if (size := engine.get(key, 1)) != 1:
            raise EvalError(
                f"--engine: {key}: received {size!r}; choose 1, for with --gpus each engine gets one GPU, or leave out --gpus"
            )
    return found


def prompts(options: Options) -> list[requests.Request]:
    """The run's prompts. Raises EvalError where the model, the files or the lengths do not allow them."""
    return requests.prepare(
        options.model, options.engine, lambda encoder: _requests(options, encoder), not options.verbose
    )


def steps(options: Options, made: list[requests.Request]) -> int:
    """How many answers and forced texts all engines have to give."""
    return (1 + len(_others(options))) * (len(made) + min(options.kl, len(made)))


def run(options: Options, made: list[requests.Request], environment: dict, tell: Callable[[str, int], None]) -> dict:
    """The results, see `results.collect`; written to the run's folder too.

    tell(what, advance): what goes on, and how many of `steps` are done; called by several threads, never by two
    at once. An engine that fails leaves an error in place of its figures; that of exact attention ends the run.
    After Ctrl-C the results are those of the configurations that were finished, and `INTERRUPTED` is the error
    of the others; raises KeyboardInterrupt where exact attention's were not.
    """
    check_folder(options.out, options.resume)
    configuration = _configuration(options, made)
    _open(options, configuration, environment)
    if options.resume and (stored := results.load(options.out)):
        return stored
    errors: dict[str, str] = {}
    telling = threading.Lock()

    def say(what: str, advance: int) -> None:
        with telling:
            tell(what, advance)

    with tempfile.TemporaryDirectory(prefix="vllm-mac-eval-") as work:
        requests.save(made, Path(work) / REQUESTS)

        def one(name: str, gpu: str | None = None, stop: threading.Event | None = None) -> None:
            if error := _engine(options, name, made, Path(work), say, gpu, stop):
                if name == EXACT:
                    raise EvalError(f"{EXACT}: {error}")
                errors[name] = error

        try:
            one(EXACT, *options.gpus[:1])
            if options.gpus:
                _side_by_side(_others(options), options.gpus, one)
            else:
                for name in _others(options):
                    one(name)
        except KeyboardInterrupt:
            unfinished = [
                name for name in (EXACT, *_others(options)) if any(results.left(options.out / name, made, options.kl))
            ]
            if EXACT in unfinished:
                raise
            errors |= {name: INTERRUPTED for name in unfinished if name not in errors}
    ordered = {name: errors[name] for name in _others(options) if name in errors}
    return results.collect(options.out, configuration, environment, made, ordered)


def _others(options: Options) -> list[str]:
    return results.compared({"yardstick": options.yardstick, "mac": options.mac})


def _side_by_side(
    names: Iterable[str], gpus: tuple[str, ...], one: Callable[[str, str, threading.Event], None]
) -> None:
    """one(name, gpu, stop) for each name, in a thread for each entry of `gpus`.

    What one of them raises, or Ctrl-C here, sets `stop`, and is raised when all have ended.
    """
    left, stop = iter(names), threading.Event()

    def serve(gpu: str) -> None:
        for name in left:  # of all threads: each takes the next
            if stop.is_set():
                return
            one(name, gpu, stop)

    pool = ThreadPoolExecutor(len(gpus))
    try:
        for served in as_completed([pool.submit(serve, gpu) for gpu in gpus]):
            served.result()
    finally:
        stop.set()
        pool.shutdown()


def _requests(options: Options, encoder) -> list[requests.Request]:
    made = list(requests.generated(options.tasks, options.lengths, options.samples, options.seed, encoder))
    if options.prompts is not None:
        made += requests.from_lines(options.prompts, encoder)
    if options.longbench is not None:
        made += requests.from_longbench(options.longbench, encoder)
    if not made:
        raise EvalError("no prompts: choose --tasks, --prompts or --longbench")
    return made


def _configuration(options: Options, made: list[requests.Request]) -> dict:
    """What a run's figures depend on, as JSON has it."""
    return {
        "model": options.model, "tasks": list(options.tasks), "lengths": list(options.lengths), "samples": options.samples,
        "seed": options.seed, "prompts": str(options.prompts) if options.prompts else None,
        "longbench": str(options.longbench) if options.longbench else None, "requests": requests.digest(made),
        "exact": options.exact, "yardstick": asdict(options.yardstick) if options.yardstick else None, "mac": options.mac,
        "kl": options.kl,
        "engine": {key: value for key, value in _llm(options, made).items() if key != "model"},
    }  # fmt: skip


def _llm(options: Options, made: list[requests.Request]) -> dict:
    """Arguments of every engine, whose sequences are as long as the longest request."""
    longest = max(request.total for request in made)
    return {
        "model": options.model, "max_model_len": longest, "max_num_seqs": SEQUENCES, "seed": options.seed,
        "disable_log_stats": True, **options.engine,
    }  # fmt: skip


def _open(options: Options, configuration: dict, environment: dict) -> None:
    """Begin the run's folder, or make sure that it holds this run."""
    file = options.out / "run.json"
    if not options.resume:
        options.out.mkdir(parents=True)
        stored = {"configuration": configuration, "environment": environment}
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        return
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        there = stored["configuration"] | same_place(stored["environment"])
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(f"--resume: {file} is not a run of this version ({type(error).__name__}: {error})") from error
    here = configuration | same_place(environment)
    if differ := differences(there, here):
        raise EvalError("--resume: {} holds another run:\n  {}".format(options.out, "\n  ".join(differ)))


def _engine(
    options: Options,
    name: str,
    made: list[requests.Request],
    work: Path,
    tell,
    gpu: str | None,
    stop: threading.Event | None,
) -> str | None:
    """Run what is left to do for one configuration. The error that ended it, or None.

    gpu: the only one that the engine sees, or None for all that this process does. stop: see `follow`.
    """
    folder = options.out / name
    folder.mkdir(exist_ok=True)
    left, forced = results.left(folder, made, options.kl)
    if done := len(made) - left + min(options.kl, len(made)) * (not forced):
        tell(f"{name}: {done} were done before", done)
    if not left and not forced:
        return None
    llm, env = dict(_llm(options, made)), {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    if name in options.mac:
        llm["attention_backend"] = "MAC"
        llm["additional_config"] = {**llm.get("additional_config", {}), "mac": options.mac[name]}
    elif options.exact != OWN:
        llm["attention_backend"] = options.exact
    if name == YARDSTICK:
        llm |= options.yardstick.llm
        env |= options.yardstick.environment
    files = {"requests": work / REQUESTS, "folder": folder, "exact": options.out / EXACT}
    spec = {"llm": llm, "kl": options.kl} | {key: str(path) for key, path in files.items()}
    file, log = work / f"{name}.json", folder / "engine.log"
    file.write_text(json.dumps(spec), encoding="utf-8")
    heard = lambda said: tell(f"{name}: {said['stage']}", said["advance"])
    error = follow([*COMMAND, str(file)], log, heard, verbose=options.verbose, env=os.environ | env, stop=stop)
    if error is None:
        log.unlink()
    return error
