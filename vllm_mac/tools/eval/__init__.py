"""`vllm-mac eval`: what MAC does to a model's answers, beside exact attention on the same prompts."""

from vllm_mac.tools import ToolError


class EvalError(ToolError):
    """The evaluation cannot run."""
