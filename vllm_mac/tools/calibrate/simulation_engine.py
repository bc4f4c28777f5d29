"""The engine of `vllm-mac calibrate` by simulation: `python -m vllm_mac.tools.calibrate.simulation_engine SPEC FD` (see
`engine_entry`).

It prefills the prompts one at a time, and its workers simulate each layer. It adds up their counts in two halves: the
prompts with even and with odd numbers. The sums are written to a file that SPEC names.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.measured import HALVES, Measured
from vllm_mac.tools.engine_entry import serve

INTERVAL = 3.0  # seconds between two messages within a prompt


def main(spec: dict, send) -> None:
    send(stage="starting the engine", advance=0)
    # One process: no reply of a worker has a time limit.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    arguments: dict[str, Any] = {
        "worker_extension_cls": "vllm_mac.tools.calibrate.capture.CalibrateWorker",
        **spec["llm"],
    }
    llm = LLM(**arguments)
    answers = llm.collective_rpc("calibrate_start", args=(spec["grid"], spec["paper"], spec["output"]))
    layers = layers_with_mac(spec["llm"]["model"], answers, answers[0]["exact"])
    sums: list[dict[str, dict]] = [{} for _ in range(HALVES)]
    used = []
    for number, prompt in enumerate(spec["prompts"]):
        where = f"prompt {number + 1} of {len(spec['prompts'])}"
        ids = prompt["ids"]
        if prompt["reply"]:
            send(stage=f"{where}: replying", advance=0)
            params = SamplingParams(temperature=0.0, max_tokens=prompt["reply"], detokenize=False)
            ids = ids + list(_generate(llm, ids, params))[:-1]  # the last one is never a query
        send(stage=f"{where}: prefill of {len(ids)} tokens", advance=0)
        llm.reset_prefix_cache()
        llm.collective_rpc("calibrate_prompt", args=(len(ids),))
        _generate(llm, ids, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False))
        reported = time.monotonic()
        for i, name in enumerate(layers):
            if time.monotonic() - reported > INTERVAL:
                send(stage=f"{where}: layer {i + 1} of {len(layers)}", advance=0)
                reported = time.monotonic()
            counts = _together([counts for counts in llm.collective_rpc("calibrate_layer", args=(name,)) if counts])
            half = sums[number % HALVES]
            half[name] = _added(half[name], counts) if name in half else counts
        used.append(len(ids))
        send(stage=f"{where}: simulated", advance=1)
    Measured.of(sums, layers, spec["grid"], spec["paper"], used).save(Path(spec["out"]))
    send(exact=answers[0]["exact"])
    send(done=True)
    llm.llm_engine.engine_core.shutdown()  # at exit it would take many seconds


def layers_with_mac(model: str, answers: list[dict], exact: dict[str, int]) -> dict[str, int]:
    """Name and index of the layers that use MAC on any worker. Raises CalibrateError with the reasons where there is none."""
    layers = dict(tuple(layer) for answer in answers for layer in answer["layers"])
    if not layers:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in exact.items()) or "none is MAC's"
        raise CalibrateError(f"--model: MAC serves no attention layer of {model}; exact: {reasons}")
    return layers


def _generate(llm, ids: list[int], params) -> tuple[int, ...]:
    output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
    return tuple(output.outputs[0].token_ids)


def _together(parts: list[dict]) -> dict:
    """The counts of one layer whose heads are divided among workers."""
    whole = parts[0]
    for part in parts[1:]:
        whole = _added(whole, part) | {"heads": np.concatenate((whole["heads"], part["heads"]), 1)}
    return whole


def _added(a: dict, b: dict) -> dict:
    return {name: np.maximum(a[name], b[name]) if name == "longest" else a[name] + b[name] for name in a}


if __name__ == "__main__":
    serve(main)
