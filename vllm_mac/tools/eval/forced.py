"""Teacher forcing: an engine decodes a given text token by token, and the distribution of each next token is kept.

The text is a prompt with its exact reply. Its last TOKENS tokens are decoded; the tokens before them are prefilled. So
an engine's own errors do not change its input, the text is one that the model gets or writes, and attention runs as in
decoding.
"""

from pathlib import Path
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

TOKENS = 256
FULL, TOP = 2048, 1024  # log-probabilities of a vocabulary of up to FULL ids, else of the TOP likeliest tokens
ARGUMENT = "vllm_mac_forced"
KINDS = "ids", "logprobs"


def listed(vocabulary: int) -> int:
    """How many log-probabilities are kept of each step."""
    return vocabulary if vocabulary <= FULL else TOP


def split(prompt: list[int], reply: list[int]) -> tuple[list[int], list[int]]:
    """The tokens to prefill and those to decode. Of a short sequence the second half is decoded."""
    whole = [*prompt, *reply]
    cut = len(whole) - min(TOKENS, len(whole) // 2)
    return whole[:cut], whole[cut:]


class ForcedTokens(AdapterLogitsProcessor):
    """Makes only the forced token possible, for vLLM's V1 model runner, which cannot replay a text.

    Log-probabilities are taken before logits processors run. Goes when vLLM has only its V2 runner.
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
    """The arguments that an engine of either model runner needs to force tokens."""
    how = {"enable_trace_replay": True} if v2 else {"logits_processors": [ForcedTokens]}
    return {"max_logprobs": listed(vocabulary), "logprobs_mode": "raw_logprobs", **how}


def params(tokens: list[int], v2: bool, vocabulary: int) -> SamplingParams:
    how: dict[str, Any] = {"trace_decode_token_ids": tokens} if v2 else {"extra_args": {ARGUMENT: tokens}}
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
    # The sampled token comes first and may come a second time. Shorter rows are padded with their first token.
    width = max(end - start for start, end in spans)
    ids = np.empty((len(spans), width), dtype=np.int32)
    logprobs = np.empty((len(spans), width), dtype=np.float32)
    for row, (start, end) in enumerate(spans):
        ids[row], logprobs[row] = flat.token_ids[start], flat.logprobs[start]
        ids[row, : end - start], logprobs[row, : end - start] = flat.token_ids[start:end], flat.logprobs[start:end]
    return ids, logprobs


def save(path: Path, found: dict[str, tuple[np.ndarray, np.ndarray]], vocabulary: int) -> None:
    """Write distributions by the id of their request, whole or not at all."""
    part = path.with_name(path.name + ".part")
    arrays = {f"{id}:{kind}": array for id, pair in found.items() for kind, array in zip(KINDS, pair, strict=True)}
    with open(part, "wb") as file:
        np.savez(file, vocabulary=vocabulary, **arrays)  # pyrefly: ignore[bad-argument-type]
    part.replace(path)


def load(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """The arguments of `save`."""
    with np.load(path) as arrays:
        names = dict.fromkeys(name.rpartition(":")[0] for name in arrays.files if ":" in name)
        return {name: tuple(arrays[f"{name}:{kind}"] for kind in KINDS) for name in names}, int(arrays["vocabulary"])
