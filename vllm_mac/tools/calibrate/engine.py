"""The engine of `vllm-mac calibrate`: `python -m vllm_mac.tools.calibrate.engine SPEC FD`.

SPEC names a JSON file. Reads the prompts one at a time and has its workers simulate each layer; adds up
what they count in two halves, the prompts with even and with odd numbers. Writes the sums to a file
that SPEC names, and tells its stages and its result as JSON lines on the file descriptor FD.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.measured import HALVES, Measured

INTERVAL = 3.0  # seconds between two messages within a prompt


def main(spec: dict, tell) -> None:
    tell(stage="starting the engine", advance=0)
    # One process: layers and simulation are in reach, and nothing waits for a reply with a time limit.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(**{"worker_extension_cls": "vllm_mac.tools.calibrate.capture.CalibrateWorker", **spec["llm"]})
    answers = llm.collective_rpc("calibrate_start", args=(spec["grid"], spec["paper"], spec["output"]))
    layers = served_layers(spec["llm"]["model"], answers, answers[0]["exact"])
    sums: list[dict[str, dict]] = [{} for _ in range(HALVES)]
    used = []
    for number, prompt in enumerate(spec["prompts"]):
        where = f"prompt {number + 1} of {len(spec['prompts'])}"
        ids = prompt["ids"]
        if prompt["reply"]:
            tell(stage=f"{where}: replying", advance=0)
            params = SamplingParams(temperature=0.0, max_tokens=prompt["reply"], detokenize=False)
            ids = ids + list(_generate(llm, ids, params))[:-1]  # the last one is never a query
        tell(stage=f"{where}: reading {len(ids)} tokens", advance=0)
        llm.reset_prefix_cache()
        llm.collective_rpc("calibrate_prompt", args=(len(ids),))
        _generate(llm, ids, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False))
        told = time.monotonic()
        for i, name in enumerate(layers):
            if time.monotonic() - told > INTERVAL:
                tell(stage=f"{where}: layer {i + 1} of {len(layers)}", advance=0)
                told = time.monotonic()
            counts = _together([counts for counts in llm.collective_rpc("calibrate_layer", args=(name,)) if counts])
            half = sums[number % HALVES]
            half[name] = _added(half[name], counts) if name in half else counts
        used.append(len(ids))
        tell(stage=f"{where}: simulated", advance=1)
    Measured.of(sums, layers, spec["grid"], spec["paper"], used).save(Path(spec["out"]))
    tell(exact=answers[0]["exact"])
    tell(done=True)
    llm.llm_engine.engine_core.shutdown()  # at exit it would take many seconds


def served_layers(model: str, answers: list[dict], exact: dict[str, int]) -> dict[str, int]:
    """Name and index of the layers of all workers. Raises CalibrateError, with why layers are exact, where there is none."""
    layers = dict(tuple(layer) for answer in answers for layer in answer["layers"])
    if not layers:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in exact.items()) or "none is MAC's"
        raise CalibrateError(f"--model: MAC serves no attention layer of {model}; exact: {reasons}")
    return layers


def serve(main: Callable) -> None:
    """Run an engine's `main(spec, tell)` as the process that the command line describes."""
    channel = int(sys.argv[2])
    say = lambda **message: os.write(channel, (json.dumps(message) + "\n").encode())
    try:
        main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), say)
    except CalibrateError as error:
        say(error=str(error))
        say(done=True)
    os._exit(0)


def _generate(llm, ids: list[int], params) -> tuple[int, ...]:
    output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
    return tuple(output.outputs[0].token_ids)


def _together(parts: list[dict]) -> dict:
    """Counts of one layer whose heads are spread over workers."""
    whole = parts[0]
    for part in parts[1:]:
        whole = _added(whole, part) | {"heads": np.concatenate((whole["heads"], part["heads"]), 1)}
    return whole


def _added(a: dict, b: dict) -> dict:
    return {name: np.maximum(a[name], b[name]) if name == "longest" else a[name] + b[name] for name in a}


if __name__ == "__main__":
    serve(main)
