"""The class that `--attention-backend MAC` names: the one for this machine's platform."""

from vllm.platforms import current_platform

if not current_platform.is_cpu():
    raise ImportError(
        f"MAC runs on vLLM's CPU platform only in this version, and this is {current_platform.device_name}; "
        "choose another --attention-backend"
    )

from vllm_mac.cpu import MacCPUBackend as MacBackend

__all__ = ["MacBackend"]
