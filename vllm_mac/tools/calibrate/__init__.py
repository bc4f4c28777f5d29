"""`vllm-mac calibrate`: per-layer thresholds that keep the error of reuse within a budget at the fewest KV reads."""


class CalibrateError(RuntimeError):
    """The calibration cannot run or finds no answer. The message says why and what to change."""
