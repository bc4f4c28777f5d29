"""Time per token of an engine that speculates, on source code:

    for BACKEND in MAC FLASHINFER; do python examples/speculation.py MODEL --backend $BACKEND --shape 16x30000; done

Prints a line of JSON: milliseconds a token and a step, tokens a step of each request, the share of drafts accepted, and
with MAC the shares of heads looked up and of KV read. The requests run twice; the second time, in which the prefix cache
has the prompts, counts from the step in which all of them decode to that in which the first one ends.
"""

import argparse
import json
import os
import time
from pathlib import Path

from vllm import LLM, SamplingParams

DRAFTS, ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"


def prompts(tokenizer, batch: int, context: int) -> list[list[int]]:
    """Of Python's own library, each from another place."""
    tokens: list[int] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tokens += tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore"))
        if len(tokens) >= batch * context:
            return [tokens[i * context : (i + 1) * context] for i in range(batch)]
    raise SystemExit(f"--shape: {batch}x{context}, choose {len(tokens)} tokens at most")


def run(llm: LLM, asked: list[list[int]], tokens: int) -> dict:
    """The requests at once, timed while all of them decode."""
    engine, count, marks = llm.llm_engine, {}, []
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(asked):
        engine.add_request(f"{time.time_ns()}-{i}", {"prompt_token_ids": prompt}, params)
    done = False
    while engine.has_unfinished_requests():
        for output in engine.step():
            count[output.request_id] = len(output.outputs[0].token_ids)
            done |= output.finished
        if len(count) == len(asked) and not done:
            marks.append((time.perf_counter(), sum(count.values())))
    (begin, first), (end, last) = marks[0], marks[-1]
    seconds, made, steps = end - begin, (last - first) / len(asked), len(marks) - 1
    return {"ms_token": 1e3 * seconds / made, "ms_step": 1e3 * seconds / steps, "tokens_step": made / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's folder or name")
    parser.add_argument("--backend", default="MAC")
    parser.add_argument("--shape", default="16x30000", help="requests at once, and prompt tokens of each")
    parser.add_argument("--tokens", type=int, default=256, help="of each reply")
    parser.add_argument("--drafts", type=int, default=3, help="speculated tokens of a step; 0 for no speculation")
    parser.add_argument("--draft-model", help="by default n-grams are speculated")
    parser.add_argument(
        "--eager", action="store_true", help="without graphs and compilation, as for a short trial on a CPU"
    )
    parser.add_argument("--mac", type=json.loads, default={}, help="keys of MAC's, as JSON")
    given = parser.parse_args()
    batch, context = map(int, given.shape.split("x"))
    speculation = {"method": "ngram", "num_speculative_tokens": given.drafts, "prompt_lookup_max": 4}
    if given.draft_model:
        speculation = {"method": "draft_model", "model": given.draft_model, "num_speculative_tokens": given.drafts}
    llm = LLM(
        given.model, attention_backend=given.backend, max_model_len=context + given.tokens + 32, max_num_seqs=batch,
        enforce_eager=given.eager, disable_log_stats=False, enable_prefix_caching=True, speculative_config=speculation if given.drafts else None,
        additional_config={"mac": given.mac} if given.backend == "MAC" else {},
    )  # fmt: skip
    asked = prompts(llm.get_tokenizer(), batch, context)
    run(llm, asked, given.tokens)
    before = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    found = {"backend": given.backend, "shape": given.shape, "drafts": given.drafts, **run(llm, asked, given.tokens)}
    after = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    if drafted := after.get(DRAFTS, 0) - before.get(DRAFTS, 0):
        found["accepted"] = (after[ACCEPTED] - before[ACCEPTED]) / drafted
    if given.backend == "MAC":
        from vllm_mac.metrics import published, summarise

        summary = summarise(published())
        found |= {"looked_up": summary.hit_rate, "kv_read": summary.read_share}  # of both runs
    print(json.dumps(found))


if __name__ == "__main__":
    main()
