"""`vllm-mac bench`: what MAC costs and saves, beside the best exact attention on the same machine."""

from vllm_mac.tools import ToolError


class BenchError(ToolError):
    """The benchmark cannot run, or a result is wrong."""
