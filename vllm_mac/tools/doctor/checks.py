"""Checks of a machine: versions, devices, and whether vLLM finds the plugin in every process."""

import importlib.metadata
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_mac.plugin import BACKEND, NAME
from vllm_mac.tools.doctor import versions

OK, WARNING, PROBLEM, UNCHECKED = "ok", "warning", "problem", "not checked"
ENTRY_POINTS = {
    "vllm.general_plugins": "vllm_mac.plugin:register",
    "vllm.platform_plugins": "vllm_mac.plugin:platform",
}
INSTALL = "bash examples/install.sh VENV, in a checkout"


@dataclass(frozen=True)
class Finding:
    """One line of the report. cure: what to do about it."""

    section: str
    mark: str
    text: str
    cure: str | None = None


def of_versions(environment: dict) -> Iterator[Finding]:
    """environment: the result of `environment.environment`."""
    place, on_gpu = "versions", environment["gpu"] is not None
    found = environment["python"]
    fits = versions.within(found, versions.PYTHON)
    yield Finding(
        place,
        OK if fits else PROBLEM,
        f"Python {found}",
        None if fits else f"use Python {versions.spelled(versions.PYTHON)}",
    )
    found, wanted = environment["vllm"], versions.spelled(versions.VLLM)
    if found is None:
        yield Finding(place, PROBLEM, "vLLM is not installed", INSTALL)
    elif versions.within(found, versions.VLLM):
        yield Finding(place, OK, f"vLLM {found}")
    else:
        yield Finding(place, PROBLEM, f"vLLM {found} is not supported", f"pip install 'vllm{wanted}'")
    found = environment["torch"]
    yield (
        Finding(place, OK, f"PyTorch {found}")
        if found
        else Finding(place, PROBLEM, "PyTorch is not installed", INSTALL)
    )
    found = environment["triton"]
    known = found is not None and versions.parsed(found)[:2] in versions.TRITONS
    tried = " and ".join(".".join(map(str, one)) for one in versions.TRITONS)
    if known or not on_gpu:
        yield Finding(
            place, OK, f"Triton {found or 'is not installed'}" + ("" if on_gpu else ", which CPUs do not need")
        )
    elif found is None:
        yield Finding(
            place,
            PROBLEM,
            "Triton is not installed",
            "install vLLM's own requirements: pip install --force-reinstall vllm",
        )
    else:
        yield Finding(place, WARNING, f"Triton {found} is untested", f"{tried} are tested; vLLM installs one of them")
    found = environment["flashinfer"]
    if found is None and on_gpu:
        yield Finding(
            place, PROBLEM, "FlashInfer is not installed, and prefill on GPUs needs it", "pip install flashinfer-python"
        )
    else:
        yield Finding(place, OK, f"FlashInfer {found}" if found else "no FlashInfer, which CPUs do not need")
    yield Finding(place, OK, f"vllm-mac {environment['vllm_mac']}, commit {environment['commit']}")


def of_devices(environment: dict, by_index: bool) -> Iterator[Finding]:
    """by_index: whether MAC is to decode by the index of keys."""
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", PROBLEM, f"PyTorch cannot be imported: {error}", INSTALL)
        return
    from vllm_mac.capabilities import TO_MATCH, refused_gpu, refused_index_gpu

    if not torch.cuda.is_available():
        if environment["gpu"] is None:
            yield Finding("devices", OK, "no GPU: MAC's CPU engine is for tests of the method; it is not faster")
        else:
            yield Finding(
                "devices", PROBLEM, f"{environment['gpu']}, which PyTorch {torch.__version__} cannot use", INSTALL
            )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = (facts.major, facts.minor)
        reason = refused_gpu(capability)
        without = by_index and not reason and refused_index_gpu(capability)
        text = f"GPU {index}: {facts.name}, sm{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
        if reason or without:
            yield Finding(
                "devices", PROBLEM, f"{text}: {reason or without}", TO_MATCH if without else "use another GPU"
            )
        else:
            yield Finding("devices", OK, text)


