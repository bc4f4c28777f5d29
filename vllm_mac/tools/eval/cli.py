"""The command `vllm-mac eval`. Importing it imports neither torch nor vLLM."""

import math
import re
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_mac.tools import ToolError, option_types, terminal
from vllm_mac.tools.eval.yardstick import ROUNDING
from vllm_mac.tools.option_types import Engine, Seed, ShowProgress


def evaluate(
    model: Annotated[str, typer.Option(help="A model's folder or name.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            help="ruler, long, real, all, or names of tasks, separated by commas. By default ruler, or none with --prompts or --longbench."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and reply together; every task is made at each length.")
    ] = "4096,16384",
    samples: Annotated[int, typer.Option(min=1, help="Prompts for each task and length.")] = 25,
    seed: Seed = 0,
    mac: Annotated[
        list[str] | None,
        typer.Option(
            help="A configuration: NAME=JSON, NAME=FILE or NAME=BUNDLED, or FILE or BUNDLED alone. Repeatable."
        ),
    ] = None,
    exact: Annotated[
        str | None,
        typer.Option(help="The backend to compare with; 'default' is vLLM's choice. By default FLASHINFER on GPUs."),
    ] = None,
    yardstick: Annotated[
        str | None,
        typer.Option(
            help="Another exact backend, such as FLASH_ATTN, to measure the effect of rounding alone. CPUs have one backend; "
            f"there the yardstick is a change of it: {', '.join(ROUNDING)}."
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
        bool,
        typer.Option("--audit/--no-audit", help="With rule: match, also compute hits exactly, to count their error."),
    ] = True,
    engine: Engine = "{}",
    gpus: Annotated[
        str | None,
        typer.Option(
            help="GPUs as in CUDA_VISIBLE_DEVICES, separated by commas. Exact attention runs on the first one, then the "
            "configurations run in parallel, one on each GPU. A GPU named twice runs two at a time: then lower "
            "gpu_memory_utilization with --engine."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the run; by default its name has the model and the time.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also write the plot of the scores, or of KL without scores, to this file.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engines print.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Compare a model's answers under MAC with those under exact attention, on the same prompts.

    Exact attention and each --mac configuration answer all prompts greedily, each in its own vLLM engine. Each answer
    is written to the folder when it is finished. At the end the folder has results.json, results.md and plots: scores,
    how far tokens agree, KL divergence of the next token under teacher forcing, and by layer the hit rate, the KV
    tokens read and the error of reuse.

    Tasks are generated from the seed: retrieval, tracing and counting as in RULER (ruler), long structured plans as in
    LongGenBench (long), and requests about docstrings and sources of Python's standard library (real). The last have no
    right answer and no score. LongBench v2 is asked with chain of thought. --kl decodes the end of a prompt and exact
    attention's answer to it under each configuration. --yardstick runs another exact backend on the same prompts and
    texts: compare the effect of reuse with its effect.
    """
    from vllm_mac.config import MacConfigError
    from vllm_mac.tools.eval import EvalError

    out = out or Path(f"mac-eval-{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        from vllm_mac.tools.environment import environment
        from vllm_mac.tools.eval import evaluation, plots, requests, result_tables
        from vllm_mac.tools.eval.results import RESULTS
        from vllm_mac.tools.eval.yardstick import OWN, choose
        from vllm_mac.tools.plotting import require_matplotlib

        here = environment()
        named = tasks if tasks is not None else None if prompts or longbench else "ruler"
        arguments = option_types.parse("--engine", option_types.mapping, engine)
        against = exact or ("FLASHINFER" if here["gpu"] else OWN)
        wanted = evaluation.Evaluation(
            model=model,
            out=out,
            tasks=requests.names(named) if named is not None else (),
            lengths=option_types.parse("--lengths", option_types.numbers(int, 1, math.inf), lengths),
            samples=samples,
            seed=seed,
            prompts=prompts,
            longbench=longbench,
            mac=configurations(mac or ["default"], audit),
            exact=against,
            yardstick=choose(yardstick, against, here["gpu"] is not None) if yardstick is not None else None,
            engine=arguments,
            kl=kl,
            resume=resume,
            verbose=verbose,
            gpus=evaluation.gpus(gpus, arguments) if gpus is not None else (),
        )
        evaluation.check_folder(out, resume)
        require_matplotlib()  # better now than after the answers
        with Console(stderr=True).status("making the prompts") if progress else nullcontext():
            made = evaluation.prompts(wanted)
        with terminal.progress(progress, evaluation.steps(wanted, made), done=True) as report:
            results = evaluation.run(wanted, made, here, report)
        written = result_tables.write(results, out)
        result_tables.show(results, terminal.console())
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / RESULTS, json_path)
        if plot is not None:
            if (figure := plots.scores(results) or plots.by_reads(results)) is None:
                raise EvalError("--plot: no prompt has answers and --kl is 0, so there is nothing to plot")
            plots.save(figure, results, plot)
        print(f"{out}: {RESULTS}, {', '.join(path.name for path in written)}", file=sys.stderr)
        if evaluation.INTERRUPTED in results["errors"].values():
            raise KeyboardInterrupt
    except (ToolError, MacConfigError, ImportError) as error:
        terminal.fail(error)
    except KeyboardInterrupt:
        begun = (out / "run.json").is_file()
        print(f"interrupted{f'; the same command with --resume --out {out} goes on' if begun else ''}", file=sys.stderr)
        raise typer.Exit(130) from None
    if results["errors"]:
        raise typer.Exit(1)


def configurations(given: list[str], audit: bool) -> dict[str, dict]:
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
        keys = (
            option_types.parse("--mac", option_types.mapping, value)
            if value.lstrip().startswith("{")
            else {"config": value}
        )
        found[name] = resolve(keys).model_dump(mode="json")
        if audit and found[name]["rule"] == "match" and found[name]["audit"] == 0:
            found[name]["audit"] = 1.0
    return found
