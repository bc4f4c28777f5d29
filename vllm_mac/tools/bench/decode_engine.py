"""One backend of `vllm-mac bench decode`: `python -m vllm_mac.tools.bench.decode_engine SPEC FD` (see `engine_entry`).

For each shape of requests it prefills the prompts, then times decode steps in which every request gets one token. It
sends a result for each shape.
"""

import functools
import itertools
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

from vllm_mac.metrics import WorkerExtension
from vllm_mac.tools.engine_entry import read_counters, serve
from vllm_mac.tools.tokenizer_files import has_tokenizer

UNTIMED = 4  # steps after reading the counters, for tokens queued up meanwhile
GRAPH_STEPS = 24  # after the timed ones, as timing their graphs takes the host a little
WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father",
    "power", "hour", "game", "line", "end", "member", "law", "car", "city", "community", "name", "president",
    "team", "minute", "idea", "kid", "body", "information", "back", "parent", "the", "of", "and", "to", "in",
    "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he", "his", "but", "at",
    "are", "this", "have", "from", "or", "had", "an", "they", "which", "one",
]  # fmt: skip


class BenchWorker(WorkerExtension):
    """MAC's counters and, for any backend, the host's time to build a step's metadata and the GPU's for a step's graph."""

    def bench_time_builds(self) -> None:
        from vllm.v1.attention.backend import AttentionMetadataBuilder

        self.bench_builds, depth, classes = [], [0], [AttentionMetadataBuilder]

        def timed(build):
            @functools.wraps(build)
            def wrapper(*args, **kwargs):
                depth[0] += 1
                begin = time.perf_counter()
                try:
                    return build(*args, **kwargs)
                finally:
                    depth[0] -= 1
                    if not depth[0]:  # a subclass calls the build of its base
                        self.bench_builds.append(1000 * (time.perf_counter() - begin))

            return wrapper

        while classes:
            cls = classes.pop()
            classes += cls.__subclasses__()
            if "build" in vars(cls):
                cls.build = timed(cls.build)

    def bench_time_graphs(self) -> None:
        import torch

        replays, replay = [], torch.cuda.CUDAGraph.replay
        self.bench_replays, self.bench_replay = replays, replay

        @functools.wraps(replay)
        def timed(self) -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay(self)
            end.record()
            replays.append((self, begin, end))

        torch.cuda.CUDAGraph.replay = timed

    def bench_take_graphs(self) -> list[float]:
        """Milliseconds of each replay of a CUDA graph since `bench_time_graphs`; see `of_whole_batch`."""
        import torch

        torch.cuda.CUDAGraph.replay = self.bench_replay
        if own := of_whole_batch(self.bench_replays):  # none without a GPU
            torch.cuda.synchronize()
        return [begin.elapsed_time(end) for _, begin, end in own]

    def bench_sharpen(self, context: int, seed: int) -> int:
        from vllm_mac.tools.bench.dummy_weights import sharpen

        worker: Any = self  # vLLM makes this a base of its worker
        return sharpen(worker.get_model(), context, seed)

    def bench_take_builds(self) -> list[float]:
        """Milliseconds of each build since the last call."""
        taken = self.bench_builds[:]
        self.bench_builds.clear()
        return taken


def of_whole_batch(replays: list[tuple]) -> list[tuple]:
    """The replays `(graph, begin, end)` before the first one of another graph, if they are enough.

    A request that reaches its last token leaves a smaller batch, which has another graph. Steps in pieces replay many
    graphs, of which attention is no part, and a drafter replays its own: there none are enough.
    """
    own = [*itertools.takewhile(lambda replay: replay[0] is replays[0][0], replays)]
    return own if len(own) >= GRAPH_STEPS // 3 else []


