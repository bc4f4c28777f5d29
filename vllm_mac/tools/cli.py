"""The command `vllm-mac`. Importing it imports neither torch nor vLLM; subcommands do."""

import math
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_mac import __version__
from vllm_mac.tools.calibrate.command import calibrate
from vllm_mac.tools.doctor.command import doctor
from vllm_mac.tools.eval.yardstick import ROUNDING
from vllm_mac.tools.options import Json, Mac, Plot, Seed, ShowProgress
from vllm_mac.tools.options import choice as _choice
from vllm_mac.tools.options import complain as _complain
from vllm_mac.tools.options import console as _console
from vllm_mac.tools.options import fail as _fail
from vllm_mac.tools.options import mapping as _mapping
from vllm_mac.tools.options import names as _names
from vllm_mac.tools.options import numbers as _numbers
from vllm_mac.tools.options import parse as _parse
from vllm_mac.tools.options import progress as _progress

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="markdown"
)
bench = typer.Typer(
    no_args_is_help=True,
    help="Measure MAC beside exact attention. Rows carry GPU, versions, command line and commit (where the code runs outside "
    "a checkout: what MAC_ATTENTION_COMMIT says, or unknown).",
)
app.add_typer(bench, name="bench")
app.command()(calibrate)
app.command()(doctor)


def main() -> None:
    # `timeout` and job schedulers send SIGTERM; what was measured is still to be written.
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """MAC attention for vLLM."""


def _pairs(between: str, choices: str, fits=lambda first, second: True):
    """A parser of comma-separated pairs of positive whole numbers."""

    def parse(text: str) -> tuple[tuple[int, int], ...]:
        try:
            pairs = tuple(tuple(int(part) for part in pair.split(between)) for pair in text.split(","))
        except ValueError:
            pairs = ()
        if pairs and all(len(pair) == 2 and min(pair) > 0 and fits(*pair) for pair in pairs):
            return pairs
        raise typer.BadParameter(f"received {text!r}; choose {choices}, separated by commas")

    return parse


_heads = _pairs("/", "query heads/KV heads such as 32/8, the former a multiple of the latter", lambda h, k: h % k == 0)
_shapes = _pairs("x", "requests at once x prompt tokens such as 1x122880")


