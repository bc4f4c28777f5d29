"""`vllm-mac eval`: engines one after another, or in parallel, on the same prompts, exact attention first.

    FOLDER/run.json               configuration and environment
    FOLDER/CONFIGURATION/...      the files of its engine, see `answer_engine`; samples.jsonl is made for readers too
    FOLDER/results.json           see `results.collect`

This module makes the prompts, and starts and follows the engines.
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

from vllm_mac.tools.engine_process import follow
from vllm_mac.tools.eval import EvalError, requests, results
from vllm_mac.tools.eval.results import EXACT, YARDSTICK
from vllm_mac.tools.eval.yardstick import OWN, Yardstick
from vllm_mac.tools.resume import differences, same_place

# -P: import the installed package, not a folder of that name in the working directory.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.eval.answer_engine")
REQUESTS = "requests.jsonl"
SEQUENCES = 16  # decoded together unless --engine has max_num_seqs
INTERRUPTED = "interrupted"  # the error of a configuration that Ctrl-C stopped
PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
)  # arguments that put an engine on several GPUs


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to compare, on which prompts.

    out: the run's folder. mac: resolved configurations by name. exact: the backend to compare with, or `default`.
    yardstick: another exact backend to compare. engine: further arguments of `vllm.LLM`. kl: number of texts to decode
    under teacher forcing. gpus: run an engine at a time on each of them, see `gpus`; without them the engines run one
    after another and see all GPUs.
    """

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
    """Raises EvalError where a run in `out` would mix with other files, or overwrite them."""
    if resume and not (out / "run.json").is_file():
        raise EvalError(f"--resume: {out} holds no run; leave --resume out, or name a run's folder with --out")
    if not resume and out.exists():
        raise EvalError(f"--out: {out} exists; choose another folder, or --resume to go on with the run there")


def gpus(text: str, engine: dict) -> tuple[str, ...]:
    """The entries of a list such as `0,1`. engine: arguments of `vllm.LLM`.

    Raises EvalError for an empty entry, and for engines that take several GPUs.
    """
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise EvalError(
            f"--gpus: received {text!r}; choose GPUs as CUDA_VISIBLE_DEVICES takes them, separated by commas, such as 0,1"
        )
    for key in PARALLEL:
        if (size := engine.get(key, 1)) != 1:
            raise EvalError(
                f"--engine: {key}: received {size!r}; choose 1, because with --gpus each engine gets one GPU, or leave out --gpus"
            )
    return found


def prompts(evaluation: Evaluation) -> list[requests.Request]:
    """The run's prompts. Raises EvalError where the model, the files or the lengths do not allow them."""
    return requests.prepare(
        evaluation.model, evaluation.engine, lambda encoder: _requests(evaluation, encoder), not evaluation.verbose
    )


def steps(evaluation: Evaluation, made: list[requests.Request]) -> int:
    """The number of answers and forced texts of all engines together."""
    return (1 + len(_others(evaluation))) * (len(made) + min(evaluation.kl, len(made)))


def run(
    evaluation: Evaluation, made: list[requests.Request], environment: dict, report: Callable[[str, int], None]
) -> dict:
    """Run all engines and return the results, see `results.collect`; they are also written to the run's folder.

    report(what, advance): what happens now, and how many of `steps` were finished; several threads call it, but never
    two at once. A configuration whose engine fails has an error instead of results; a failure of exact attention ends
    the run. After Ctrl-C the finished configurations have results and `INTERRUPTED` is the error of the others; raises
    KeyboardInterrupt where exact attention is not finished.
    """
    check_folder(evaluation.out, evaluation.resume)
    configuration = _configuration(evaluation, made)
    _open(evaluation, configuration, environment)
    if evaluation.resume and (stored := results.load(evaluation.out)):
        return stored
    errors: dict[str, str] = {}
    reporting = threading.Lock()

    def report_one(what: str, advance: int) -> None:
        with reporting:
            report(what, advance)

    with tempfile.TemporaryDirectory(prefix="vllm-mac-eval-") as work:
        requests.save(made, Path(work) / REQUESTS)

        def one(name: str, gpu: str | None = None, stop: threading.Event | None = None) -> None:
            if error := _engine(evaluation, name, made, Path(work), report_one, gpu, stop):
                if name == EXACT:
                    raise EvalError(f"{EXACT}: {error}")
                errors[name] = error

        try:
            one(EXACT, evaluation.gpus[0] if evaluation.gpus else None)
            if evaluation.gpus:
                _side_by_side(_others(evaluation), evaluation.gpus, one)
            else:
                for name in _others(evaluation):
                    one(name)
        except KeyboardInterrupt:
            unfinished = [
                name
                for name in (EXACT, *_others(evaluation))
                if any(results.left(evaluation.out / name, made, evaluation.kl))
            ]
            if EXACT in unfinished:
                raise
            errors |= {name: INTERRUPTED for name in unfinished if name not in errors}
    ordered = {name: errors[name] for name in _others(evaluation) if name in errors}
    return results.collect(evaluation.out, configuration, environment, made, ordered)


