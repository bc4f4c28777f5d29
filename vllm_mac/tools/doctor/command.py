"""The command `vllm-mac doctor`. Importing it imports neither torch nor vLLM."""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_mac.tools import options
from vllm_mac.tools.options import Mac, ShowProgress


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model's folder or name. Its configuration is read, its weights are not.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="As vLLM's: the sequences that may want a ring.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens in the cache of each row, for the estimate.")] = "32768",
    batch: Annotated[str, typer.Option(help="Rows decoding at once, for the estimate.")] = "1",
    hit_rate: Annotated[
        str,
        typer.Option(
            help="Heads that hit over heads decoded, for the estimate. Yours to measure: vllm_mac_heads_total has both."
        ),
    ] = "0.5",
    bandwidth: Annotated[
        float | None,
        typer.Option(min=1, help="GB/s to estimate with, such as another machine's; measured here unless given."),
    ] = None,
    mac: Mac = "{}",
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")] = None,
    progress: ShowProgress = True,
) -> None:
    """Say whether MAC works here, what it does with a model's layers, and what it may give.

    Versions, devices and the way of the plugin into vLLM are checked on any machine. With a MODEL, vLLM builds it
    without weights, whatever its size, and its layers are settled as an engine settles them: MAC, exact and why, or
    refused. Then follow the rings and an estimate from bytes and bandwidth; --context, --batch and --hit-rate take
    lists separated by commas. What depends on the weights (quantisation's kernels, for instance) and on other
    machines is not seen. On a machine without a GPU the model is what vLLM's CPU engine makes of it: attention sinks,
    and head sizes beyond 64, 128 and 256, may be decided otherwise on a GPU, and a quantisation that CPUs lack cannot
    be built.

    Exit status: 0 all well, 1 there are warnings, 2 there are problems (or the command line is wrong).
    """
    contexts = options.parse("--context", options.numbers(int, 1, math.inf), context)
    batches = options.parse("--batch", options.numbers(int, 1, math.inf), batch)
    rates = options.parse("--hit-rate", options.numbers(float, 0, 1), hit_rate)
    keys, arguments = options.parse("--mac", options.mapping, mac), options.parse("--engine", options.mapping, engine)
    # Its lines would stand between the report's.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_mac.tools.bench import report
    from vllm_mac.tools.doctor import checks, show

    environment = report.environment()
    findings: list[checks.Finding] = []
    told: dict = {}
    with options.progress(progress, 5 if model else 3) as tell:
        for what, found in (
            ("versions", checks.of_versions(environment)),
            ("devices", checks.of_devices(environment)),
            ("plugin", checks.of_plugin()),
        ):
            tell(what)
            findings += found
        if model is not None:
            broken = any(one.mark == checks.PROBLEM and one.section == "plugin" for one in findings)
            tell(f"building {model} without its weights")
            if broken:
                findings.append(
                    checks.Finding("model", checks.UNCHECKED, f"{model}: solve the plugin's problems first")
                )
            else:
                findings += _of_model(
                    told, tell, model, keys, arguments, max_num_seqs, contexts, batches, rates, bandwidth
                )
    status = show.status(findings)
    show.show(findings, told, options.console())
    if json_path is not None:
        whole = {"status": status, "environment": environment, "findings": [asdict(one) for one in findings], **told}
        json_path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"report in {json_path}", file=sys.stderr)
    if status:
        raise typer.Exit(status)


def _of_model(told, tell, model, keys, arguments, max_num_seqs, contexts, batches, rates, bandwidth) -> list:
    """Findings about a model; `told` gets what the report shows beside them, and JSON in full."""
    from vllm_mac.tools.doctor import show
    from vllm_mac.tools.doctor.estimate import estimate, measured_bandwidth
    from vllm_mac.tools.doctor.model import examine

    examined = examine(model, keys, arguments, max_num_seqs)
    told["model"] = show.facts(model, examined)
    found = show.of_layers(examined)
    if examined.ring is None:  # nothing is served
        return found
    found += show.of_rings(examined)
    tell("bandwidth")
    speed, how = (bandwidth * 1e9, "as given") if bandwidth else measured_bandwidth()
    rows = [estimate(examined, c, b, h, speed) for c in contexts for b in batches for h in rates]
    told["bandwidth"] = {"bytes_per_second": speed, "how": how}
    told["estimates"] = [asdict(row) | {"gain": row.gain, "pays": row.pays} for row in rows]
    return found + show.of_estimates(examined, rows, judged=bandwidth is not None or show.on_gpu())
