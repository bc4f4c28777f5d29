"""What compiles kernels on a GPU: whether it is there, and may write where it keeps what it compiled."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FLASHINFER = "pip install flashinfer-python, in the version that this vLLM asks for"


class Cache(NamedTuple):
    """whose: a compiler. folder: where it keeps kernels. variable: what names another folder."""

    whose: str
    folder: Path
    variable: str


def caches(environ: Mapping[str, str] = os.environ) -> list[Cache]:
    """Those of Triton and FlashInfer."""
    home = environ.get("HOME", "~")
    triton = environ.get("TRITON_CACHE_DIR") or Path(environ.get("TRITON_HOME") or home, ".triton", "cache")
    flashinfer = Path(environ.get("FLASHINFER_WORKSPACE_BASE") or home, ".cache", "flashinfer")
    return [
        Cache("Triton", Path(triton).expanduser(), "TRITON_CACHE_DIR"),
        Cache("FlashInfer", flashinfer.expanduser(), "FLASHINFER_WORKSPACE_BASE"),
    ]


def unwritable(environ: Mapping[str, str] = os.environ) -> Iterator[Cache]:
    """Yields the caches that cannot be written, nor made."""
    for cache in caches(environ):
        there = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            yield cache


@contextmanager
def explained() -> Iterator[None]:
    """Where kernels are compiled: an error says that this failed, and what to do."""
    try:
        yield
    except Exception as error:
        cannot = "".join(f"; {x.folder} cannot be written, set {x.variable}" for x in unwritable())
        raise RuntimeError(
            f"MAC's kernels cannot be compiled or launched here ({type(error).__name__}: {error}){cannot}. "
            "Without MAC: leave --attention-backend MAC out"
        ) from error


def has_flashinfer() -> bool:
    """Whether it is installed; to import it begins with the GPU."""
    return importlib.util.find_spec("flashinfer") is not None
