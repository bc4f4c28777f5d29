"""Finds the Triton that each supported vLLM installs beside CUDA; kept in `.cache/triton-VERSION-PYTHON`.

folder("3.8.0")          # goes before other packages on the path of a Python like this one, or None: it is installed
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def folder(version: str) -> Path | None:
    """Raises RuntimeError where there is none to be had."""
    if importlib.metadata.version("triton") == version:
        return None
    target = CACHE / f"triton-{version}-{sys.implementation.cache_tag}"
    if not target.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            command = [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "install",
                "-q",
                "--no-deps",
                "--target",
            ]
            done = subprocess.run([*command, f"{work}/site", f"triton=={version}"], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"pip does not install triton {version}: {done.stderr.strip()[-500:]}")
            Path(work, "site").rename(target)
    return target
