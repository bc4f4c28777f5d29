"""What every test of this folder runs under, and the one place where tests are skipped by machine."""

import os
import sys
from pathlib import Path

# More threads than one make tiny models slower, and far slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pytest
import torch

pytest.register_assert_rewrite("support")
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # As engines of tests have it (`support/engine.py`): PyTorch reads it when something first imports its compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from support import triton_cpu

    # Before anything imports a kernel or vLLM: from here on kernels run in Triton's interpreter.
    triton_cpu.enable()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models(name)`: the folder of a tiny model, written once a process. Tests leave it as it is."""
    from support.tiny_models import write

    folder = tmp_path_factory.mktemp("models")
    return lambda name: write(name, folder)


@pytest.fixture(scope="session")
def model(models):
    return models("llama")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """The folder of a model with heads of 64 that GPUs run, with its tokenizer. Tests leave it as it is."""
    from byte_model import write_model, write_tokenizer

    path = tmp_path_factory.mktemp("byte_model")
    write_model(path)
    write_tokenizer(path)
    return path


@pytest.fixture
def quick(monkeypatch):
    """The environment of a command that starts engines in processes of their own."""
    for name, value in {
        "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a YAML file and returns its path as text."""

    def write(text: str | bytes, name: str = "mac.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def pytest_collection_modifyitems(items):
    absent, reason = ("cpu", "is about machines without a GPU") if ON_GPU else ("gpu", "needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker(absent):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"
