"""The yardstick of a run: exact attention again, with its sums in another order.

It differs from exact attention only by rounding, a difference that users accept when they choose a backend. Compare the
divergence of reuse with that of the yardstick.
"""

from dataclasses import dataclass, field

from vllm_mac.tools.eval import EvalError

OWN = "default"  # the platform's own choice of backend


@dataclass(frozen=True, slots=True)
class Yardstick:
    """said: its description in reports. llm: arguments of `vllm.LLM` that differ from exact's. environment: environment
    variables of its engine that differ from exact's."""

    said: str
    llm: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


# Changes of vLLM's only backend on CPUs. They change the order of sums.
ROUNDING = {
    "chunks": Yardstick("vLLM's own backend, with prefill in chunks of 512 tokens", {"max_num_batched_tokens": 512}),
}
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")  # examples for error messages


def choose(text: str, exact: str, on_gpu: bool) -> Yardstick:
    """The yardstick for a value of --yardstick. exact: the backend that is compared with, or OWN.

    Raises EvalError where the value is not another exact backend.
    """
    if not on_gpu:
        if text not in ROUNDING:
            raise EvalError(
                f"--yardstick: received {text!r}; on CPUs vLLM has no second exact backend. Choose {' or '.join(ROUNDING)}, which changes "
                "the rounding of its own, or leave --yardstick out"
            )
        return ROUNDING[text]
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    others = ", ".join(name for name in BACKENDS if name != exact)
    if text == exact:
        raise EvalError(
            f"--yardstick: received {text!r}, the backend that is compared with; choose another exact backend, such as {others}"
        )
    if text not in AttentionBackendEnum.__members__ or text == "MAC":
        raise EvalError(f"--yardstick: received {text!r}; choose another exact backend of vLLM's, such as {others}")
    return Yardstick(
        f"{text} instead of {'the backend that vLLM chooses' if exact == OWN else exact}", {"attention_backend": text}
    )
