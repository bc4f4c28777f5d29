"""The shape of the project: which room may import which, how long files get, what lies on top."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_mac"
LONGEST = 450

# Imports point one way, downwards: tools -> backend rooms -> engine rooms -> config.
CONFIG, ENGINE, BACKEND, TOOLS = range(4)
ROOMS = {
    CONFIG: {"__init__", "config"},
    ENGINE: {
        "audit", "counter_files", "counters", "flashinfer_exact", "fused", "kernels", "owners", "paged", "reference", "ring",
        "rope", "totals",
    },
    BACKEND: {
        "backend", "capabilities", "cpu", "cuda", "exporter", "layers", "log_line", "metrics", "per_request", "plugin",
        "publisher", "requests", "series", "startup", "steps", "support", "warmup",
    },
    TOOLS: {"tools"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; `kernels/` is one of them."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def level(module: str) -> int:
    """A new room has to be put on a level of `ROOMS` first."""
    (found,) = (level for level, rooms in ROOMS.items() if module.split(".")[0] in rooms)
    return found


def imports(path: Path, name: str = "") -> set[str]:
    """Dotted names of the modules that a file imports, also inside functions."""
    package = [PACKAGE, *name.split(".")] if path.name == "__init__.py" else [PACKAGE, *name.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.add(module)
            # `from vllm_mac import paged` imports a module too.
            found |= {f"{module}.{alias.name}" for alias in node.names if module.startswith(PACKAGE)}
    return found


def own(path: Path, name: str) -> set[str]:
    """Modules of this package that a file imports, below the package's name."""
    names = {i.removeprefix(PACKAGE + ".") for i in imports(path, name) if i.startswith(PACKAGE + ".")}
    return {i for i in names if i in MODULES or i == "kernels"}


def top(path: Path, name: str) -> set[str]:
    return {i.split(".")[0] for i in imports(path, name)}


def test_the_rooms_are_there():
    """The checks below look at something."""
    assert {name.split(".")[0] for name in MODULES} == set().union(*ROOMS.values())
    assert {"config", "reference", "paged", "ring", "rope", "backend", "kernels"} <= MODULES.keys()
    assert "reference" in own(MODULES["paged"], "paged") and "vllm" in top(MODULES["layers"], "layers")
    assert "ring" in own(MODULES["layers"], "layers")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    above = {i for i in own(MODULES[name], name) if level(i) > level(name)}
    assert not above, f"{name} imports {sorted(above)}, which lie above it"


@pytest.mark.parametrize("name", [name for name in MODULES if level(name) <= ENGINE])
def test_engine_rooms_do_not_know_vllm(name):
    assert "vllm" not in top(MODULES[name], name)


def test_config_knows_neither_torch_nor_vllm():
    assert not {"torch", "vllm", "triton"} & top(MODULES["config"], "config")


@pytest.mark.parametrize(
    "room, stranger",
    [
        ("ring", {"reference", "paged", "rope", "kernels", "owners"}),
        ("owners", {"ring", "reference", "paged", "rope", "kernels"}),
        ("kernels", {"ring", "reference", "paged", "rope", "flashinfer_exact"}),
        ("flashinfer_exact", {"ring", "reference", "paged", "rope"}),
        ("rope", {"ring", "reference", "paged", "kernels"}),
        ("reference", {"ring", "paged", "rope", "kernels"}),
    ],
)
def test_rooms_that_must_not_know_each_other(room, stranger):
    for name in [name for name in MODULES if name.split(".")[0] == room]:
        assert not {i.split(".")[0] for i in own(MODULES[name], name)} & stranger, name


def test_the_engine_on_cpus_needs_no_triton():
    reached, left = set(), ["paged", "rope", "audit"]
    while left:
        reached.add(name := left.pop())
        assert "triton" not in top(MODULES[name], name), name
        left += own(MODULES[name], name) - reached
    assert {"config", "reference", "ring", "audit"} <= reached


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_short(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{MODULES[name].relative_to(ROOT)} has {lines} lines"


def test_the_top_level_is_the_design_s():
    """Hidden folders, and what building and running leave behind, are not the project's."""
    left = {"build", "dist", "__pycache__"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    folders = {name for name in folders - left if not name.endswith(".egg-info")}
    expected = {"vllm_mac", "kernels", "configs", "tests"}
    assert expected <= folders <= expected | {"examples"}
