"""What is distributed: a wheel and a source archive, built here, and the wheel in an environment of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import vllm_mac
from support import ROOT

pytestmark = pytest.mark.cpu
NAME = f"vllm_mac-{vllm_mac.__version__}"
BUILD = "import sys; from setuptools.build_meta import build_{0}; print(build_{0}(sys.argv[1]))"


def built(kind: str, source: Path, to: Path) -> Path:
    """A `wheel` or an `sdist` of the project in `source`, by the back end that pyproject.toml names."""
    command = [sys.executable, "-c", BUILD.format(kind), str(to)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """`(wheel, sdist, wheel of the sdist)`, built from a copy of the checkout: building leaves files behind."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs a checkout")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=hidden)
    wheel, sdist = built("wheel", source, folder), built("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    again = built("wheel", folder / "unpacked" / NAME, folder / "unpacked")
    return wheel, sdist, again


def files(wheel: Path) -> dict[str, int]:
    """The files of a wheel but for its own record, with their sizes."""
    with zipfile.ZipFile(wheel) as archive:
        return {x.filename: x.file_size for x in archive.infolist() if not x.filename.endswith("/RECORD")}


def test_the_wheel_has_every_module_and_nothing_else(archives):
    found = files(archives[0])
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_mac").rglob("*.py")}
    own |= {f"vllm_mac/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    own |= {f"vllm_mac/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    own |= {f"vllm_mac/{path.name}" for path in (ROOT / "vllm_mac").glob("py.typed")}
    added = {name for name in found if not name.startswith(f"{NAME}.dist-info/")}
    assert added == own
    assert any(name.endswith("LICENSE") for name in found)


def test_the_source_archive_gives_the_same_wheel(archives):
    """With what it needs to be built: pyproject.toml, README and licence. The link to the kernels is a folder in it."""
    assert files(archives[2]) == files(archives[0])


def test_the_wheel_runs_where_nothing_else_of_the_project_is(archives, tmp_path):
    """An environment of its own, with the dependencies of this one, and a folder that is no checkout."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True)
    python = venv / "bin" / "python"
    install = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps", str(archives[0])]
    subprocess.run([str(python), *install], check=True, capture_output=True)
    (own,) = venv.glob("lib/python3*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    run = lambda *command: (
        subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
        ).stdout
    )
    assert run(venv / "bin" / "vllm-mac", "--version").strip() == vllm_mac.__version__
    script = """
import importlib.metadata as metadata, json, vllm_mac, vllm_mac.kernels, vllm_mac.configs
from vllm_mac.config import resolve
(found,) = [one for one in metadata.entry_points(group="vllm.general_plugins") if one.value.startswith("vllm_mac")][:1]
print(json.dumps({
    "places": [vllm_mac.__file__, vllm_mac.kernels.__path__[0], [*vllm_mac.configs.__path__][0]],
    "plugin": found.dist.locate_file("").__fspath__(), "paper": resolve({"config": "paper"}).rule,
    "register": found.load().__name__,
}))
"""
    told = json.loads(run(python, "-c", script))
    assert all(place.startswith(str(own)) for place in (*told["places"], told["plugin"])), told
    assert told["paper"] == "match" and told["register"] == "register"


def test_the_source_archive_installs_with_all_that_it_asks_for(archives, tmp_path):
    """In an environment with nothing in it. vLLM comes with an extra; without that commands say what is not installed."""
    venv, constraints = tmp_path / "venv", ROOT / "tests" / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", str(constraints), str(archives[1])]
    done = subprocess.run(
        [venv / "bin" / "python", *install], env=environ, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = lambda *command: subprocess.run(
        [venv / "bin" / "vllm-mac", *command], env=environ, capture_output=True, text=True, cwd=tmp_path
    )
    assert run("--version").stdout.strip() == vllm_mac.__version__
    found = run("doctor")
    assert found.returncode == 1 and not found.stdout
    assert re.fullmatch(r"(torch|vllm): not installed; install vLLM beside vllm-mac: .*\n", found.stderr)