@bench.command()
def kernel(
    batch: Annotated[str, typer.Option(help="Rows decoding at once.")] = "1,16,64",
    context: Annotated[str, typer.Option(help="Tokens in the cache of each row.")] = "131072",
    heads: Annotated[str, typer.Option(help="Query heads/KV heads.")] = "32/8,32/4",
    head_size: Annotated[int, typer.Option(min=32, max=256)] = 128,
    hit_rate: Annotated[
        str, typer.Option(help="Shares of heads to hit, each head by itself.")
    ] = "0,0.5,0.75,0.9,0.97,0.99,1",
    window: Annotated[int | None, typer.Option(help="MAC's window; 512 unless configured otherwise.")] = None,
    band: Annotated[int | None, typer.Option(help="MAC's band; 256 unless configured otherwise.")] = None,
    mean_lag: Annotated[
        int, typer.Option(min=1, help="Mean distance to the matched position, before it is clipped.")
    ] = 64,
    lags: Annotated[
        str, typer.Option(help="Distribution of that distance: geometric, uniform or constant.")
    ] = "geometric",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    page: Annotated[int, typer.Option(min=1, help="Tokens of a KV page.")] = 16,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers per graph; 24, 12 or 5 by batch.")] = None,
    between: Annotated[
        int, typer.Option(min=0, help="MiB of other memory to read between layers, as a model does its weights.")
    ] = 0,
    baselines: Annotated[
        str, typer.Option(help="Exact engines: FLASHINFER, FLASH_ATTN, or none.")
    ] = "FLASHINFER,FLASH_ATTN",
    mac: Mac = "{}",
    seed: Seed = 0,
    json_path: Json = None,
    plot: Plot = None,
    progress: ShowProgress = True,
) -> None:
    """Time one layer's decode attention in CUDA-graph replay, MAC beside the best exact decode.

    --batch, --context, --heads and --hit-rate take lists separated by commas; all combinations are
    measured. For each shape FlashInfer with tensor cores and FlashAttention run first (best exact is
    the faster), then MAC at each hit rate. Before any time is taken, results are compared with
    float32 PyTorch; a wrong one ends the run. Hits are made by the data: a ring entry near the head's
    query, at a random lag, or none; the match itself decides.

    A graph holds several layers with rings, queries and KV of their own, so that the chip's caches
    do not flatter; times are per layer. begin is what a step does once for all layers. Contexts
    below MAC's min_context have one row of MAC, where nothing is matched.

    One layer follows on another, which hides what starting a kernel costs. With --between they come as in a
    model, after a read of so much memory (a layer of Llama-3.1-8B has 416 MiB of weights), whose own time is taken off.

    The default run takes about 3 minutes and 50 GiB on an H200.
    """
    batches, contexts = (
        _parse("--batch", _numbers(int, 1, math.inf), batch),
        _parse("--context", _numbers(int, 2, math.inf), context),
    )
    pairs, rates = _parse("--heads", _heads, heads), _parse("--hit-rate", _numbers(float, 0, 1), hit_rate)
    exact = () if baselines == "none" else _names(baselines)
    keys = _parse("--mac", _mapping, mac)
    keys |= {key: value for key, value in (("window", window), ("band", band)) if value is not None}
    _choice("--lags", lags, ("geometric", "uniform", "constant"))
    _choice("--dtype", dtype, ("bfloat16", "float16"))
    for name in exact:
        _choice("--baselines", name, ("FLASHINFER", "FLASH_ATTN", "none"))
    with _results(json_path, plot) as rows:
        from vllm_mac.config import resolve
        from vllm_mac.tools.bench import kernel as measured

        measured.require_cuda()
        options = measured.Options(
            batches,
            contexts,
            pairs,
            rates,
            resolve(keys),
            head_size,
            dtype,
            page,
            lags,
            mean_lag,
            layers,
            seed,
            exact,
            between,
        )
        # Two more than rows: the read bandwidth and the cache.
        with _progress(progress, options.measurements() + 2) as tell:
            for row in measured.run(options, tell):
                rows.append(row)


