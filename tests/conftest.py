"""What every test of this folder runs under, and the one place where tests are skipped by machine."""

import os
import sys
from pathlib import Path

# More threads than one make tiny models slower, and far slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    import triton_cpu

    # Before anything imports a kernel or vLLM: from here on kernels run in Triton's interpreter.
    triton_cpu.enable()


def pytest_collection_modifyitems(items):
    absent, reason = ("cpu", "is about machines without a GPU") if ON_GPU else ("gpu", "needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker(absent):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"
