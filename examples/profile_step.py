"""Where the time of a decode step goes, by kernel, in a whole engine on a GPU:

    for BACKEND in MAC FLASHINFER; do python examples/profile_step.py MODEL --backend $BACKEND --shape 16x30000; done

Decodes source code, with every request in decode, under PyTorch's profiler. Prints a table, microseconds a step: each
kernel of which a step has at least one, then all others, then the time in which the GPU did nothing, and their sum.
Profiling lengthens steps, mostly the time in which the GPU does nothing.
"""

import argparse
import json
import os
from collections import defaultdict

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the profiler sees its own process

import torch
from speculation import prompts
from vllm import LLM, SamplingParams

STEPS, BEFORE = 24, 8


def decoding(llm: LLM, asked: list[list[int]]) -> None:
    """Prefill, until all requests decode."""
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(asked):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    begun: set[str] = set()
    while len(begun) < len(asked):
        outputs = llm.llm_engine.step()
        begun |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        if any(output.finished for output in outputs):
            raise SystemExit("--shape: a request ended before all decoded; choose fewer requests or shorter ones")
    for _ in range(BEFORE):
        llm.llm_engine.step()


def measure(llm: LLM) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Of each kernel: launches and microseconds a step. Then the same of the GPU doing nothing, and of steps."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            llm.llm_engine.step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy, until = 0.0, spans[0][0]
    for begin, end, name in spans:
        # Kernels overlap where one is launched before the other ends. What is covered counts once, for the first.
        own = max(end - max(begin, until), 0.0)
        until = max(until, end)
        busy += own
        found[name][0] += 1
        found[name][1] += own
    whole = spans[-1][1] - spans[0][0]
    return {name: (n / STEPS, us / STEPS) for name, (n, us) in found.items()}, (whole - busy) / STEPS, whole / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder or name")
    parser.add_argument("--backend", default="MAC")
    parser.add_argument("--shape", default="16x30000", help="requests at once, and prompt tokens of each")
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vllm.LLM, as JSON")
    parser.add_argument("--mac", type=json.loads, default={}, help="keys of MAC's, as JSON")
    given = parser.parse_args()
    batch, context = map(int, given.shape.split("x"))
    llm = LLM(
        given.model, attention_backend=given.backend, additional_config={"mac": given.mac} if given.backend == "MAC" else {},
        **{"max_model_len": context + 1100, "max_num_seqs": batch, "disable_log_stats": True} | given.engine,
    )  # fmt: skip
    decoding(llm, prompts(llm.get_tokenizer(), batch, context))
    kernels, idle, step = measure(llm)
    shown = sorted(((us, n, name) for name, (n, us) in kernels.items() if n >= 0.9), reverse=True)
    rest = sum(us for n, us in kernels.values()) - sum(us for us, _, _ in shown)
    print(f"{given.backend}, {given.shape}: microseconds a step, {torch.cuda.get_device_name()}")
    for us, n, name in shown:
        print(f"{us:9.1f} {n:6.1f} x  {name[:100]}")
    print(f"{rest:9.1f}           others\n{idle:9.1f}           nothing\n{step:9.1f}           step")


if __name__ == "__main__":
    main()