def main(spec: dict, send) -> None:
    send(stage="starting the engine")
    from vllm import LLM
    from vllm.v1.engine.exceptions import EngineDeadError

    tokenizer = has_tokenizer(spec["llm"]["model"])
    if not tokenizer:
        # vLLM still tries the chat template, and warns with a traceback. A filter, because vLLM resets log levels; it
        # goes when vLLM warms up no template of a model without a tokenizer.
        logging.getLogger("vllm.renderers.base").addFilter(
            lambda record: "Chat template warmup" not in record.getMessage()
        )
    extension = "vllm_mac.tools.bench.decode_engine.BenchWorker"
    begin = time.perf_counter()
    arguments: dict[str, Any] = {"skip_tokenizer_init": not tokenizer, "worker_extension_cls": extension, **spec["llm"]}
    llm = LLM(**arguments)
    facts = {
        "start_s": time.perf_counter() - begin,
        "in_process": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0",
    }
    facts["max_model_len"] = llm.llm_engine.model_config.max_model_len
    llm.collective_rpc("bench_time_builds")
    for i, (batch, context) in enumerate(spec["shapes"]):

        def stage(what: str, of=f"batch {batch}, {context} tokens") -> None:
            send(stage=f"{of}: {what}")

        sent: list[str] = []
        try:
            if spec["sharpen"]:
                facts["sharpened_layers"] = min(llm.collective_rpc("bench_sharpen", args=(context, spec["seed"])))
                if not facts["sharpened_layers"]:
                    logging.getLogger(__name__).warning(
                        "The weights are vLLM's own dummies: their projections are packed or quantised. All tokens weigh "
                        "alike, so MAC reads all of them or none"
                    )
            result = facts | _shape(spec, llm, tokenizer, batch, context, facts["max_model_len"], sent, stage)
        except EngineDeadError:
            raise  # the log has the reason
        except Exception as error:
            llm.llm_engine.abort_request(sent)
            result = {"error": f"{type(error).__name__}: {error}"}
        send(shape=i, result=result)
    send(done=True)
    llm.llm_engine.engine_core.shutdown()  # at exit it would take many seconds


def _shape(
    spec: dict, llm, tokenizer: bool, batch: int, context: int, max_model_len: int, sent: list[str], stage
) -> dict:
    """The times of one shape. sent: the names of its requests are added to it."""
    if max_model_len < context + 1 + UNTIMED + spec["tokens"]:
        raise ValueError(
            f"--max-model-len: {max_model_len} has no room for {context} prompt tokens and "
            f"{spec['tokens'] + UNTIMED + 1} generated ones"
        )
    texts, kind = prompts(spec, llm, tokenizer, batch, context)
    stage("warming up")
    _prefill(llm, "warm", [prompt[: min(len(prompt), 4096)] for prompt in texts], 8, sent)
    ttft = []
    for i in range(spec["prefills"]):
        _empty_prefix_cache(llm)
        stage(f"prefill, {i + 1} of {spec['prefills']}")
        if i + 1 < spec["prefills"]:
            ttft += _prefill(llm, f"prefill{i}", texts, 1, sent)
    first, measured = _measure(llm, texts, spec["tokens"], max_model_len, sent, stage)
    return measured | {
        "prompt": kind,
        "ttft_ms": [1000 * seconds for seconds in ttft + first],
        "prefills": spec["prefills"],
    }


def _empty_prefix_cache(llm, patience: float = 30.0) -> None:
    """Raises RuntimeError where blocks stay in use: then a prefill would skip the cached part of a prompt."""
    deadline = time.monotonic() + patience
    while not llm.reset_prefix_cache():  # the engine may still be ending aborted requests
        if time.monotonic() > deadline:
            raise RuntimeError(f"the prefix cache could not be emptied within {patience:g} s")
        time.sleep(0.1)


