"""The command `vllm-mac calibrate`. Importing it imports neither torch nor vLLM."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_mac.tools import ToolError, option_types, terminal
from vllm_mac.tools.option_types import Engine, Mac, Plot, Seed, ShowProgress

# The values that are tried unless the command line gives others. With --metric kl all layers share one setting.
_SIMULATED = {
    "--thresholds": "0.1,0.2,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7,0.75,0.8,0.85,0.9", "--bands": "128,256,512", "--sinks": "0,4",
    "--lag-weights": "0,4", "--reuse": "anchored,chained", "--max-chain": "none", "--distance": "absolute", "--mass-floor": "0.2",
}  # fmt: skip
_KL = {
    "--thresholds": "0.1,0.3,0.45,0.6,0.7,0.8,0.85,0.9", "--bands": "256", "--sinks": "0", "--lag-weights": "0", "--reuse": "anchored",
    "--max-chain": "none", "--distance": "absolute", "--mass-floor": "0.2",
}  # fmt: skip
# Budgets unless given: mean KL in nats a token; relative error; squared error after W_O over the residual's.
_KL_BUDGET, _ERROR_BUDGET, _OUTPUT_BUDGET = 0.0005, 0.05, 2e-5
_CALIBRATED = {
    "threshold": "--thresholds", "band": "--bands", "sink": "--sinks", "lag_weight": "--lag-weights", "reuse": "--reuse",
    "max_chain": "--max-chain", "distance": "--distance", "mass_floor": "--mass-floor",
}  # fmt: skip


def calibrate(
    out: Annotated[Path, typer.Option(help="The YAML file to write; use it as MAC's key 'config'.")],
    model: Annotated[str | None, typer.Option(help="A model's folder or name.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"prompt": ..., "max_tokens": ...}, or a .txt file, which is cut into prompts of --length tokens.'
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of --prompts: ruler, long, real, all, or names of generated tasks, separated by commas."
        ),
    ] = None,
    length: Annotated[
        int,
        typer.Option(min=1, help="Tokens of each generated task, reply included, or of each prompt cut from a text."),
    ] = 8192,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task, or prompts cut from a text.")] = 4,
    reply: Annotated[
        int | None,
        typer.Option(
            min=0, help="The most tokens of the model's own greedy reply to measure too; by default as many as --steps."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens to decode at the end of each prompt, by default 512. With kl, of a prompt without a reply, by default 256.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The most error of a layer on --metric, by default 0.05, with output 0.00002. With kl, of all layers together, 0.0005.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="kl: divergence of the next token's distribution, in nats a token, over replies that are decoded repeatedly. Simulated: "
            "p50, p95 or p99 of the relative error of heads that hit, mean over all heads, or output: squared error after W_O over "
            "the residual's squared norm, mean over tokens. By default kl, or p95 with --measured."
        ),
    ] = None,
    saving: Annotated[
        float | None, typer.Option(help="Instead of --budget: the share of KV reads to save, with the least error.")
    ] = None,
    min_saving: Annotated[
        float, typer.Option(min=0, max=1, help="Layers that save a smaller share of their KV reads stay exact.")
    ] = 0.05,
    thresholds: Annotated[
        str | None,
        typer.Option(help=f"Thresholds to try in each layer; by default {_KL['--thresholds']} with kl, else more."),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            help="Bands to try. Layers share this key and those below; with kl each takes one value. 256 with kl, else 128,256,512."
        ),
    ] = None,
    sinks: Annotated[
        str | None, typer.Option(help="Sinks to try: leading tokens that no summary has. 0 with kl, else 0,4.")
    ] = None,
    lag_weights: Annotated[
        str | None, typer.Option(help="How much to prefer a recent match; 0 takes the nearest. 0 with kl, else 0,4.")
    ] = None,
    reuse: Annotated[str | None, typer.Option(help="anchored, chained or both. anchored with kl, else both.")] = None,
    max_chain: Annotated[str | None, typer.Option(help="Numbers, or none for no limit; by default none.")] = None,
    distance: Annotated[str | None, typer.Option(help="absolute, relative or both; by default absolute.")] = None,
    mass_floor: Annotated[
        str | None,
        typer.Option(help="How far a match of little weight may be: numbers, or none for one limit; by default 0.2."),
    ] = None,
    mac: Mac = "{}",
    engine: Engine = "{}",
    seed: Seed = 0,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Keep the measurements in this file. With kl a stopped run continues from it; else it is for --measured (.npz)."
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Choose from a file that --keep wrote with a simulated metric; no model runs.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    plot: Plot = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engine prints.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Choose each layer's threshold, and the keys that layers share, by their error on your prompts.

    With --metric kl the model first replies to each prompt with exact attention. MAC then decodes the replies under
    teacher forcing, with one layer and one threshold at a time and all other layers exact. This measures the cost of
    each in the next token's distribution, and its KV reads. The command takes the thresholds with the fewest KV reads
    whose costs add up to the budget, runs them together, and makes them stricter until the measured cost is within the
    budget. Of a prompt without a reply the last --steps tokens are decoded.

    With the other metrics a simulation decodes the last --steps positions as MAC would, layer by layer, under every
    combination of the listed values. It records which heads hit, what they read, and how far their output is from exact
    attention. Of the combinations in which every layer stays within the budget, the one with the fewest KV reads is
    chosen. The same error can matter a thousand times more in one layer than in another; only kl sees this.

    The choice is written to --out. Layers that cannot stay within the budget stay exact. Half of the prompts are held
    out, and the choice is reported on them too.

    --mac has the keys that are not calibrated: window, min_context, layers.include, ... Thresholds are of rule: match:
    it runs under this rule and writes it to --out, whatever a file that --mac names says. With kl every threshold of
    every layer is another pass over half of the prompts; with --keep a stopped run can continue. With the other metrics,
    time and memory grow with the number of combinations, and choosing again from --keep's file takes seconds.
    """
    from vllm_mac.config import MacConfigError
    from vllm_mac.tools.calibrate.measured import METRICS

    metric = option_types.choice("--metric", metric or ("p95" if measured else "kl"), ("kl", *METRICS))
    kl, given = metric == "kl", {
        "--thresholds": thresholds, "--bands": bands, "--sinks": sinks, "--lag-weights": lag_weights, "--reuse": reuse,
        "--max-chain": max_chain, "--distance": distance, "--mass-floor": mass_floor,
    }  # fmt: skip
    texts = (_KL if kl else _SIMULATED) | {option: text for option, text in given.items() if text is not None}
    if kl:
        _check_kl(texts, budget, keep, measured)
    if saving is not None and (budget is not None or not 0 < saving < 1):
        raise typer.BadParameter(
            f"received {saving:g}; choose a share between 0 and 1, without --budget", param_hint="--saving"
        )
    keys = option_types.parse("--mac", option_types.mapping, mac)
    for key, option in _CALIBRATED.items():
        if key in keys:
            raise typer.BadParameter(f"{key} is calibrated; give the values to try with {option}", param_hint="--mac")
    if keys.get("rule", "match") != "match":
        raise typer.BadParameter(
            f"rule: received {keys['rule']!r}; what is calibrated are thresholds, which only match has: choose match, or "
            "leave it out", param_hint="--mac",
        )  # fmt: skip
    tried = _tried(texts)
    if (model is None) == (measured is None):
        raise typer.BadParameter("choose --model to measure, or --measured to choose from a file", param_hint="--model")
    if measured is None and (prompts is None) == (tasks is None):
        raise typer.BadParameter("choose --prompts FILE or --tasks NAMES", param_hint="--prompts")
    limit = budget
    if budget is None and saving is None:
        limit = _KL_BUDGET if kl else _OUTPUT_BUDGET if metric == "output" else _ERROR_BUDGET
    try:
        from vllm_mac.tools.calibrate import by_kl, by_simulation, calibration
        from vllm_mac.tools.calibrate.choose import Rule
        from vllm_mac.tools.calibrate.measured import Measured
        from vllm_mac.tools.calibrate.output_files import save
        from vllm_mac.tools.environment import environment
        from vllm_mac.tools.eval import requests
        from vllm_mac.tools.plotting import require_matplotlib

        if plot is not None:
            require_matplotlib()  # better now than after the measurements
        here = environment()
        counts, found = None, {}
        if measured is not None:
            counts = Measured.load(measured)
        elif model is not None:
            config, grid = _config_and_grid(keys, tried, steps or (256 if kl else 512), kl)
            wanted = calibration.Calibration(
                model=model, grid=grid, mac=config, prompts=prompts, tasks=requests.names(tasks) if tasks else (), length=length,
                samples=samples, reply=reply, seed=seed, engine=option_types.parse("--engine", option_types.mapping, engine),
                verbose=verbose, output=metric == "output",
            )  # fmt: skip
            calibration.check(grid)
            with Console(stderr=True).status("making the prompts") if progress else nullcontext():
                made = (by_kl if kl else by_simulation).prompts(wanted)
            if kl:
                if warning := by_kl.few(by_kl.decoded(wanted, made)):
                    print(f"vllm-mac: at most {warning}", file=sys.stderr)
                # Only the engine knows how many layers there are, and so how many passes.
                with terminal.progress(progress, None, done=True) as report:
                    found = by_kl.measure(wanted, made, by_kl.Goal(limit, saving, min_saving), here, report, keep)
            else:
                with terminal.progress(progress, len(made), done=True) as report:
                    counts = by_simulation.measure(wanted, made, here, report)
                if keep is not None:
                    counts.save(keep)
        if counts is not None:
            found = by_simulation.collect(counts, Rule(metric, min_saving), limit, saving, here)
        results = by_kl if kl else by_simulation
        results.write_config(found, out)
        results.show(found, terminal.console())
        if json_path is not None:
            save(found, json_path)
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(results.markdown(found), encoding="utf-8")
        if plot is not None:
            results.plot(found, plot)
        files = ", ".join(str(path) for path in (out, json_path, markdown, plot) if path is not None)
        print(f"written: {files}", file=sys.stderr)
    except (ToolError, MacConfigError, ImportError) as error:
        terminal.fail(error)
    except KeyboardInterrupt:
        hint = ""
        if kl:
            hint = "; the same command goes on from --keep" if keep else "; --keep FILE keeps the measurements"
        print(f"interrupted; nothing was chosen{hint}", file=sys.stderr)
        raise typer.Exit(130) from None


