"""The GPU backend's own code on a machine without a GPU.

    cuda = gpu_backend()
    cuda.MacCUDABackend

Whatever it imports from FlashInfer is a mock, so nothing of FlashInfer's can run; all of MAC's and vLLM's can.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

# Modules that must not be left behind with mocks in them, nor found as they were without.
TOUCHED = (
    "flashinfer",
    "vllm.utils.flashinfer",
    "vllm.v1.attention.backends.flashinfer",
    "vllm_mac.cuda",
    "vllm_mac.seeding",
)


class _Mock(types.ModuleType):
    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "flashinfer":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Mock(spec.name)

    def exec_module(self, module):
        module.__path__ = []


@functools.cache
def gpu_backend() -> types.ModuleType:
    """The module `vllm_mac.cuda`, imported once; the other modules of this process find no mocks."""
    before = {name: module for name, module in sys.modules.items() if _touched(name)}
    for name in before:
        del sys.modules[name]
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("vllm_mac.cuda", "vllm_mac.seeding")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _touched(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        for name, module in before.items():  # an import has made them attributes of their packages
            package, _, last = name.rpartition(".")
            setattr(sys.modules[package], last, module)


def _touched(name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in TOUCHED)
