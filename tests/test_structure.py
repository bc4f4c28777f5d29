"""The shape of the project: which module may import which, how long files and argument lists get, what lies on top."""

import ast

import pytest

from support import ROOT
from support.modules import MODULES, own, top

LONGEST, LONGEST_TEST = 450, 600

# Imports point one way, downwards. Modules of one level may import each other.
CONFIG, VALUES, METHOD, KERNELS, DECODERS, WORKER, PLATFORMS, TOOLS = range(8)
LEVELS = {
    CONFIG: {"__init__", "config", "config_files"},
    VALUES: {"counters", "key_index", "limits", "rope", "state"},
    METHOD: {"audit", "counter_files", "lookup", "owners", "paged", "reference", "ring", "totals"},
    KERNELS: {"kernels"},
    DECODERS: {"cpu_decoder", "cpu_lookup", "decoder", "flashinfer_exact", "lookup_decoder", "warmup"},
    WORKER: {
        "capabilities", "compilers", "connectors", "exporter", "maps_file", "kv_group", "layers", "learning", "log_line", "metrics", "per_request", "plugin", "publisher",
        "requests", "ring_room", "series", "startup",
    },
    PLATFORMS: {"backend", "cpu", "cuda", "index_pages", "mixins", "nixl", "seeding"},
    TOOLS: {"tools"},
}  # fmt: skip
MOST_PARAMETERS = 8
# Their parameters are vLLM's, whose methods they override.
OVERRIDES = {
    "cpu.MacCPUImpl.forward", "cuda.MacCUDAImpl.forward", "mixins.MacImpl.__init__", "mixins.MacSupport.supports_combination",
}  # fmt: skip


def level(module: str) -> int:
    """A new module has to be put on a level of `LEVELS` first."""
    (found,) = (level for level, names in LEVELS.items() if module.split(".")[0] in names)
    return found


def test_the_modules_are_there():
    """The checks below look at something."""
    assert {name.split(".")[0] for name in MODULES} == set().union(*LEVELS.values())
    assert {"config", "reference", "paged", "ring", "rope", "state", "backend", "kernels"} <= MODULES.keys()
    assert "reference" in own(MODULES["paged"], "paged") and "vllm" in top(MODULES["layers"], "layers")
    assert "ring" in own(MODULES["layers"], "layers")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    above = {i for i in own(MODULES[name], name) if level(i) > level(name)}
    assert not above, f"{name} imports {sorted(above)}, which lie above it"


@pytest.mark.parametrize("name", [name for name in MODULES if level(name) <= DECODERS])
def test_decoders_and_what_they_use_do_not_know_vllm(name):
    assert "vllm" not in top(MODULES[name], name)


def test_config_knows_neither_torch_nor_vllm():
    assert not {"torch", "vllm", "triton"} & top(MODULES["config"], "config")


@pytest.mark.parametrize("name", [name for name in MODULES if level(name) == VALUES])
def test_values_know_neither_triton_nor_vllm(name):
    assert not {"vllm", "triton"} & top(MODULES[name], name)


@pytest.mark.parametrize(
    "module, strangers",
    [
        ("ring", {"reference", "paged", "rope", "kernels", "owners"}),
        ("owners", {"ring", "reference", "paged", "rope", "kernels"}),
        ("kernels", {"ring", "reference", "paged", "rope", "flashinfer_exact"}),
        ("flashinfer_exact", {"ring", "reference", "paged", "rope"}),
        ("rope", {"ring", "reference", "paged", "kernels"}),
        ("lookup", {"reference", "ring", "rope", "kernels", "owners"}),
        ("key_index", {"state", "paged", "lookup", "kernels"}),
        ("reference", {"ring", "paged", "rope", "kernels"}),
    ],
)
def test_modules_that_must_not_know_each_other(module, strangers):
    for name in [name for name in MODULES if name.split(".")[0] == module]:
        assert not {i.split(".")[0] for i in own(MODULES[name], name)} & strangers, name


def test_decoding_on_cpus_needs_no_triton():
    reached, left = set(), ["cpu_decoder", "cpu_lookup"]
    while left:
        reached.add(name := left.pop())
        assert "triton" not in top(MODULES[name], name), name
        left += own(MODULES[name], name) - reached
    assert {"config", "reference", "ring", "rope", "audit", "lookup", "key_index"} <= reached


def functions(node: ast.AST, name: str):
    """Every public function below `node` but kernels, with its dotted name, and how many parameters a call gives."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from functions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef):
            compiled = any("triton.jit" in ast.unparse(decorator) for decorator in child.decorator_list)
            if not compiled and (not child.name.startswith("_") or child.name == "__init__"):
                given = [x.arg for x in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)]
                yield f"{name}.{child.name}", len(given) - (given[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("name", [name for name in MODULES if level(name) < TOOLS])
def test_parameters_are_few(name):
    found = dict(functions(ast.parse(MODULES[name].read_text(encoding="utf-8")), name))
    many = {function: n for function, n in found.items() if n > MOST_PARAMETERS and function not in OVERRIDES}
    assert not many, f"{many}: bundle what belongs together into a value of `state`"
    assert OVERRIDES & found.keys() == {function for function in OVERRIDES if function.split(".")[0] == name}


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_short(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{MODULES[name].relative_to(ROOT)} has {lines} lines"


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_no_test_imports_another():
    """What several of them share lies in `tests/support`."""
    assert len(TESTS) > 50
    for path in TESTS:
        assert not {name for name in top(path, "") if name.startswith("test_")}, path


def test_test_files_stay_short():
    long = {path.name: lines for path in TESTS if (lines := len(path.read_text("utf-8").splitlines())) > LONGEST_TEST}
    assert not long


def test_the_top_level_is_the_design_s():
    """Hidden folders, and what building and running leave behind, are not the project's."""
    left = {"build", "dist", "__pycache__"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    folders = {name for name in folders - left if not name.endswith(".egg-info")}
    expected = {"vllm_mac", "kernels", "configs", "tests"}
    assert expected <= folders <= expected | {"examples"}
