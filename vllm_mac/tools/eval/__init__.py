"""`vllm-mac eval`: what MAC does to a model's answers, beside exact attention on the same prompts."""


class EvalError(RuntimeError):
    """The evaluation cannot run. The message says why and what to change."""
