"""Matplotlib, which only plots need."""

from vllm_mac.tools import ToolError


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ToolError("plot: matplotlib is not installed; `pip install matplotlib` brings it") from error