def _others(evaluation: Evaluation) -> list[str]:
    return results.compared({"yardstick": evaluation.yardstick, "mac": evaluation.mac})


def _side_by_side(
    names: Iterable[str], gpus: tuple[str, ...], one: Callable[[str, str, threading.Event], None]
) -> None:
    """Call one(name, gpu, stop) for each name, in one thread for each entry of `gpus`.

    An exception in a thread, or Ctrl-C, sets `stop` and is raised when all threads have ended.
    """
    left, stop = iter(names), threading.Event()

    def work(gpu: str) -> None:
        for name in left:  # shared by all threads: each takes the next
            if stop.is_set():
                return
            one(name, gpu, stop)

    pool = ThreadPoolExecutor(len(gpus))
    try:
        for ended in as_completed([pool.submit(work, gpu) for gpu in gpus]):
            ended.result()
    finally:
        stop.set()
        pool.shutdown()


def _requests(evaluation: Evaluation, encoder) -> list[requests.Request]:
    made = list(requests.generated(evaluation.tasks, evaluation.lengths, evaluation.samples, evaluation.seed, encoder))
    if evaluation.prompts is not None:
        made += requests.from_lines(evaluation.prompts, encoder)
    if evaluation.longbench is not None:
        made += requests.from_longbench(evaluation.longbench, encoder)
    if not made:
        raise EvalError("no prompts: choose --tasks, --prompts or --longbench")
    return made


def _configuration(evaluation: Evaluation, made: list[requests.Request]) -> dict:
    """Everything that a run's results depend on, as plain data for JSON."""
    return {
        "model": evaluation.model, "tasks": list(evaluation.tasks), "lengths": list(evaluation.lengths), "samples": evaluation.samples,
        "seed": evaluation.seed, "prompts": str(evaluation.prompts) if evaluation.prompts else None,
        "longbench": str(evaluation.longbench) if evaluation.longbench else None, "requests": requests.digest(made),
        "exact": evaluation.exact, "yardstick": asdict(evaluation.yardstick) if evaluation.yardstick else None, "mac": evaluation.mac,
        "kl": evaluation.kl,
        "engine": {key: value for key, value in _llm(evaluation, made).items() if key != "model"},
    }  # fmt: skip


def _llm(evaluation: Evaluation, made: list[requests.Request]) -> dict:
    """Arguments of every engine. Its longest sequence is the longest request."""
    longest = max(request.total for request in made)
    return {
        "model": evaluation.model, "max_model_len": longest, "max_num_seqs": SEQUENCES, "seed": evaluation.seed,
        "disable_log_stats": True, **evaluation.engine,
    }  # fmt: skip


def _open(evaluation: Evaluation, configuration: dict, environment: dict) -> None:
    """Make the run's folder. With `resume`, raises EvalError where the folder holds another run."""
    file = evaluation.out / "run.json"
    if not evaluation.resume:
        evaluation.out.mkdir(parents=True)
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
        raise EvalError("--resume: {} holds another run:\n  {}".format(evaluation.out, "\n  ".join(differ)))


def _engine(
    evaluation: Evaluation,
    name: str,
    made: list[requests.Request],
    work: Path,
    report: Callable[[str, int], None],
    gpu: str | None,
    stop: threading.Event | None,
) -> str | None:
    """Run the unfinished work of one configuration. Returns the error that ended it, or None.

    gpu: the only GPU that the engine sees; None for all GPUs of this process. stop: as in `follow`.
    """
    folder = evaluation.out / name
    folder.mkdir(exist_ok=True)
    left, forced = results.left(folder, made, evaluation.kl)
    if done := len(made) - left + min(evaluation.kl, len(made)) * (not forced):
        report(f"{name}: {done} were done before", done)
    if not left and not forced:
        return None
    llm, env = dict(_llm(evaluation, made)), {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    if name in evaluation.mac:
        llm["attention_backend"] = "MAC"
        llm["additional_config"] = {**llm.get("additional_config", {}), "mac": evaluation.mac[name]}
    elif evaluation.exact != OWN:
        llm["attention_backend"] = evaluation.exact
    if name == YARDSTICK and evaluation.yardstick is not None:
        llm |= evaluation.yardstick.llm
        env |= evaluation.yardstick.environment
    files = {"requests": work / REQUESTS, "folder": folder, "exact": evaluation.out / EXACT}
    # Engines that share a GPU say nothing of each other's speed.
    timed = len(set(evaluation.gpus)) == len(evaluation.gpus)
    spec = {"llm": llm, "kl": evaluation.kl, "timed": timed} | {key: str(path) for key, path in files.items()}
    file, log = work / f"{name}.json", folder / "engine.log"
    file.write_text(json.dumps(spec), encoding="utf-8")
    receive = lambda message: report(f"{name}: {message['stage']}", message["advance"])
    error = follow([*COMMAND, str(file)], log, receive, verbose=evaluation.verbose, env=os.environ | env, stop=stop)
    if error is None:
        log.unlink()
    return error
