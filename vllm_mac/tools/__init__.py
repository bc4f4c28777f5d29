"""The commands of `vllm-mac`, which the backend itself never imports."""


class ToolError(RuntimeError):
    """A command cannot do its work. The message says why and what to change."""
