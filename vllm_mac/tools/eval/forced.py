"""Teacher forcing: a text is decoded token by token, whatever the model would say, and the
distribution of every next token is kept.

The last TOKENS tokens of a prompt with its exact reply are decoded, what comes before them is read.
So an engine's own slips do not change what it is asked, the forced text is one that the model is
really given or really says, and attention runs as in decoding.
"""

from pathlib import Path

import numpy as np
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

TOKENS = 256
FULL, TOP = 2048, 1024  # log-probabilities of the whole vocabulary up to FULL ids, else of the TOP likeliest
ARGUMENT = "vllm_mac_forced"
KINDS = "ids", "logprobs"


def listed(vocabulary: int) -> int:
    """How many log-probabilities are kept of each step."""
    return vocabulary if vocabulary <= FULL else TOP


def split(prompt: list[int], reply: list[int]) -> tuple[list[int], list[int]]:
    """What is read and what is decoded. Short sequences are decoded from their middle on."""
    whole = [*prompt, *reply]
    cut = len(whole) - min(TOKENS, len(whole) // 2)
    return whole[:cut], whole[cut:]


class ForcedTokens(AdapterLogitsProcessor):
    """For vLLM's V1 model runner, which has no replay of its own: only the forced token is possible.

    Log-probabilities are taken before logits processors run. Goes when only the V2 runner is left.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        tokens = (params.extra_args or {}).get(ARGUMENT)
        if tokens is None:
            return None

        def force(output_ids, logits):
            token = tokens[min(len(output_ids), len(tokens) - 1)]
            kept = logits[token].clone()
            logits.fill_(float("-inf"))
            logits[token] = kept
            return logits

        return force


def engine_arguments(v2: bool, vocabulary: int) -> dict:
    """What an engine of either model runner needs to force tokens."""
    how = {"enable_trace_replay": True} if v2 else {"logits_processors": [ForcedTokens]}
    return {"max_logprobs": listed(vocabulary), "logprobs_mode": "raw_logprobs", **how}


def params(tokens: list[int], v2: bool, vocabulary: int) -> SamplingParams:
    how = {"trace_decode_token_ids": tokens} if v2 else {"extra_args": {ARGUMENT: tokens}}
    return SamplingParams(
        temperature=0.0, max_tokens=len(tokens), ignore_eos=True, detokenize=False, logprobs=listed(vocabulary),
        flat_logprobs=True, **how,
    )  # fmt: skip


def distributions(output, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 and log-probabilities float32, both `[T, K]`, of one finished request.

    Raises RuntimeError where the engine did not follow `tokens`.
    """
    if list(output.token_ids) != tokens:
        raise RuntimeError("this vLLM did not decode the forced tokens (`vllm-mac eval --kl 0` does without)")
    flat = output.logprobs
    spans = list(zip(flat.start_indices, flat.end_indices, strict=True))
    # The sampled token comes first and may come again: pad by repeating what is there.
    width = max(end - start for start, end in spans)
    ids = np.empty((len(spans), width), dtype=np.int32)
    logprobs = np.empty((len(spans), width), dtype=np.float32)
    for row, (start, end) in enumerate(spans):
        ids[row], logprobs[row] = flat.token_ids[start], flat.logprobs[start]
        ids[row, : end - start], logprobs[row, : end - start] = flat.token_ids[start:end], flat.logprobs[start:end]
    return ids, logprobs


def save(path: Path, found: dict[str, tuple[np.ndarray, np.ndarray]], vocabulary: int) -> None:
    """Whole or not at all; by the id of the request."""
    part = path.with_name(path.name + ".part")
    arrays = {f"{id}:{kind}": array for id, pair in found.items() for kind, array in zip(KINDS, pair, strict=True)}
    with open(part, "wb") as file:
        np.savez(file, vocabulary=vocabulary, **arrays)
    part.replace(path)


def load(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """What `save` was given."""
    with np.load(path) as arrays:
        names = dict.fromkeys(name.rpartition(":")[0] for name in arrays.files if ":" in name)
        return {name: tuple(arrays[f"{name}:{kind}"] for kind in KINDS) for name in names}, int(arrays["vocabulary"])
