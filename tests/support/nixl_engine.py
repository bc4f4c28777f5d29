"""An engine of its own process, which prefills for others: `with prefills(model, config, options) as prefill`.

`prefill(prompt)` are the first token and the `kv_transfer_params` with which another engine's request gets the pages.
A process may hold one engine at a time, and NIXL moves pages between two.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from support import ROOT
from support.engine import Add
from support.servers import free_port

needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="needs NIXL: pip install nixl")
ASK = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
# For vLLM's platform, as `discover_numa_topology`. On CPUs it gives a process with NIXL the last core alone: then two
# engines share it, and tests after them.
NO_CORES = classmethod(lambda cls: [])
KEYS = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"


def transfer(role: str, device: str = "cpu") -> dict:
    """vLLM's `kv_transfer_config`. role: kv_producer or kv_consumer. device: that pages lie on."""
    return {
        "kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": device, "kv_load_failure_policy": "fail",
    }  # fmt: skip


def side_channel() -> dict[str, str]:
    """What the environment of an engine must have, with a port of its own."""
    return dict(zip(KEYS, ("127.0.0.1", str(free_port())), strict=True))


def asking(prompts: dict[str, list[int]], tokens: int, transfers: dict[str, dict]) -> list[Add]:
    """Requests for so many tokens, 3 steps apart. transfers: by request, what the other engine said of its pages, if any."""
    return [
        Add(3 * i, name, prompt, tokens, {"kv_transfer_params": transfers[name]} if transfers else None)
        for i, (name, prompt) in enumerate(prompts.items())
    ]


@contextmanager
def prefills(model, config: dict, options: dict, runner: str = "v1", device: str = "cpu") -> Iterator[Callable]:
    """With MAC. config, options, runner: as `support.engine.engine` takes them. device: that pages lie on, the last of several
    GPUs."""
    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | side_channel() | {"PYTHONPATH": os.pathsep.join(path)}
    if device != "cpu":
        env["CUDA_VISIBLE_DEVICES"] = str(torch.cuda.device_count() - 1)
    asked = json.dumps({"model": str(model), "config": config, "options": options, "runner": runner, "device": device})
    command = [sys.executable, "-m", "support.nixl_engine", asked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as process:

        def prefill(prompt: list[int]) -> tuple[int, dict]:
            process.stdin.write(json.dumps(prompt) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the engine that prefills ended: its messages are above")
            said = json.loads(line)
            return said["token"], said["transfer"]

        try:
            yield prefill
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Prefill each line's prompt, until there are no more."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints
    asked = json.loads(sys.argv[1])
    if asked["device"] == "cpu":
        from support import triton_cpu

        triton_cpu.enable()
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    from support import engine as harness

    type(current_platform).discover_numa_topology = NO_CORES
    params = SamplingParams(
        temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args={"kv_transfer_params": ASK}
    )
    options = asked["options"] | {"kv_transfer_config": transfer("kv_producer", asked["device"])}
    with harness.engine(asked["model"], asked["runner"], "MAC", asked["config"], **options) as llm:
        for line in sys.stdin:
            (output,) = llm.generate([{"prompt_token_ids": json.loads(line)}], params, use_tqdm=False)
            token = output.outputs[0].token_ids[0]
            said.write(json.dumps({"token": token, "transfer": output.kv_transfer_params}) + "\n")
            said.flush()


if __name__ == "__main__":
    main()
