"""Finds the Triton that each supported vLLM installs beside CUDA, kept in `.cache/triton-VERSION-PYTHON`, and runs it.

folder("3.8.0")          # goes before other packages on the path of a Python like this one, or None: it is installed
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from support import ROOT

CACHE = ROOT / ".cache"


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


def compiles(cache: Path, *arguments: str, first: Path | None = None) -> list[dict]:
    """The JSON lines that Python prints where Triton compiles, into a cache of its own, also without a GPU.

    first: where packages are, before those installed.
    """
    folders = [ROOT / "tests", ROOT / "examples", ROOT, *([first] if first else [])]
    path = os.pathsep.join(str(folder) for folder in folders)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