def _check_kl(texts: dict[str, str], budget: float | None, keep: Path | None, measured: Path | None) -> None:
    """Refuse options that --metric kl cannot follow. texts: the values to try, by option."""
    if budget == 0:
        raise typer.BadParameter(
            "received 0; choose a divergence above 0: rounding alone has some", param_hint="--budget"
        )
    for option, text in texts.items():
        if option != "--thresholds" and len(option_types.names(text)) != 1:
            raise typer.BadParameter(
                f"received {text!r}; --metric kl takes one value, for all layers", param_hint=option
            )
    if keep is not None and keep.suffix == ".npz":
        raise typer.BadParameter(
            f"received {keep}; --metric kl keeps lines of JSON: choose another ending, or p95 for --metric",
            param_hint="--keep",
        )
    if measured:
        raise typer.BadParameter(
            "kl is measured anew; choose p50, p95, p99 or mean for --metric", param_hint="--measured"
        )


def _tried(texts: dict[str, str]) -> dict[str, tuple]:
    """The values to try, by field of `Grid`, from their texts by option."""

    def listed(option: str, kind, low: float, high: float = math.inf) -> tuple:
        return option_types.parse(option, option_types.numbers(kind, low, high), texts[option])

    def or_none(option: str, kind, low: float) -> tuple:
        parse = option_types.numbers(kind, low, math.inf)
        parts = option_types.names(texts[option])
        return tuple(None if part == "none" else option_types.parse(option, parse, part)[0] for part in parts) or (
            None,
        )

    def chosen(option: str, choices: tuple[str, ...]) -> tuple[str, ...]:
        names = option_types.names(texts[option])
        for name in names or ("",):
            option_types.choice(option, name, choices)
        return names

    return {
        "thresholds": listed("--thresholds", float, 0, 1),
        "bands": listed("--bands", int, 1),
        "sinks": listed("--sinks", int, 0),
        "lag_weights": listed("--lag-weights", float, 0),
        "reuse": chosen("--reuse", ("anchored", "chained")),
        "max_chains": or_none("--max-chain", int, 1),
        "distances": chosen("--distance", ("absolute", "relative")),
        "mass_floors": or_none("--mass-floor", float, 1e-3),
    }


def _config_and_grid(keys: dict, tried: dict[str, tuple], steps: int, kl: bool):
    """The configuration to calibrate and the grid of values to try; by KL all but the thresholds have one value."""
    from vllm_mac.config import resolve
    from vllm_mac.tools.calibrate.grid import Grid

    # These replace what a file named by --mac says of the calibrated keys.
    base = keys | {"rule": "match", "band": min(tried["bands"]), "sink": min(tried["sinks"])}
    if kl:
        fields = {
            "reuse": "reuse", "distance": "distances", "lag_weight": "lag_weights", "max_chain": "max_chains",
            "mass_floor": "mass_floors",
        }  # fmt: skip
        base |= {key: tried[field][0] for key, field in fields.items()}
    config = resolve(base)
    return config, Grid(window=config.window, min_context=config.min_context, steps=steps, **tried)