def prompts(spec: dict, llm, tokenizer: bool, count: int, size: int) -> tuple[list[list[int]], str]:
    """`count` different prompts of `size` tokens, and a description of them."""
    seed = spec["seed"]
    draw = random.Random(seed)
    if spec["prompt"] == "ids" or (spec["prompt"] == "words" and not tokenizer):
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        return [
            [draw.randrange(vocabulary) for _ in range(size)] for _ in range(count)
        ], f"random token ids, seed {seed}"
    if not tokenizer:
        raise ValueError(f"--prompt: {spec['model']} has no tokenizer for {spec['prompt']}; choose ids")
    encode = llm.get_tokenizer().encode
    if spec["prompt"] == "words":
        texts = [" ".join(draw.choices(WORDS, k=size)) for _ in range(count)]
        return [encode(text)[:size] for text in texts], f"random words, seed {seed}"
    ids = encode(Path(spec["prompt"]).read_text(encoding="utf-8"))
    if not ids:
        raise ValueError(f"--prompt: {spec['prompt']} is empty")
    whole = (ids * (size * 2 // len(ids) + 2))[: size + len(ids)]
    starts = [row * len(ids) // count for row in range(count)]
    note = (
        f"{spec['prompt']}, {len(ids)} tokens, repeated" if len(ids) < size else f"{spec['prompt']}, {len(ids)} tokens"
    )
    return [whole[start : start + size] for start in starts], note + (
        ", rows begin at different places" if count > 1 else ""
    )


def _params(max_tokens: int):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )


def _prefill(llm, name: str, batch: list[list[int]], tokens: int, sent: list[str]) -> list[float]:
    """Send all requests at once and generate a few tokens. Returns seconds to the first token of each request."""
    engine, first = llm.llm_engine, {}
    sent += [f"{name}-{i}" for i in range(len(batch))]
    begin = time.perf_counter()
    for i, prompt in enumerate(batch):
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, _params(tokens))
    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - begin)
    return list(first.values())


def _measure(
    llm, batch: list[list[int]], tokens: int, max_model_len: int, sent: list[str], stage
) -> tuple[list[float], dict]:
    """Prefill, then decode. Returns seconds to the first token of each request, and the times of the steps."""
    engine, first, cached = llm.llm_engine, {}, {}
    names = [f"run-{i}" for i in range(len(batch))]
    sent += names
    begin = time.perf_counter()
    for name, prompt in zip(names, batch, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, _params(max_model_len - len(prompt)))
    while len(first) < len(batch) and engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, time.perf_counter() - begin)
                cached[output.request_id] = output.num_cached_tokens
    stage("decoding")
    before = read_counters(llm)
    llm.collective_rpc("bench_take_builds")
    stamps: list[float] = []
    skipped = most = 0
    while len(stamps) <= tokens and engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        advanced = sum(bool(output.outputs[0].token_ids) for output in outputs)
        most = max(most, advanced)
        if advanced < len(batch):
            if advanced:
                stamps.clear()  # only consecutive steps of the whole batch count
            continue
        skipped += 1
        if skipped > UNTIMED:
            stamps.append(now)
    builds = llm.collective_rpc("bench_take_builds")[0]
    after = read_counters(llm)
    if len(stamps) <= tokens:
        raise RuntimeError(
            f"{most} of {len(batch)} requests decoded together, for {max(len(stamps) - 1, 0)} of {tokens} steps; the KV "
            "cache or --max-model-len is too small for this batch and context"
        )
    llm.collective_rpc("bench_time_graphs")
    for _ in range(GRAPH_STEPS):
        if engine.has_unfinished_requests():
            engine.step()
    graphs = llm.collective_rpc("bench_take_graphs")[0]
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    steps = [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
    result = {"step_ms": steps, "metadata_ms": builds, "graph_ms": graphs}
    result["cached_prompt_tokens"] = sum(count or 0 for count in cached.values())
    return list(first.values()), result | _reuse(before, after)


def _reuse(before: dict[tuple, int], after: dict[tuple, int]) -> dict:
    """Hit rate and share of KV read between two readings of the counters; empty where no layer is MAC's."""
    from vllm_mac.metrics import summarise

    if not after:
        return {}
    summary = summarise(
        (name, dict(labels), value - before.get((name, labels), 0)) for (name, labels), value in after.items()
    )
    return {"hit_rate": summary.hit_rate, "read_share": summary.read_share, "exact": summary.exact}


if __name__ == "__main__":
    serve(main)
