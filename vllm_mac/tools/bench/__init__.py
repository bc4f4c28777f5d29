"""`vllm-mac bench`: what MAC costs and saves, beside the best exact attention on the same machine."""


class BenchError(RuntimeError):
    """The benchmark cannot run, or a result is wrong. The message says why and what to change."""