@bench.command()
def decode(
    model: Annotated[
        str, typer.Option(help="A model's folder or name, or shape:llama-3.1-8b for that shape with dummy weights.")
    ],
    context: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of each request.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests at once, each with a prompt of its own; 1 unless given.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Several of both instead, measured one after another: 1x122880,8x100000 is BATCHxCONTEXT."),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Backends by name, or 'default' for vLLM's choice. MAC,FLASHINFER,FLASH_ATTN on GPUs, else MAC,default."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps measured.")] = 64,
    prompt: Annotated[str, typer.Option(help="A text file, 'words' (random ones) or 'ids' (random tokens).")] = "words",
    load_format: Annotated[str | None, typer.Option(help="As vLLM's; dummy for random weights.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="As vLLM's; just long enough unless given.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="No CUDA graphs and no compilation.")] = False,
    prefills: Annotated[
        int, typer.Option(min=1, help="Times the prompts are read, for the time to the first token.")
    ] = 1,
    mac: Mac = "{}",
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that one stage may take: the start, a warm-up, one reading of the prompts, the decoding."
        ),
    ] = 1200,
    seed: Seed = 0,
    json_path: Json = None,
    plot: Plot = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engines print.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Time a whole vLLM engine per output token, one backend after another.

    Each backend runs in a process of its own, one engine for all shapes; what fails becomes a row
    with its error. For each shape the engine warms up on the first 4096 tokens of each prompt. Then
    the prompts are read (PREFILLS times, the prefix cache emptied before each, so that every time to
    first token is of a whole prompt), and decoding goes on from the last reading. Only steps in which
    every request gets a token are timed: the time between one such step and the next. The hit rate
    and the share of KV read are those of the measured steps. Works on CPUs too.

    VLLM_* variables reach the engines: VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps each in one process.
    """
    from vllm_mac.tools.bench import decode as measured

    keys, arguments = _parse("--mac", _mapping, mac), _parse("--engine", _mapping, engine)
    if (shapes is None) == (context is None) or (shapes and batch):
        raise typer.BadParameter(
            "choose either --context, with --batch where it is not 1, or --shapes", param_hint="--shapes"
        )
    wanted = ((batch or 1, context),) if shapes is None else _parse("--shapes", _shapes, shapes)
    with _results(json_path, plot) as rows:
        on_gpu = rows.environment["gpu"] is not None
        names = _names(backends or ("MAC,FLASHINFER,FLASH_ATTN" if on_gpu else f"MAC,{measured.OWN}"))
        options = measured.Options(
            model,
            wanted,
            tokens,
            names,
            prompt,
            seed,
            load_format,
            max_model_len,
            eager,
            prefills,
            keys,
            arguments,
            timeout,
            verbose,
        )

        def keep(row: dict) -> None:
            rows.append(row)
            if "error" in row:
                print(
                    f"{row['engine']}, batch {row['batch']}, {row['context']} tokens: {row['error']}", file=sys.stderr
                )

        with _progress(progress, len(names) * len(wanted), done=True) as tell:
            try:
                measured.run(options, tell, keep)
            finally:
                measured.compare(rows)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@bench.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Files written by --json.")],
    plot: Plot = None,
) -> None:
    """Print the tables of earlier results, together, and plot them."""
    from vllm_mac.tools.bench import BenchError, report

    try:
        rows = [row for path in files for row in report.load(path)]
        report.show(rows, _console())
        if plot is not None:
            report.plot(rows, plot)
    except BenchError as error:
        _fail(error)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A model's folder or name.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="ruler, long, real, all, or names of tasks, separated by commas; ruler unless there are files."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and reply together, for each task.")] = "4096,16384",
    samples: Annotated[int, typer.Option(min=1, help="Prompts for each task and length.")] = 25,
    seed: Seed = 0,
    mac: Annotated[
        list[str] | None,
        typer.Option(
            help="A configuration as NAME=JSON, NAME=FILE or NAME=BUNDLED, or one of the latter two alone. Repeatable."
        ),
    ] = None,
    exact: Annotated[
        str | None,
        typer.Option(help="The backend to compare with, or 'default' for vLLM's choice. FLASHINFER on GPUs."),
    ] = None,
    yardstick: Annotated[
        str | None,
        typer.Option(
            help="Another exact backend to measure the difference that mere rounding makes, such as FLASH_ATTN. On CPUs, which "
            f"have one backend, a change of it: {', '.join(ROUNDING)}."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines {"prompt": ..., "answers": [...], "max_tokens": ...}.')
    ] = None,
    longbench: Annotated[Path | None, typer.Option(help="A local copy of LongBench v2's JSON.")] = None,
    kl: Annotated[
        int, typer.Option(min=0, help="Prompts whose last 256 tokens are decoded under teacher forcing; 0 for none.")
    ] = 8,
    audit: Annotated[
        bool, typer.Option("--audit/--no-audit", help="Compute hits exactly too, to count their error.")
    ] = True,
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    gpus: Annotated[
        str | None,
        typer.Option(
            help="GPUs as CUDA_VISIBLE_DEVICES takes them, separated by commas: exact attention runs on the first, then the "
            "configurations side by side, one at a time on each. A GPU named twice serves two at a time: then lower "
            "gpu_memory_utilization with --engine."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the run; named by model and time unless given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file too.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the plot of the scores, or of KL where there are none, to this file too.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engines print.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Compare a model's answers under MAC with those under exact attention, on the same prompts.

    Exact attention and each --mac configuration answer all prompts, greedily, in a vLLM engine of
    their own. The folder holds each answer as soon as it is there, then results.json, results.md
    and plots: scores, how far tokens agree, KL divergence of the next token under teacher forcing,
    and by layer the hit rate, the KV tokens read and the error of what was reused.

    Tasks are generated from the seed: retrieval, tracing and counting as in RULER (ruler), long
    structured plans as in LongGenBench (long), and requests about docstrings and sources of Python's
    standard library (real), which have no right answer and so no score. LongBench v2 is asked with
    chain of thought. --kl decodes the end of a prompt and exact's answer to it, token by token, with
    both. --yardstick runs another exact backend on the same prompts and texts: what reuse changes is
    to be read against what that changes.
    """
    from vllm_mac.config import MacConfigError
    from vllm_mac.tools.bench import BenchError, report
    from vllm_mac.tools.eval import EvalError

    out = out or Path(f"mac-eval-{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        from vllm_mac.tools.eval import plots, requests, run
        from vllm_mac.tools.eval import report as tables
        from vllm_mac.tools.eval.results import RESULTS
        from vllm_mac.tools.eval.yardstick import OWN, choose

        environment = report.environment()
        named = tasks if tasks is not None else None if prompts or longbench else "ruler"
        arguments, against = (
            _parse("--engine", _mapping, engine),
            exact or ("FLASHINFER" if environment["gpu"] else OWN),
        )
        options = run.Options(
            model, out, requests.names(named) if named is not None else (), _parse("--lengths", _numbers(int, 1, math.inf), lengths),
            samples, seed, prompts, longbench, _configurations(mac or ["default"], audit), against,
            choose(yardstick, against, environment["gpu"] is not None) if yardstick is not None else None, arguments, kl, resume, verbose,
            run.gpus(gpus, arguments) if gpus is not None else (),
        )  # fmt: skip
        run.check_folder(out, resume)
        report.require_matplotlib()  # better now than after the answers
        with Console(stderr=True).status("making the prompts") if progress else nullcontext():
            made = run.prompts(options)
        with _progress(progress, run.steps(options, made), done=True) as tell:
            results = run.run(options, made, environment, tell)
        written = tables.write(results, out)
        tables.show(results, _console())
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / RESULTS, json_path)
        if plot is not None:
            if (figure := plots.scores(results) or plots.by_reads(results)) is None:
                raise EvalError("--plot: no prompt has answers and --kl is 0, so there is nothing to plot")
            plots.save(figure, results, plot)
        print(f"{out}: {RESULTS}, {', '.join(path.name for path in written)}", file=sys.stderr)
        if run.INTERRUPTED in results["errors"].values():
            raise KeyboardInterrupt
    except (EvalError, BenchError, MacConfigError, ImportError) as error:
        _fail(error)
    except KeyboardInterrupt:
        begun = (out / "run.json").is_file()
        print(f"interrupted{f'; the same command with --resume --out {out} goes on' if begun else ''}", file=sys.stderr)
        raise typer.Exit(130) from None
    if results["errors"]:
        raise typer.Exit(1)


def _configurations(given: list[str], audit: bool) -> dict[str, dict]:
    """Every key of each configuration, by name. Raises MacConfigError for wrong keys."""
    from vllm_mac.config import resolve

    found: dict[str, dict] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            name, value = Path(text).stem, text
        if not re.fullmatch(r"[\w.-]+", name) or name in ("exact", "yardstick", ".", "..") or name in found:
            raise typer.BadParameter(
                f"received {text!r}; choose NAME=JSON, NAME=FILE or NAME=BUNDLED, each with a name of its own, of letters, "
                "digits, '.', '_' and '-', not 'exact' or 'yardstick'",
                param_hint="--mac",
            )
        keys = _parse("--mac", _mapping, value) if value.lstrip().startswith("{") else {"config": value}
        found[name] = resolve(keys).model_dump(mode="json")
        if audit and found[name].get("audit") == 0:
            found[name]["audit"] = 1.0
    return found


class _Rows(list):
    """Rows, each of which gets the facts of the machine when it is added."""

    def __init__(self, environment: dict):
        self.environment = environment

    def append(self, row: dict) -> None:
        super().append({**row, **self.environment})


@contextmanager
def _results(json_path: Path | None, plot: Path | None):
    """A list to add rows to; shown, saved and plotted at the end, also after Ctrl-C or an error."""
    from vllm_mac.config import MacConfigError
    from vllm_mac.tools.bench import BenchError, report

    code, rows = 0, None
    try:
        if plot is not None:
            report.require_matplotlib()  # better now than after the measurements
        rows = _Rows(report.environment())
        yield rows
    except (BenchError, MacConfigError, ImportError) as error:
        code = _complain(error)
    except KeyboardInterrupt:
        print("interrupted; what was measured until then follows", file=sys.stderr)
        code = 130
    finally:
        if rows:
            report.show(rows, _console())
            if json_path is not None:
                report.save(rows, json_path)
                print(f"{len(rows)} rows in {json_path}", file=sys.stderr)
            if plot is not None:
                try:
                    report.plot(rows, plot)
                except BenchError as error:
                    code = code or _complain(error)
    if code:
        raise typer.Exit(code)
