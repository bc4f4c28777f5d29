"""Nothing that the project reads from a file can run code: no pickles, no YAML with objects, no `eval`; no shell."""

import ast

import pytest
import yaml

from support import ROOT
from vllm_mac.config_files import _UniqueKeyLoader

SOURCES = sorted(
    {path.resolve() for name in ("vllm_mac", "kernels", "examples") for path in (ROOT / name).rglob("*.py")}
)
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Passes vLLM's own value to a process of its own, as vLLM does, to see that it can be read there.
PICKLES = {"vllm_mac/tools/doctor/checks.py"}
SAFE = {"yaml.safe_load", "yaml.safe_load_all", "yaml.safe_dump", "yaml.load"}


def unsafe(text: str) -> list[str]:
    """What in a module's source could run what it reads, or passes words to a shell."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "os.system", "os.popen") or given.get("shell", "False") != "False":
            found.append(called)
        if called.startswith("yaml.") and called.endswith(("load", "load_all", "Loader")):
            if called not in SAFE or (called == "yaml.load" and given.get("Loader") != "_UniqueKeyLoader"):
                found.append(called)
        if called in ("torch.load", "torch.jit.load") and given.get("weights_only") != "True":
            found.append(called)
        if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(called)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT.resolve())))
def test_nothing_that_is_read_can_run(path):
    found = unsafe(path.read_text(encoding="utf-8"))
    assert not found or (found == ["pickle"] and str(path.relative_to(ROOT.resolve())) in PICKLES)


def test_the_only_loader_of_yaml_is_a_safe_one():
    assert issubclass(_UniqueKeyLoader, yaml.SafeLoader) and len(SOURCES) > 80
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader=_UniqueKeyLoader)


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import dill as d", "yaml.load(x, Loader=yaml.Loader)", "yaml.load(x)",
    "yaml.full_load(x)", "yaml.unsafe_load(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "eval(x)", "exec(x)",
    "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "os.system(x)",
])  # fmt: skip
def test_what_is_unsafe_is_found(text):
    assert unsafe(text)


@pytest.mark.parametrize("text", [
    "yaml.safe_load(x)", "torch.load(x, weights_only=True)", "np.load(x)", "subprocess.run(x)", "model.eval()",
    "yaml.load(x, Loader=_UniqueKeyLoader)",
])  # fmt: skip
def test_what_is_safe_is_not(text):
    assert not unsafe(text)
