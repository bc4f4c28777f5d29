"""One configuration of `vllm-mac eval`: `python -m vllm_mac.tools.eval.answer_engine SPEC FD` (see `engine_entry`).

It answers the requests that have no answer yet, then decodes the forced texts. Whatever is finished is written to the
configuration's folder immediately:

    samples.jsonl                  a line for each finished request, in the order in which they finished
    counters/PHASE.SESSION.json    MAC's counters of one phase, as far as this process has come
    forced.npz                     distributions under teacher forcing
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_mac.metrics import Sample, WorkerExtension, counters, head_errors
from vllm_mac.tools.engine_entry import read_counters, serve
from vllm_mac.tools.eval import forced
from vllm_mac.tools.eval.requests import Request, chosen, load, phases, score
from vllm_mac.tools.eval.results import read_samples
from vllm_mac.tools.eval.statistics import HEAD_HITS

INTERVAL = 3.0  # seconds between two messages


class EvalWorker(WorkerExtension):
    """MAC's counters, and the hits of each query head in audited steps.

    In tensor parallelism a head's number is the one on its worker.
    """

    def mac_counters(self) -> list[Sample]:
        hits = [
            (layer, head, sum(counts))
            for layer, heads in head_errors(self).items()
            for head, counts in enumerate(heads)
        ]
        return counters(self) + [
            Sample(HEAD_HITS, {"layer": layer, "head": str(head)}, count) for layer, head, count in hits
        ]


def main(spec: dict, send) -> None:
    send(stage="starting the engine", advance=0)
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind

    folder, requests = Path(spec["folder"]), load(Path(spec["requests"]))
    arguments: dict[str, Any] = {"worker_extension_cls": "vllm_mac.tools.eval.answer_engine.EvalWorker", **spec["llm"]}
    v2 = False
    if spec["kl"]:
        config = EngineArgs(**arguments).create_engine_config()
        v2 = config.use_v2_model_runner
        arguments |= forced.engine_arguments(v2, config.model_config.get_vocab_size())
    llm = LLM(**arguments)
    done = {row["id"] for row in read_samples(folder)}
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as sink:
        for phase, some in phases(requests).items():
            some = [request for request in some if request.id not in done]
            count, advance = Counting(llm, folder / "counters", phase), 0
            reported = last = time.monotonic()
            params = {
                r.id: SamplingParams(temperature=0.0, max_tokens=r.max_tokens, output_kind=RequestOutputKind.FINAL_ONLY)
                for r in some
            }
            for i, (request, output) in enumerate(_finished(llm, some, params), 1):
                # Time since the request before. The sum is the time of a phase, even of one that was stopped.
                seconds, last = time.monotonic() - last, time.monotonic()
                taken = {"seconds": seconds} if spec["timed"] else {}
                sink.write(json.dumps(_row(request, output) | taken) + "\n")
                sink.flush()
                count.write()
                advance += 1
                if i == len(some) or time.monotonic() - reported > INTERVAL:
                    send(stage=f"{phase}: {i} of {len(some)}", advance=advance)
                    reported, advance = time.monotonic(), 0
    if spec["kl"] and not (folder / "forced.npz").exists():
        _force(llm, spec, folder, requests, v2, send)
    send(done=True)
    llm.llm_engine.engine_core.shutdown()  # at exit it would take many seconds


class Counting:
    """MAC's counters since a phase began, in a file that `write` renews."""

    def __init__(self, llm, folder: Path, phase: str):
        folder.mkdir(exist_ok=True)
        session = len(list(folder.glob(f"{phase}.*.json")))
        self._path = folder / f"{phase}.{session}.json"
        self._llm, self._before = llm, read_counters(llm)

    def write(self) -> None:
        now = read_counters(self._llm)
        samples = [
            [name, dict(labels), value - self._before.get((name, labels), 0)] for (name, labels), value in now.items()
        ]
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(samples), encoding="utf-8")
        part.replace(self._path)


def _finished(llm, requests: list[Request], params: dict) -> Iterator[tuple[Request, Any]]:
    """Run all requests with continuous batching. Yields each request with its output when it is finished."""
    engine, waiting = llm.llm_engine, {request.id: request for request in requests}
    for request in requests:
        engine.add_request(request.id, {"prompt_token_ids": list(request.ids)}, params[request.id])
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                yield waiting.pop(output.request_id), output
    if waiting:
        raise RuntimeError(f"the engine gave no answer to {len(waiting)} requests, first {next(iter(waiting))}")


def _row(request: Request, output) -> dict:
    reply = output.outputs[0]
    return {
        "id": request.id, "group": request.group, "task": request.task, "length": request.length,
        "prompt_tokens": len(request.ids), "score": score(request, reply.text), "answers": request.answers,
        "reply": reply.text, "tokens": list(reply.token_ids), "finish": reply.finish_reason,
    }  # fmt: skip


def _force(llm, spec: dict, folder: Path, requests: list[Request], v2: bool, send) -> None:
    replies = {row["id"]: row["tokens"] for row in read_samples(Path(spec["exact"]))}
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    texts, inputs, params = {}, [], {}
    for request in chosen(requests, spec["kl"]):
        prompt, texts[request.id] = forced.split(list(request.ids), replies[request.id])
        inputs.append(Request(request.id, "", "", None, tuple(prompt), 0, ""))
        params[request.id] = forced.params(texts[request.id], v2, vocabulary)
    # Tokens in the prefix cache are not prefilled again, and MAC would have fewer entries to match.
    llm.reset_prefix_cache()
    found = {}
    for i, (request, output) in enumerate(_finished(llm, inputs, params), 1):
        found[request.id] = forced.distributions(output.outputs[0], texts[request.id])
        send(stage=f"forced texts: {i} of {len(inputs)}", advance=1)
    forced.save(folder / "forced.npz", found, vocabulary)


if __name__ == "__main__":
    serve(main)
