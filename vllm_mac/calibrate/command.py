"""The command `vllm-mac calibrate`. Importing it imports neither torch nor vLLM."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_mac import options
from vllm_mac.options import Mac, Plot, Seed, ShowProgress

_CALIBRATED = {
    "threshold": "--thresholds", "band": "--bands", "sink": "--sinks", "lag_weight": "--lag-weights", "reuse": "--reuse",
    "max_chain": "--max-chain", "distance": "--distance",
}  # fmt: skip


def calibrate(
    out: Annotated[Path, typer.Option(help="The YAML file to write; vLLM takes it as the key 'config' of MAC.")],
    model: Annotated[str | None, typer.Option(help="A model's folder or name.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines {"prompt": ..., "max_tokens": ...}, or a .txt file that is cut into pieces.')
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Instead: ruler, long, all, or names of generated tasks, separated by commas.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each task, reply included, or of each piece of a text.")] = 8192,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task, or pieces of a text.")] = 4,
    reply: Annotated[
        int | None, typer.Option(min=0, help="Most tokens of the model's own greedy reply that are measured too; as many as --steps.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens at the end of each prompt that are decoded.")] = 512,
    budget: Annotated[float | None, typer.Option(min=0, help="Most error that a layer may have on --metric. 0.05 unless --saving is given.")] = None,
    metric: Annotated[str, typer.Option(help="p50, p95 or p99 of the relative error of heads that hit, or mean over all heads.")] = "p95",
    saving: Annotated[float | None, typer.Option(help="Instead of a budget: the share of KV reads to save, at the least error.")] = None,
    min_saving: Annotated[float, typer.Option(min=0, max=1, help="Layers that save a smaller share of their KV reads stay exact.")] = 0.05,
    thresholds: Annotated[str, typer.Option(help="Tried in each layer by itself.")] = "0.1,0.2,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7,0.75,0.8,0.9",
    bands: Annotated[str, typer.Option(help="Tried for all layers together, as are the keys below.")] = "128,256,512",
    sinks: Annotated[str, typer.Option(help="Leading tokens that no summary contains.")] = "0,4",
    lag_weights: Annotated[str, typer.Option(help="How much a recent match is preferred; 0 takes the nearest.")] = "0,4",
    reuse: Annotated[str, typer.Option(help="anchored, chained or both.")] = "anchored,chained",
    max_chain: Annotated[str, typer.Option(help="Numbers, or none for no cap.")] = "none",
    distance: Annotated[str, typer.Option(help="absolute, relative or both.")] = "absolute",
    mac: Mac = "{}",
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    seed: Seed = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep the measurements in this file (.npz).")] = None,
    measured: Annotated[Path | None, typer.Option(help="Choose from a file of --keep; no model runs.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    plot: Plot = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engine prints.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Choose each layer's threshold, and the keys that layers share, by the error they cause on your prompts.

    The model reads each prompt with exact attention. The last --steps positions are then decoded as MAC
    would, layer by layer, under every combination of the listed values at once: which heads hit, what
    they read, and how far their output is from exact attention. Of all combinations whose every layer
    stays within the budget the one that reads the fewest KV tokens is written to --out; layers that cannot
    are left exact. Half of the prompts are held out: the choice is reported on them too.

    --mac gives the keys that are not calibrated: window, min_context, layers.include, ... Time and memory
    go with the number of combinations; choosing again from --keep's file takes seconds.
    """
    from vllm_mac.bench import BenchError, report
    from vllm_mac.calibrate import CalibrateError
    from vllm_mac.calibrate.measured import METRICS
    from vllm_mac.config import MacConfigError
    from vllm_mac.eval import EvalError

    options.choice("--metric", metric, METRICS)
    if saving is not None and (budget is not None or not 0 < saving < 1):
        raise typer.BadParameter(f"received {saving:g}; choose a share between 0 and 1, without --budget", param_hint="--saving")
    keys = options.parse("--mac", options.mapping, mac)
    for key, option in _CALIBRATED.items():
        if key in keys:
            raise typer.BadParameter(f"{key} is calibrated; give the values to try with {option}", param_hint="--mac")
    whole = lambda option, text, low: options.parse(option, options.numbers(int, low, math.inf), text)
    chains = tuple(None if part == "none" else whole("--max-chain", part, 1)[0] for part in options.names(max_chain))
    tried = {
        "--bands": whole("--bands", bands, 1), "--sinks": whole("--sinks", sinks, 0),
        "--thresholds": options.parse("--thresholds", options.numbers(float, 0, 1), thresholds),
        "--lag-weights": options.parse("--lag-weights", options.numbers(float, 0, math.inf), lag_weights),
    }  # fmt: skip
    chosen = {"--reuse": options.names(reuse), "--distance": options.names(distance)}
    for option, choices in (("--reuse", ("anchored", "chained")), ("--distance", ("absolute", "relative"))):
        for name in chosen[option] or ("",):
            options.choice(option, name, choices)
    if (model is None) == (measured is None):
        raise typer.BadParameter("choose --model to measure, or --measured to choose from a file", param_hint="--model")
    if measured is None and (prompts is None) == (tasks is None):
        raise typer.BadParameter("choose --prompts FILE or --tasks NAMES", param_hint="--prompts")
    try:
        if plot is not None:
            report.require_matplotlib()
        from vllm_mac.calibrate import report as results
        from vllm_mac.calibrate import run
        from vllm_mac.calibrate.choose import Rule
        from vllm_mac.calibrate.grid import Grid
        from vllm_mac.calibrate.measured import Measured
        from vllm_mac.config import resolve
        from vllm_mac.eval import requests

        environment = report.environment()
        if measured is None:
            # Whatever else a file of --mac says of the keys that are calibrated.
            base = resolve(keys | {"band": min(tried["--bands"]), "sink": min(tried["--sinks"])})
            grid = Grid(
                base.window, base.min_context, steps, tried["--thresholds"], tried["--bands"], tried["--sinks"], tried["--lag-weights"],
                chosen["--reuse"], chains or (None,), chosen["--distance"],
            )  # fmt: skip
            wanted = run.Options(
                model, grid, base, prompts, requests.names(tasks) if tasks else (), length, samples, reply, seed,
                options.parse("--engine", options.mapping, engine), verbose,
            )  # fmt: skip
            run.check(grid)
            with Console(stderr=True).status("making the prompts") if progress else nullcontext():
                made = run.prompts(wanted)
            with options.progress(progress, len(made), done=True) as tell:
                found = run.measure(wanted, made, environment, tell)
            if keep is not None:
                found.save(keep)
        else:
            found = Measured.load(measured)
        rule = Rule(metric, min_saving)
        told = results.collect(found, rule, None if saving is not None else 0.05 if budget is None else budget, saving, environment)
        results.write_config(told, out)
        results.show(told, options.console())
        if json_path is not None:
            results.save(told, json_path)
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(results.markdown(told), encoding="utf-8")
        if plot is not None:
            results.plot(told, plot)
        print(f"written: {', '.join(str(path) for path in (out, json_path, markdown, plot) if path is not None)}", file=sys.stderr)
    except (CalibrateError, EvalError, BenchError, MacConfigError, ImportError) as error:
        options.fail(error)
    except KeyboardInterrupt:
        print("interrupted; nothing was chosen", file=sys.stderr)
        raise typer.Exit(130) from None
