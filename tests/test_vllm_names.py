"""What the project takes from vLLM is there, with the signatures it relies on, in every version.

Both versions' sources are read, never imported: no machine runs both. Our own uses are collected
from our files, so that a new one needs no line here; only what neither an import nor an
annotation tells is listed by hand.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from support import ROOT
from support.source_tree import Tree, assigned, disagreement, fields, members, misfit, signature, statements
from support.vllm_sources import VERSIONS, folder
from vllm_mac import per_request, requests, startup

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# As installed: `kernels` is a package within ours.
LAYOUT = {"vllm_mac": ROOT / "vllm_mac", "vllm_mac.kernels": ROOT / "kernels"}
BACKEND = "vllm.v1.attention.backend"

# Read from values whose class no annotation gives.
UNTYPED = {
    "vllm.engine.arg_utils.EngineArgs": [
        "additional_config", "attention_backend", "create_engine_config", "enable_trace_replay", "kv_cache_dtype",
        "logits_processors", "logprobs_mode", "max_logprobs", "worker_extension_cls",
    ],
    "vllm.entrypoints.llm.LLM": ["collective_rpc"],
    "vllm.logprobs.FlatLogprobs": ["end_indices", "logprobs", "start_indices", "token_ids"],
    "vllm.model_executor.layers.attention.attention.Attention": ["impl", "kv_sharing_target_layer_name", "layer_name"],
    "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding": [
        "cos_sin_cache", "forward_native", "is_neox_style", "rotary_dim",
    ],
    "vllm.config.attention.AttentionConfig": ["backend", "backend_per_kind"],
    "vllm.v1.attention.backends.registry.AttentionBackendEnum": ["get_class", "get_path"],
    "vllm.v1.core.sched.output.NewRequestData": ["sampling_params"],
    "vllm.v1.engine.input_processor.InputProcessor": ["_validate_params", "vllm_config"],
    "vllm.v1.worker.worker_base.WorkerBase": ["vllm_config"],
}  # fmt: skip

# Where vLLM calls what we override, and how those calls begin.
LAYER, WORKER = "vllm.model_executor.layers.attention.attention", "vllm.v1.worker.utils"
CALLS = [
    ("Impl", "__init__", LAYER, "impl_cls"),
    ("Impl", "forward", LAYER, "self.impl.forward"),
    ("Impl", "do_kv_cache_update", LAYER, "attn_layer.impl.do_kv_cache_update"),
    ("Impl", "process_weights_after_loading", LAYER, "self.impl.process_weights_after_loading"),
    ("MetadataBuilder", "__init__", WORKER, "builder_cls"),
    ("MetadataBuilder", "build", WORKER, "self.get_metadata_builder(ubatch_idx).build"),
]

# Kinds of pyrefly's reports that say a name or a parameter is missing. Overrides are judged
# apart, by their parameters alone: ours take subclasses of what the base takes.
REPORTS = {
    "bad-argument-count", "missing-argument", "missing-attribute", "missing-import", "missing-module-attribute",
    "unexpected-keyword", "unknown-name",
}  # fmt: skip
# What it cannot know: values that are set by the time they are read; an attribute that plugin.py
# adds to a function; additional_config, which is a dictionary or anything hashable; what follows
# a class in the order of another one (`super()`).
UNKNOWABLE = ("`NoneType`", "`FunctionType`", "`SupportsHash`", "`object`")


@pytest.fixture(scope="module", params=VERSIONS)
def vllm(request):
    path = folder(request.param)
    return SimpleNamespace(path=path, tree=Tree({"vllm": path / "vllm", **LAYOUT}))


def modules(tree: Tree) -> list[str]:
    found = set()
    for package in LAYOUT:
        for file in tree.roots[package].rglob("[!_]*.py"):
            found.add(".".join((package, *file.relative_to(tree.roots[package]).with_suffix("").parts)))
    return sorted(found)


def subclasses(tree: Tree) -> list[SimpleNamespace]:
    """Our classes with a base of vLLM's: `ours` are they and their bases of ours, `theirs` the others."""
    found = []
    for module in modules(tree):
        for cls in tree.classes(module):
            inside = [base for base in (cls, *tree.bases(cls)) if base.node]
            theirs = [base for base in inside if base.module.startswith("vllm.")]
            found.append(SimpleNamespace(cls=cls, ours=[b for b in inside if b not in theirs], theirs=theirs))
    return [entry for entry in found if entry.theirs]


