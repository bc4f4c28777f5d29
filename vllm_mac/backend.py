"""The class that `--attention-backend MAC` names: the one for this machine's platform."""

from vllm.platforms import current_platform

from vllm_mac.compilers import FLASHINFER

if current_platform.is_cpu():
    from vllm_mac.cpu import MacCPUBackend as MacBackend
elif current_platform.is_cuda():
    try:
        from vllm_mac.cuda import MacCUDABackend as MacBackend
    except Exception as error:
        if "flashinfer" not in str(error).lower():
            raise
        raise ImportError(f"MAC needs FlashInfer on GPUs, and it fails here: {error}. {FLASHINFER}") from error
else:
    raise ImportError(
        f"MAC runs on NVIDIA GPUs and on CPUs, and this platform is {current_platform.device_name}; "
        "choose another --attention-backend"
    )

__all__ = ["MacBackend"]
