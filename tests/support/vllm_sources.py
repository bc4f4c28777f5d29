"""Finds the Python sources of the vLLM versions that the project supports.

    folder("0.33.0")          # holds `vllm/`, and is read, never imported

In this order: the folders that MAC_VLLM_SOURCES names (separated as in PATH), the installed
vLLM, and `.cache/vllm-VERSION`, which is filled from the version's wheel when it is missing.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from support import ROOT

VERSIONS = ("0.32.0", "0.33.0")
VARIABLE = "MAC_VLLM_SOURCES"
CACHE = ROOT / ".cache"


def folder(version: str) -> Path:
    """The folder with `vllm/` of that version. Raises RuntimeError where there is none to be had."""
    named = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    for path in named:
        if _version(path) is None:
            raise RuntimeError(f"{VARIABLE}: {path} holds no vllm/_version.py; name the folder above the package")
    spec = importlib.util.find_spec("vllm")
    installed = [Path(spec.origin).parent.parent] if spec and spec.origin else []
    cached = CACHE / f"vllm-{version}"
    for path in (*named, *installed, cached):
        if _version(path) == version:
            return path
    _download(version, cached)
    return cached


def _version(path: Path) -> str | None:
    file = path / "vllm" / "_version.py"
    found = re.search(r"^__version__ = .*'(\d+\.\d+\.\d+)", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found and found[1]


def _download(version: str, target: Path) -> None:
    """Keep the Python files of the version's wheel, which is 336 MB and mostly kernels."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        print(f"downloading the wheel of vllm {version} for its sources", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
             "--no-cache-dir", "--only-binary=:all:", "--dest", work, f"vllm=={version}"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"The sources of vllm {version} are neither installed nor in {target.name}, and pip could not "
                f"download its wheel. Name a folder that holds them in {VARIABLE}.\n{done.stderr.strip()}"
            )
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                Path(work, "sources"),
                [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")],
            )
        shutil.rmtree(target, ignore_errors=True)
        # Renaming leaves either nothing or everything.
        Path(work, "sources").rename(target)
