"""`vllm-mac calibrate`: per-layer thresholds that keep the error of reuse within a budget at the fewest KV reads."""

from vllm_mac.tools import ToolError


class CalibrateError(ToolError):
    """The calibration cannot run, or finds no answer."""
