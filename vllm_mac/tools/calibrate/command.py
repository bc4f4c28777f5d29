"""The command `vllm-mac calibrate`. Importing it imports neither torch nor vLLM."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_mac.tools import options
from vllm_mac.tools.options import Mac, Plot, Seed, ShowProgress

# What is tried where the command line does not say. By its divergence one setting is tried for all layers.
_ERROR = {
    "--thresholds": "0.1,0.2,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7,0.75,0.8,0.85,0.9", "--bands": "128,256,512", "--sinks": "0,4",
    "--lag-weights": "0,4", "--reuse": "anchored,chained", "--max-chain": "none", "--distance": "absolute", "--mass-floor": "0.2",
}  # fmt: skip
_KL = {
    "--thresholds": "0.1,0.3,0.45,0.6,0.7,0.8,0.85,0.9", "--bands": "256", "--sinks": "0", "--lag-weights": "0", "--reuse": "anchored",
    "--max-chain": "none", "--distance": "absolute", "--mass-floor": "0.2",
}  # fmt: skip
_BUDGET = (0.05, 2e-5)  # of simulated metrics: relative error, and that of output
_CALIBRATED = {
    "threshold": "--thresholds", "band": "--bands", "sink": "--sinks", "lag_weight": "--lag-weights", "reuse": "--reuse",
    "max_chain": "--max-chain", "distance": "--distance", "mass_floor": "--mass-floor",
}  # fmt: skip


def calibrate(
    out: Annotated[Path, typer.Option(help="The YAML file to write; vLLM takes it as the key 'config' of MAC.")],
    model: Annotated[str | None, typer.Option(help="A model's folder or name.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"prompt": ..., "max_tokens": ...}, or a .txt file that is cut into pieces.'),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead: ruler, long, real, all, or names of generated tasks, separated by commas."),
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of each task, reply included, or of each piece of a text.")
    ] = 8192,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task, or pieces of a text.")] = 4,
    reply: Annotated[
        int | None,
        typer.Option(
            min=0, help="Most tokens of the model's own greedy reply that are measured too; as many as --steps."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens at the end of each prompt that are decoded, 512; with kl of a prompt without a reply, 256.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Most error that a layer may have on --metric, 0.05 unless given, with output 0.00002; with kl of all layers, 0.0005.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="kl: divergence of the next token's distribution, in nats a token, over replies that are decoded again and again. "
            "p50, p95 or p99 of the relative error of heads that hit, or mean over all heads; output: squared error after W_O over "
            "the residual's squared norm, mean over tokens: simulated. kl, or p95 with --measured."
        ),
    ] = None,
    saving: Annotated[
        float | None, typer.Option(help="Instead of a budget: the share of KV reads to save, at the least error.")
    ] = None,
    min_saving: Annotated[
        float, typer.Option(min=0, max=1, help="Layers that save a smaller share of their KV reads stay exact.")
    ] = 0.05,
    thresholds: Annotated[
        str | None, typer.Option(help=f"Tried in each layer by itself; {_KL['--thresholds']} with kl, else more.")
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            help="For all layers together, as are the keys below; with kl one value each. 256 with kl, else 128,256,512."
        ),
    ] = None,
    sinks: Annotated[
        str | None, typer.Option(help="Leading tokens that no summary contains; 0 with kl, else 0,4.")
    ] = None,
    lag_weights: Annotated[
        str | None, typer.Option(help="How much a recent match is preferred; 0 takes the nearest. 0 with kl, else 0,4.")
    ] = None,
    reuse: Annotated[str | None, typer.Option(help="anchored, chained or both; anchored with kl, else both.")] = None,
    max_chain: Annotated[str | None, typer.Option(help="Numbers, or none for no cap; none unless given.")] = None,
    distance: Annotated[str | None, typer.Option(help="absolute, relative or both; absolute unless given.")] = None,
    mass_floor: Annotated[
        str | None,
        typer.Option(
            help="How far off a match of little weight may be: numbers, or none for one limit; 0.2 unless given."
        ),
    ] = None,
    mac: Mac = "{}",
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    seed: Seed = 0,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Keep the measurements in this file. With kl a stopped run goes on from it, else it is for --measured (.npz)."
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Choose from a file of --keep, of a simulated metric; no model runs.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    plot: Plot = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engine prints.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Choose each layer's threshold, and the keys that layers share, by the error they cause on your prompts.

    With --metric kl the model replies to each prompt with exact attention. The replies are then decoded
    again by MAC under teacher forcing, one layer and one threshold at a time with all other layers exact,
    which tells what each costs in the distribution of the next token and what it reads. The thresholds
    whose costs add up to the budget at the fewest KV reads are run together, and taken back until what is
    measured is within it. Prompts without a reply have their last --steps tokens decoded.

    With the other metrics the last --steps positions are decoded as MAC would in a simulation, layer by
    layer, under every combination of the listed values at once: which heads hit, what they read, and how
    far their output is from exact attention. Of all combinations whose every layer stays within the budget
    the one that reads the fewest KV tokens is chosen. An error in one layer can matter a thousand times
    more than the same in another, which only kl sees.

    The choice is written to --out; layers that cannot stay within the budget are left exact. Half of the
    prompts are held out: the choice is reported on them too.

    --mac gives the keys that are not calibrated: window, min_context, layers.include, ... With kl every
    threshold of every layer is one more pass over half of the prompts; --keep lets a stopped run go on. Else
    time and memory go with the number of combinations, and choosing again from --keep's file takes seconds.
    """
    from vllm_mac.config import MacConfigError
    from vllm_mac.tools.bench import BenchError, report
    from vllm_mac.tools.calibrate import CalibrateError
    from vllm_mac.tools.calibrate.measured import METRICS
    from vllm_mac.tools.eval import EvalError

    metric = options.choice("--metric", metric or ("p95" if measured else "kl"), ("kl", *METRICS))
    by_kl, given = metric == "kl", {
        "--thresholds": thresholds, "--bands": bands, "--sinks": sinks, "--lag-weights": lag_weights, "--reuse": reuse,
        "--max-chain": max_chain, "--distance": distance, "--mass-floor": mass_floor,
    }  # fmt: skip
    steps = steps or (256 if by_kl else 512)
    values = {
        option: default if (text := given[option]) is None else text
        for option, default in (_KL if by_kl else _ERROR).items()
    }
    if by_kl and budget == 0:
        raise typer.BadParameter(
            "received 0; choose a divergence above 0: rounding alone has some", param_hint="--budget"
        )
    for option, text in values.items():
        if by_kl and option != "--thresholds" and len(options.names(text)) != 1:
            raise typer.BadParameter(
                f"received {text!r}; --metric kl takes one value, for all layers", param_hint=option
            )
    if by_kl and keep is not None and keep.suffix == ".npz":
        raise typer.BadParameter(
            f"received {keep}; of --metric kl lines of JSON are kept: choose another ending, or p95 for --metric",
            param_hint="--keep",
        )
    if by_kl and measured:
        raise typer.BadParameter(
            "kl is measured anew; choose p50, p95, p99 or mean for --metric", param_hint="--measured"
        )
    if saving is not None and (budget is not None or not 0 < saving < 1):
        raise typer.BadParameter(
            f"received {saving:g}; choose a share between 0 and 1, without --budget", param_hint="--saving"
        )
    keys = options.parse("--mac", options.mapping, mac)
    for key, option in _CALIBRATED.items():
        if key in keys:
            raise typer.BadParameter(f"{key} is calibrated; give the values to try with {option}", param_hint="--mac")
    whole = lambda option, text, low: options.parse(option, options.numbers(int, low, math.inf), text)
    chains = tuple(
        None if part == "none" else whole("--max-chain", part, 1)[0] for part in options.names(values["--max-chain"])
    )
    floors = tuple(
        None if part == "none" else options.parse("--mass-floor", options.numbers(float, 1e-3, math.inf), part)[0]
        for part in options.names(values["--mass-floor"])
    )
    tried = {
        "--bands": whole("--bands", values["--bands"], 1), "--sinks": whole("--sinks", values["--sinks"], 0),
        "--thresholds": options.parse("--thresholds", options.numbers(float, 0, 1), values["--thresholds"]),
        "--lag-weights": options.parse("--lag-weights", options.numbers(float, 0, math.inf), values["--lag-weights"]),
    }  # fmt: skip
    chosen = {option: options.names(values[option]) for option in ("--reuse", "--distance")}
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
        from vllm_mac.config import resolve
        from vllm_mac.tools.calibrate import by_kl as kl_results
        from vllm_mac.tools.calibrate import report as results
        from vllm_mac.tools.calibrate import run
        from vllm_mac.tools.calibrate.choose import Rule
        from vllm_mac.tools.calibrate.grid import Grid
        from vllm_mac.tools.calibrate.measured import Measured
        from vllm_mac.tools.calibrate.report import save
        from vllm_mac.tools.eval import requests

        environment = report.environment()
        if measured is None:
            # Whatever else a file of --mac says of the keys that are calibrated.
            base = keys | {"band": min(tried["--bands"]), "sink": min(tried["--sinks"])}
            if by_kl:
                single = {
                    "reuse": chosen["--reuse"],
                    "distance": chosen["--distance"],
                    "lag_weight": tried["--lag-weights"],
                    "max_chain": chains,
                }
                single["mass_floor"] = floors
                base |= {key: value for key, (value,) in single.items()}
            base = resolve(base)
            grid = Grid(
                base.window, base.min_context, steps, tried["--thresholds"], tried["--bands"], tried["--sinks"], tried["--lag-weights"],
                chosen["--reuse"], chains or (None,), chosen["--distance"], floors or (None,),
            )  # fmt: skip
            wanted = run.Options(
                model, grid, base, prompts, requests.names(tasks) if tasks else (), length, samples, reply, seed,
                options.parse("--engine", options.mapping, engine), verbose, metric == "output",
            )  # fmt: skip
            run.check(grid)
            with Console(stderr=True).status("making the prompts") if progress else nullcontext():
                if by_kl:
                    made = run.prompts(
                        wanted, kl_results.FIXED, lambda request: 0 if kl_results.reply(wanted, request) else steps + 1
                    )
                else:
                    made = run.prompts(wanted)
            if by_kl:
                limit = None if saving is not None else 0.0005 if budget is None else budget
                if warning := kl_results.few(kl_results.decoded(wanted, made)):
                    print(f"vllm-mac: at most {warning}", file=sys.stderr)
                with options.progress(
                    progress, None, done=True
                ) as tell:  # how many layers there are only the engine knows
                    told, results = (
                        kl_results.measure(wanted, made, limit, saving, min_saving, environment, tell, keep),
                        kl_results,
                    )
            else:
                with options.progress(progress, len(made), done=True) as tell:
                    found = run.measure(wanted, made, environment, tell)
                if keep is not None:
                    found.save(keep)
        else:
            found = Measured.load(measured)
        if not by_kl:
            rule = Rule(metric, min_saving)
            limit = None if saving is not None else _BUDGET[metric == "output"] if budget is None else budget
            told = results.collect(found, rule, limit, saving, environment)
        results.write_config(told, out)
        results.show(told, options.console())
        if json_path is not None:
            save(told, json_path)
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(results.markdown(told), encoding="utf-8")
        if plot is not None:
            results.plot(told, plot)
        print(
            f"written: {', '.join(str(path) for path in (out, json_path, markdown, plot) if path is not None)}",
            file=sys.stderr,
        )
    except (CalibrateError, EvalError, BenchError, MacConfigError, ImportError) as error:
        options.fail(error)
    except KeyboardInterrupt:
        on = (
            ""
            if not by_kl
            else "; the same command goes on with what --keep has"
            if keep
            else "; --keep FILE keeps what is measured"
        )
        print(f"interrupted; nothing was chosen{on}", file=sys.stderr)
        raise typer.Exit(130) from None