def test_versions_are_the_supported_ones():
    (requirement,) = (r for r in PROJECT["optional-dependencies"]["cuda"] if r.startswith("vllm"))
    admitted = SpecifierSet(requirement.removeprefix("vllm"))
    assert [v for v in (f"0.{minor}.0" for minor in range(100)) if v in admitted] == list(VERSIONS)


def missing_names(path: Path, folder: Path) -> list[str]:
    """What a type checker does not find, in our files in `folder`, when vLLM lies in `path`."""
    uses = re.compile(r"^ *(from|import) vllm[. ]", re.MULTILINE)
    files = [path for path in sorted(folder.rglob("*.py")) if uses.search(path.read_text())]
    done = subprocess.run(
        [sys.executable, "-m", "pyrefly", "check", "--preset=default", "--output-format=json", "--summary=none",
         # Ours first: an environment with vLLM has an older copy of them installed.
         f"--search-path={folder}", f"--search-path={path}", f"--python-interpreter-path={sys.executable}", *files],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("{"), f"pyrefly did not run (pip install pyrefly): {done.stderr}"
    return [
        f"{Path(e['path']).name}:{e['line']}: {e['description']}"
        for e in json.loads(done.stdout)["errors"]
        if e["name"] in REPORTS
        and not any(word in e["description"] for word in UNKNOWABLE)
        # Of other packages only vLLM is of interest.
        and (e["name"] != "missing-import" or "`vllm." in e["description"])
    ]


def copied(folder: Path) -> dict[str, Path]:
    """Our packages, copied into one folder as they are installed."""
    shutil.copytree(ROOT / "vllm_mac", folder / "vllm_mac", ignore=shutil.ignore_patterns("__pycache__"))
    return {package: folder.joinpath(*package.split(".")) for package in LAYOUT}


def test_every_name_and_call_fits(vllm, tmp_path):
    copied(tmp_path)
    assert missing_names(vllm.path, tmp_path) == []


def unfit_overrides(tree: Tree) -> list[str]:
    """Methods and attributes of our subclasses that have no base, or not the base's parameters."""
    found = []
    for entry in subclasses(tree):
        for cls, node in ((c.node, node) for c in entry.ours for node in statements(c.node.body)):
            if isinstance(node, ast.AnnAssign) and "dataclass" in "".join(map(ast.unparse, cls.decorator_list)):
                continue  # a field more
            for name in [node.name] if isinstance(node, ast.FunctionDef) else assigned(node):
                bases = (tree.member(base, name) for base in entry.theirs)
                base = next((member for member in bases if member is not None), None)
                # What a subclass adds begins with an underscore; the rest only works as an override.
                if base is None and not name.startswith("_"):
                    found.append(f"{cls.name}.{name}: no base has it")
                elif isinstance(base, ast.FunctionDef) and (why := disagreement(base, node)):
                    found.append(f"{cls.name}.{name}: {why}")
        # What we set and never read is set for a base to read.
        for name in {name for cls in entry.ours for name, _ in members(cls.node)} - read(tree):
            if name[0] != "_" and all(tree.member(base, name) is None for base in entry.theirs):
                found.append(f"{entry.cls.node.name}.{name}: set for a base that has no such name")
    return found


def read(tree: Tree) -> set[str]:
    """Names that our modules read as an attribute of something."""
    nodes = (node for module in modules(tree) for node in ast.walk(tree.module(module)))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_every_override_fits(vllm):
    assert unfit_overrides(vllm.tree) == []


def unfit_calls(tree: Tree) -> list[str]:
    """Calls of vLLM that our implementation or our metadata builder does not take."""
    found = []
    for entry in subclasses(tree):
        names = {base.node.name for base in entry.theirs}
        for suffix, method, module, beginning in CALLS:
            if f"Attention{suffix}" not in names:
                continue
            calls = [x for x in ast.walk(tree.module(module)) if isinstance(x, ast.Call)]
            calls = [x for x in calls if ast.unparse(x.func) == beginning]
            found += [] if calls else [f"{module} no longer calls {beginning}"]
            found += [why for call in calls if (why := misfit(call, tree.member(entry.cls, method)))]
    return found


def test_what_vllm_calls_takes_its_arguments(vllm):
    assert unfit_calls(vllm.tree) == []


def missing_members(tree: Tree) -> list[str]:
    """Members that are not defined, of the platform and of those listed above."""
    platform = {
        node.attr
        for module in modules(tree)
        for node in ast.walk(tree.module(module))
        # It answers to every name (`__getattr__`), which a type checker has to believe.
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "current_platform"
    }
    assert "is_cpu" in platform
    used = UNTYPED | {"vllm.platforms.interface.Platform": sorted(platform)}
    return [f"{cls}.{name}" for cls in used for name in used[cls] if tree.member(tree.find(cls), name) is None]


def test_every_untyped_attribute_exists(vllm):
    assert missing_members(vllm.tree) == []


def test_selector_config_is_what_validation_takes(vllm):
    # plugin.py passes one's fields on to the other.
    config = fields(vllm.tree.find("vllm.v1.attention.selector.AttentionSelectorConfig").node)
    validate = vllm.tree.member(vllm.tree.find(f"{BACKEND}.AttentionBackend"), "validate_configuration")
    assert {*config, "device_capability"} == set(signature(validate).parameters)


def test_cpu_selection_is_wrapped_with_its_own_parameters(vllm):
    original = vllm.tree.member(vllm.tree.find("vllm.platforms.cpu.CpuPlatform"), "get_attn_backend_cls")
    (ours,) = (
        node for node in ast.walk(vllm.tree.module("vllm_mac.plugin"))
        if isinstance(node, ast.FunctionDef) and node.name == "get_attn_backend_cls"
    )  # fmt: skip
    assert [ast.unparse(d) for d in original.decorator_list] == ["classmethod"]
    assert signature(ours) == signature(original)


def test_entry_points_are_in_groups_that_vllm_loads(vllm):
    values = {
        ast.unparse(node.targets[0]): node.value.value
        for node in vllm.tree.module("vllm.plugins").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert set(PROJECT["entry-points"]) == {values["DEFAULT_PLUGINS_GROUP"], values["PLATFORM_PLUGINS_GROUP"]}


def test_the_configuration_is_made_after_plugins_are_loaded(vllm):
    """`startup` wraps the method that makes it, which is looked up on objects that have loaded plugins."""
    args = vllm.tree.find("vllm.engine.arg_utils.EngineArgs")
    assert "load_general_plugins()" in ast.unparse(vllm.tree.member(args, "__post_init__"))
    servers = ("entrypoints.launchers.api_server.entry", "entrypoints.cli.serve")
    for module in ("v1.engine.llm_engine", "v1.engine.async_llm", *servers):
        made = ast.unparse(vllm.tree.module(f"vllm.{module}"))
        assert re.search(r"vllm_config = engine_args\.create_engine_config\(", made), module


def test_nothing_reads_the_variable_that_startup_warns_of(vllm):
    sources = (vllm.path / "vllm").rglob("*.py")
    assert [path for path in sources if startup.VARIABLE in path.read_text(encoding="utf-8")] == []


def test_kinds_of_kv_caches_have_these_names(vllm):
    kinds = {node.value.value for node in vllm.tree.find("vllm.v1.kv_cache_interface.KVCacheSpecKind").node.body
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}  # fmt: skip
    assert {*startup.PLAIN, *startup.MLA, *sum(startup.ENCODERS.values(), ())} <= kinds


def test_the_selector_asks_what_startup_foresees(vllm):
    """What `startup.asked` reads is what vLLM's selector reads, or what an attention layer hands to it."""
    selected = ast.unparse(vllm.tree.find("vllm.v1.attention.selector.get_attn_backend").node)
    layer = ast.unparse(vllm.tree.member(vllm.tree.find(f"{LAYER}.Attention"), "__init__"))
    assert [text for text in (
        "use_batch_invariant=envs.VLLM_BATCH_INVARIANT",
        "use_dcp=vllm_config.parallel_config.decode_context_parallel_size > 1",
        "use_pcp=vllm_config.parallel_config.prefill_context_parallel_size > 1",
        "use_non_causal=vllm_config.attention_config.use_non_causal",
        "vllm_config.model_config.rswa_window is not None",
        "speculative_config.enable_adaptive_verification", "kv_transfer_config.is_kv_transfer_instance",
        "cache_config.user_specified_block_size", "backend_per_kind.get(kind.value, backend)",
    ) if text not in selected] == []  # fmt: skip
    assert [text for text in (
        "model_config.is_mm_prefix_lm", "kv_cache_scheme.get('strategy') == 'attn_head'",
        "if kv_cache_scheme is not None and kv_cache_dtype == 'auto':\n    kv_cache_dtype = 'fp8'",
    ) if text not in layer.replace("        kv_cache_dtype = 'fp8'", "    kv_cache_dtype = 'fp8'")] == []  # fmt: skip


def test_attention_layers_are_listed_by_name(vllm):
    layer = vllm.tree.member(vllm.tree.find("vllm.model_executor.layers.attention.attention.Attention"), "__init__")
    assert "compilation_config.static_forward_context[prefix] = self" in ast.unparse(layer)


def test_rotation_flags_are_of_some_model(vllm):
    models = (vllm.path / "vllm/model_executor/models").rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in models)
    (flags,) = (
        ast.literal_eval(node.value)
        for node in vllm.tree.module("vllm_mac.rope").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROTATES"
    )
    assert [flag for flag in flags if not re.search(rf"\bself\.{flag}(: \w+)? =", text)] == []


# Wrong uses, and what must be reported of them.
WRONG = """
from vllm.config import get_vllm_conf
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.cpu_atn import CPUAttentionBackend
from vllm.logger import init_logger

AttentionType.DECODES
init_logger()

class Backend(AttentionBackend):
    def supports_attn_types(self): ...
    def supports_sink(self): ...
    def validate(self):
        self.is_fast = True
"""
WRONG_REPORTS = [
    "`get_vllm_conf`", "vllm.v1.attention.backends.cpu_atn", "`DECODES`", "argument `name`",
    "Backend.supports_attn_types: no base has it", "Backend.supports_sink: the base is classmethod",
    "Backend.is_fast: set for a base",
]  # fmt: skip
# Changes to vLLM, and what must be reported after each.
CHANGES = [
    ("v1/core/sched/output.py", " scheduled_spec_decode_tokens: ", " drafts: ", "`scheduled_spec_decode_tokens`"),
    ("config/compilation.py", " static_forward_context: ", " context: ", "`static_forward_context`"),
    ("config/model.py", "hf_text_config", "hf_config_of_text", "`hf_text_config`"),
    ("config/parallel.py", " pipeline_parallel_size: ", " stages: ", "`pipeline_parallel_size`"),
    ("config/parallel.py", " _api_process_rank: ", " _server_rank: ", "`_api_process_rank`"),
    ("config/scheduler.py", " max_num_seqs: ", " max_seqs: ", "`max_num_seqs`"),
    ("config/vllm.py", " speculative_config: ", " speculation: ", "`speculative_config`"),
    ("engine/arg_utils.py", "def create_engine_config(", "def make_engine_config(", "EngineArgs.create_engine_config"),
    ("model_executor/layers/attention/attention.py", "impl_cls(", "impl_cls(1, 2, ", "too many positional"),
    ("model_executor/layers/rotary_embedding/base.py", "cos_sin_cache", "cos_sin", "RotaryEmbedding.cos_sin_cache"),
    ("model_executor/model_loader/utils.py", "def initialize_model(", "def make_model(", "`initialize_model`"),
    ("model_executor/models/utils.py", "_index(layer_name", "_index(model, layer_name", "argument `layer_name`"),
    ("platforms/interface.py", "def is_cpu(", "def runs_on_cpu(", "Platform.is_cpu"),
    ("v1/attention/backend.py", " is_prefilling: ", " is_filling: ", "`is_prefilling`"),
    ("v1/attention/backends/cpu_attn.py", "_attn_type(cls, ", "_attn_type(cls, mla, ", "also takes mla"),
    ("v1/attention/backends/cpu_attn.py", "output: torch", "lse: int, output: torch", "also takes lse"),
    ("v1/attention/backends/cpu_attn.py", "    block_table: torch", "    table: torch", "`block_table`"),
    ("v1/attention/backends/flashinfer.py", "flashinfer_trtllm_api_decode_kernel", "decode_kernel",
     "flashinfer_trtllm_api_decode_kernel: set for a base"),
    ("v1/attention/backends/registry.py", "def register(", "def register_backend(", "`register`"),
]  # fmt: skip


def test_these_tests_notice_changes(tmp_path):
    ours = copied(tmp_path / "ours")
    (ours["vllm_mac"] / "wrong.py").write_text(WRONG)
    # Not links: the type checker would follow them to the originals.
    theirs = tmp_path / "theirs" / "vllm"
    shutil.copytree(folder(VERSIONS[-1]) / "vllm", theirs, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name, old, new, _ in CHANGES:
        text = (theirs / name).read_text(encoding="utf-8")
        assert old in text, (name, old)
        (theirs / name).write_text(text.replace(old, new), encoding="utf-8")
    tree = Tree({"vllm": theirs, **ours})
    reports = unfit_overrides(tree) + unfit_calls(tree) + missing_members(tree)
    reports += missing_names(theirs.parent, tmp_path / "ours")
    expected = WRONG_REPORTS + [report for *_, report in CHANGES]
    missed = [text for text in expected if not any(text in report for report in reports)]
    assert missed == [], "\n".join(reports)


@pytest.mark.parametrize("module", requests.RUNNERS.values())
def test_model_runners_have_what_names_the_requests_of_a_batch(vllm, module):
    """What `requests` reaches without an import that a type checker could follow."""
    tree = ast.parse((vllm.path / Path(*module.split("."))).with_suffix(".py").read_text())
    (runner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GPUModelRunner")
    methods = {node.name: node for node in runner.body if isinstance(node, ast.FunctionDef)}
    parameters = [a.arg for a in methods["execute_model"].args.args]
    assert "scheduler_output" in parameters
    assert ("dummy_run" in parameters) == (module == requests.RUNNERS[True]), "V1 runs dummy batches by another method"
    assigned = {ast.unparse(t) for node in ast.walk(runner) if isinstance(node, ast.Assign) for t in node.targets}
    assigned |= {ast.unparse(node.target) for node in ast.walk(runner) if isinstance(node, ast.AnnAssign)}
    assert {"self.kv_cache_config", "self.vllm_config"} <= assigned
    worker = vllm.path / "vllm" / "v1" / "worker"
    if module == requests.RUNNERS[True]:
        assert any(_calls(node, "self.prepare_inputs") for node in ast.walk(methods["execute_model"]))
        assert "prepare_inputs" in methods and re.search(r" req_ids: list", (worker / "gpu/input_batch.py").read_text())
        assert "self.input_batch" not in assigned, "what V1's rows are read from"
    else:
        assert "self.input_batch" in assigned
        assert re.search(r"def req_ids\(self\)", (worker / "gpu_input_batch.py").read_text())


def test_requests_are_checked_where_every_front_end_makes_and_uses_its_checker(vllm):
    """What `per_request` wraps, and that a streamed response has not begun when it is called."""
    tree = vllm.tree
    processor = tree.find("vllm.v1.engine.input_processor.InputProcessor")
    assert "self.vllm_config = vllm_config" in ast.unparse(tree.member(processor, "__init__"))
    assert list(signature(tree.member(processor, "_validate_params")).parameters)[:1] == ["params"]
    for module, made in (("llm_engine", "LLMEngine"), (per_request.ASYNC.rpartition(".")[2], "AsyncLLM")):
        engine = tree.find(f"vllm.v1.engine.{module}.{made}")
        assert "self.input_processor = InputProcessor(self.vllm_config, " in ast.unparse(
            tree.member(engine, "__init__")
        )
    calls = [x for x in ast.walk(tree.member(processor, "process_inputs")) if _calls(x, "self._validate_params")]
    assert [ast.unparse(x.args[0]) for x in calls] == ["params"]
    assert (
        "sampling_params" in signature(tree.member(tree.find(f"{per_request.ASYNC}.AsyncLLM"), "generate")).parameters
    )
    for path in ("completion", "chat_completion"):
        text = (vllm.path / f"vllm/entrypoints/openai/{path}/serving.py").read_text(encoding="utf-8")
        functions = [x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.AsyncFunctionDef)]
        callers = [f for f in functions if any(_calls(x, "self.engine_client.generate") for x in ast.walk(f))]
        own = lambda f: [x for x in ast.walk(f) if isinstance(x, ast.Yield) and x.value is not None]
        assert callers and all(f.name.startswith("_create") for f in callers), [f.name for f in callers]
        assert all(not _outside_nested(f, own(f)) for f in callers), "a generator starts nothing before it is asked"


def _outside_nested(function: ast.AST, nodes: list[ast.AST]) -> list[ast.AST]:
    nested = [x for x in ast.walk(function) if isinstance(x, ast.AsyncFunctionDef) and x is not function]
    inside = {id(x) for f in nested for x in ast.walk(f)}
    return [x for x in nodes if id(x) not in inside]


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def test_servers_read_metrics_where_ours_are(vllm):
    """What `exporter` and `metrics` rely on without calling it."""
    registry = ast.unparse(vllm.tree.module("vllm.v1.metrics.prometheus"))
    assert "from prometheus_client import REGISTRY, CollectorRegistry, multiprocess" in registry
    assert "multiprocess.MultiProcessCollector(registry)" in registry and "return REGISTRY" in registry
    assert "collector._name.startswith('vllm:')" in registry  # what it removes from the registry
    server = ast.unparse(vllm.tree.module("vllm.entrypoints.serve.instrumentator.metrics"))
    assert "registry = get_prometheus_registry()" in server and "make_asgi_app(registry=registry)" in server
    assert "name=f'ApiServer_{i}'" in ast.unparse(vllm.tree.module("vllm.v1.utils"))
    # Engines are labelled so in vLLM's own metrics, and a model by its first served name.
    loggers = ast.unparse(vllm.tree.module("vllm.v1.metrics.loggers"))
    assert "labelnames = ['model_name', 'engine']" in loggers
    assert "model_name = vllm_config.model_config.served_model_name" in loggers
    core = ast.unparse(vllm.tree.module("vllm.v1.engine.core"))
    assert "parallel_config.data_parallel_index = dp_rank" in core and "engine_index=dp_rank" in core
    assert "self.parallel_config.rank = rank" in ast.unparse(vllm.tree.module("vllm.v1.worker.worker_base"))
    # The empty batch that follows the last of a request.
    scheduler = vllm.tree.member(vllm.tree.find("vllm.v1.core.sched.interface.SchedulerInterface"), "has_requests")
    assert "self.has_unfinished_requests() or self.has_finished_requests()" in ast.unparse(scheduler)
