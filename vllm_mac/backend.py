"""The class that `--attention-backend MAC` names: the one for this machine's platform."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm_mac.cpu import MacCPUBackend as MacBackend
elif current_platform.is_cuda():
    from vllm_mac.cuda import MacCUDABackend as MacBackend
else:
    raise ImportError(
        f"MAC runs on NVIDIA GPUs and on CPUs, and this platform is {current_platform.device_name}; "
        "choose another --attention-backend"
    )

__all__ = ["MacBackend"]
