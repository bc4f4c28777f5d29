"""What results name as the commit of the code they are from."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_mac.tools import environment

FILES = {"vllm_mac/__init__.py": "one\n", "vllm_mac/tools/eval/evaluation.py": "two\n",
         "kernels/match.py": "three\n", "configs/default.yaml": "window: 5\n"}  # fmt: skip


def git(folder, *args):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "c")
    return git(folder, "rev-parse", "--short=12", "HEAD")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A checkout and the package installed from it, as pip lays it out."""
    checkout, package = tmp_path / "checkout", tmp_path / "site-packages" / "vllm_mac"
    for name, text in FILES.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    (checkout / "vllm_mac" / "kernels").symlink_to("../kernels")
    git(checkout, "init", "-q")
    commit(checkout)
    install(checkout, package)
    module = package / "tools" / "environment.py"
    monkeypatch.setattr(environment, "__file__", str(module))
    monkeypatch.setattr(environment, "_sources", lambda: [tmp_path / "absent", checkout])
    monkeypatch.delenv(environment.COMMIT_VAR, raising=False)
    return checkout, package


def install(checkout: Path, package: Path) -> None:
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(checkout / "vllm_mac", package, symlinks=False)
    shutil.copytree(checkout / "configs", package / "configs")


def named() -> str:
    return environment.commit.__wrapped__()


def test_an_installed_package_is_the_commit_with_its_files(places):
    checkout, package = places
    first = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert named() == first
    (checkout / "README.md").write_text("new")
    assert named() == first  # files beside the package are not its own
    second = commit(checkout)
    assert named() == second != first
    (checkout / "kernels" / "match.py").write_text("three and a half\n")
    third = commit(checkout)
    assert named() == first  # which last changed what is installed
    install(checkout, package)
    assert named() == third


def test_edited_files_are_said_to_be(places):
    checkout, package = places
    head = git(checkout, "rev-parse", "--short=12", "HEAD")
    (checkout / "configs" / "default.yaml").write_text("window: 6\n")
    install(checkout, package)
    assert named() == f"{head}-dirty"
    (package / "tools" / "eval" / "evaluation.py").write_text("edited where it is installed\n")
    assert named() == "unknown"


def test_the_environment_says_it_first(places, monkeypatch):
    monkeypatch.setenv(environment.COMMIT_VAR, "abc")
    assert named() == "abc"


def test_a_package_from_elsewhere_is_unknown(places, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setattr(environment, "_sources", lambda: [other, tmp_path])
    assert named() == "unknown"  # no commit, and no checkout
    (other / "a").write_text("b")
    commit(other)
    assert named() == "unknown"


@pytest.mark.parametrize(
    "url, folder", [("file:///some%20where/x", "/some where/x"), ("https://index/x.whl", None), (None, None)]
)
def test_where_a_package_was_installed_from(url, folder, monkeypatch, tmp_path):
    told = json.dumps({"url": url, "dir_info": {}}) if url else None
    distribution = type("Distribution", (), {"read_text": lambda self, name: told})
    monkeypatch.setattr(environment.importlib.metadata, "distribution", lambda name: distribution())
    monkeypatch.chdir(tmp_path)
    assert environment._sources() == [*([Path(folder)] if folder else []), tmp_path]
