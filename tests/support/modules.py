"""The modules of the package and what each of them imports."""

import ast
from pathlib import Path

from support import ROOT

PACKAGE = "vllm_mac"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; `kernels/` is one of them."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


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
