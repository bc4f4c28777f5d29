"""The yardstick of a run: exact attention once more, with its sums in another order.

What it differs from exact attention by is rounding, which nobody minds who chooses a backend. So its divergence is what
that of reuse is read against.
"""

from dataclasses import dataclass, field

from vllm_mac.tools.eval import EvalError

OWN = "default"  # the platform's own choice of backend


@dataclass(frozen=True, slots=True)
class Yardstick:
    """said: what it is, for reports. llm: arguments of `vllm.LLM` other than exact's. environment: variables of its
    engine other than exact's."""

    said: str
    llm: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


# Changes of vLLM's own backend on CPUs, which has no other: what they change is the order of sums.
ROUNDING = {
    "chunks": Yardstick("vLLM's own backend, reading prompts 512 tokens at a time", {"max_num_batched_tokens": 512}),
}
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")  # to name as examples


def choose(text: str, exact: str, on_gpu: bool) -> Yardstick:
    """The yardstick that --yardstick names. exact: the backend compared with, or OWN.

    Raises EvalError for what is no other exact backend than that.
    """
    if not on_gpu:
        if text not in ROUNDING:
            raise EvalError(
                f"--yardstick: received {text!r}; on CPUs vLLM has no second exact backend. Choose {' or '.join(ROUNDING)}, which changes "
                "how its own rounds, or leave --yardstick out"
            )
        return ROUNDING[text]
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    others = ", ".join(name for name in BACKENDS if name != exact)
    if text == exact:
        raise EvalError(
            f"--yardstick: received {text!r}, which is what is compared with; choose another exact backend, such as {others}"
        )
    if text not in AttentionBackendEnum.__members__ or text == "MAC":
        raise EvalError(f"--yardstick: received {text!r}; choose another exact backend of vLLM's, such as {others}")
    return Yardstick(
        f"{text} instead of {'the backend that vLLM chooses' if exact == OWN else exact}", {"attention_backend": text}
    )