def of_plugin() -> Iterator[Finding]:
    place = "plugin"
    for group, value in ENTRY_POINTS.items():
        mine = [point for point in importlib.metadata.entry_points(group=group) if point.value == value]
        if not mine:
            cure = "pip install . in the checkout: being on the path is not enough"
            yield Finding(place, PROBLEM, f"no entry point {value} in the group {group}", cure)
            continue
        yield Finding(place, OK, f"entry point {mine[0].name} in the group {group}")
    admitted = os.environ.get("VLLM_PLUGINS")
    if admitted is not None and "mac" not in admitted.split(","):
        yield Finding(
            place, PROBLEM, f"VLLM_PLUGINS={admitted!r} leaves the plugin out", "add mac to VLLM_PLUGINS, or unset it"
        )
    try:
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
        on_gpu = current_platform.is_cuda()
    except Exception as error:  # any error of a broken installation
        yield Finding(place, PROBLEM, f"vLLM cannot be imported: {type(error).__name__}: {error}", INSTALL)
        return
    if NAME not in AttentionBackendEnum.__members__:
        yield Finding(
            place,
            PROBLEM,
            f"vLLM does not know {NAME} once its plugins are loaded",
            "see the lines above, and vLLM's log",
        )
        return
    yield Finding(place, OK, f"vLLM knows {NAME} once its plugins are loaded")
    yield _spawned(AttentionBackendEnum[NAME])
    yield _chosen(current_platform, AttentionBackendEnum[NAME])
    yield _planned() if on_gpu else Finding(place, UNCHECKED, "FlashInfer's plan: no GPU")


# The name must come with the pickle alone: an engine unpickles its configuration before it loads plugins.
_READ = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get_path())"


def _spawned(member) -> Finding:
    env = os.environ | {"VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", _READ], input=pickle.dumps(member), capture_output=True, env=env)
    if done.returncode == 0 and done.stdout.decode().split()[-1:] == [BACKEND]:
        return Finding("plugin", OK, f"{NAME} is known in a spawned process")
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"code {done.returncode}"]
    return Finding(
        "plugin", PROBLEM, f"{NAME} is not known in a spawned process: {last[0]}", "report it with both versions"
    )


def _chosen(platform, member) -> Finding:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import AttentionSelectorConfig

    dtype = torch.bfloat16
    try:
        with set_current_vllm_config(VllmConfig()):
            asked = AttentionSelectorConfig(head_size=128, dtype=dtype, kv_cache_dtype="auto", block_size=None)
            path = platform.get_attn_backend_cls(member, attn_selector_config=asked, num_heads=32)
    except Exception as error:  # also errors of the backend's own imports
        return Finding("plugin", PROBLEM, f"{NAME} is refused here: {type(error).__name__}: {error}", "see the reason")
    if path != BACKEND and not path.endswith("MacCUDABackend"):
        return Finding("plugin", PROBLEM, f"vLLM takes {path} where {NAME} is chosen", "report it with both versions")
    return Finding("plugin", OK, f"vLLM takes {NAME} on this platform ({platform.device_name}) where it is chosen")


def _planned() -> Finding:
    """Plan FlashInfer's prefill of one row of 64 tokens, as MAC does for each chunk."""
    try:
        import torch
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        whole = lambda *values: torch.tensor(values, dtype=torch.int32)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD")
        wrapper.plan(
            whole(0, 64), whole(0, 4), whole(0, 1, 2, 3).cuda(), whole(16), 32, 8, 128, 16, causal=True,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        torch.cuda.synchronize()
    except Exception as error:  # of a compiler, a driver, or a wrong version
        return Finding(
            "plugin",
            PROBLEM,
            f"FlashInfer cannot plan: {type(error).__name__}: {error}",
            "pip install -U flashinfer-python",
        )
    return Finding("plugin", OK, "FlashInfer plans")
