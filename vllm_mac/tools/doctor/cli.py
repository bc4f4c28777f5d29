"""The command `vllm-mac doctor`. Importing it imports neither torch nor vLLM."""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from vllm_mac.tools import option_types, terminal
from vllm_mac.tools.option_types import Engine, Mac, ShowProgress


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model's folder or name. Its configuration is read, not its weights.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="vLLM's max_num_seqs: the sequences that may need a ring.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens in each row's KV cache, for the estimate.")] = "32768",
    batch: Annotated[str, typer.Option(help="Rows that decode together, for the estimate.")] = "1",
    hit_rate: Annotated[
        str | None,
        typer.Option(
            help="With rule: match, the share of heads that hit, for the estimate; 0.5 by default. Measure yours with "
            "vllm_mac_heads_total."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(min=1, help="GB/s for the estimate, such as another machine's; by default measured here."),
    ] = None,
    mac: Mac = "{}",
    engine: Engine = "{}",
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    progress: ShowProgress = True,
) -> None:
    """Check whether MAC works here, what it does with a model's layers, and what it may gain.

    Versions, devices and vLLM's way to the plugin are checked on any machine. With a MODEL, vLLM builds it without
    weights, whatever its size, and each layer is decided as in an engine: MAC, exact (and why), or refused. The room
    for the index (with rule: match, the rings) and an estimate from bytes and bandwidth follow; --context, --batch and
    --hit-rate take lists separated by commas.
    The command cannot see what depends on the weights (the kernels of a quantisation, for instance) or on other
    machines. Without a GPU the model is the one that vLLM's CPU engine builds: a GPU may decide otherwise on attention
    sinks and on head sizes other than 64, 128 and 256, and a quantisation that CPUs lack cannot be built.

    Exit status: 0 all is well, 1 there are warnings, 2 there are problems (or the command line is wrong).
    """
    workload = Workload(
        contexts=option_types.parse("--context", option_types.numbers(int, 1, math.inf), context),
        batches=option_types.parse("--batch", option_types.numbers(int, 1, math.inf), batch),
        hit_rates=option_types.parse(
            "--hit-rate", option_types.numbers(float, 0, 1), "0.5" if hit_rate is None else hit_rate
        ),
        bandwidth=bandwidth * 1e9 if bandwidth else None,
    )
    keys = option_types.parse("--mac", option_types.mapping, mac)
    arguments = option_types.parse("--engine", option_types.mapping, engine)
    # vLLM's log lines would stand between those of the report.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_mac.tools.doctor import checks, show
    from vllm_mac.tools.environment import environment

    here = environment()
    findings: list[checks.Finding] = []
    facts: dict = {}
    with terminal.progress(progress, 5 if model else 3) as report:
        for what, found in (
            ("versions", checks.of_versions(here)),
            ("devices", checks.of_devices(here, _by_index(keys))),
            ("plugin", checks.of_plugin()),
        ):
            report(what)
            findings += found
        if model is not None:
            broken = any(one.mark == checks.PROBLEM and one.section == "plugin" for one in findings)
            report(f"building {model} without its weights")
            if broken:
                findings.append(
                    checks.Finding("model", checks.UNCHECKED, f"{model}: solve the plugin's problems first")
                )
            else:
                from vllm_mac.tools.doctor.model import examine

                examined = examine(model, keys, arguments, max_num_seqs)
                if examined.index is not None:
                    option_types.only_of_match({"--hit-rate": hit_rate}, """--mac '{"rule": "match"}'""")
                facts["model"] = show.facts(model, examined)
                findings += show.of_layers(examined)
                if examined.ring is not None or examined.index is not None:  # MAC serves a layer
                    findings += show.of_rings(examined) + show.of_index(examined)
                    report("bandwidth")
                    findings += _of_estimates(examined, workload, facts)
    status = show.status(findings)
    show.show(findings, facts, terminal.console())
    if json_path is not None:
        whole = {"status": status, "environment": here, "findings": [asdict(one) for one in findings], **facts}
        json_path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"report in {json_path}", file=sys.stderr)
    if status:
        raise typer.Exit(status)


def _by_index(keys: dict) -> bool:
    """Whether MAC would decode by the index of keys. Where the keys are wrong, a model's part of the report says so."""
    from vllm_mac.config import MacConfigError, resolve

    try:
        config = resolve(keys)
    except MacConfigError:
        return False
    return config.enabled and config.rule == "index"


@dataclass(frozen=True, slots=True)
class Workload:
    """What to estimate for: every combination of these. bandwidth: bytes per second; None to measure this machine's."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    hit_rates: tuple[float, ...]
    bandwidth: float | None


def _of_estimates(examined, workload: Workload, facts: dict) -> list:
    """Findings about the speed-up; `facts` gets the estimates for the table and for JSON."""
    from vllm_mac.tools.doctor import show
    from vllm_mac.tools.doctor.estimate import estimate, measured_bandwidth

    speed, how = (workload.bandwidth, "as given") if workload.bandwidth else measured_bandwidth()
    rates = workload.hit_rates if examined.index is None else (0.0,)  # an index has none
    combinations = product(workload.contexts, workload.batches, rates)
    rows = [estimate(examined, context, batch, rate, speed) for context, batch, rate in combinations]
    facts["bandwidth"] = {"bytes_per_second": speed, "how": how}
    facts["estimates"] = [asdict(row) | {"gain": row.gain, "pays": row.pays} for row in rows]
    return show.of_estimates(examined, rows, judged=workload.bandwidth is not None or show.on_gpu())
