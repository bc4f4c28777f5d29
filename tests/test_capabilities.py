"""What vLLM asks a backend, and that MAC has decided each of it, in every supported version.

The names are read from vLLM's sources; the answers from MAC's classes, the GPU's among them with a mock of FlashInfer.
"""

import ast
import inspect
from types import SimpleNamespace

import pytest
import torch

from support.source_tree import Tree, assigned
from support.stub_flashinfer import gpu_backend
from support.vllm_sources import VERSIONS, folder
from vllm_mac import capabilities
from vllm_mac.capabilities import _NOTHING, BACKEND, BUILDER, IMPL

pytestmark = pytest.mark.cpu
BASE, GPU, CPU = (
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends.flashinfer",
    "vllm.v1.attention.backends.cpu_attn",
)
# Each table, and the classes whose names it decides: those that all backends have, and the platforms' own.
TABLES = {
    "BACKEND": (BACKEND, [f"{BASE}.AttentionBackend", f"{GPU}.FlashInferBackend", f"{CPU}.CPUAttentionBackend"]),
    "IMPL": (
        IMPL,
        [
            f"{BASE}.AttentionImplBase",
            f"{BASE}.AttentionImpl",
            f"{GPU}.FlashInferImpl",
            f"{CPU}.CPUAttentionBackendImpl",
        ],
    ),
    "BUILDER": (
        BUILDER,
        [f"{BASE}.AttentionMetadataBuilder", f"{GPU}.FlashInferMetadataBuilder", f"{CPU}.CPUAttentionMetadataBuilder"],
    ),
}


def names(tree: Tree, cls: str) -> set[str]:
    """Public methods, and attributes with a value, of a class's body. What only objects have, vLLM cannot ask of all."""
    body = tree.find(cls).node.body
    found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    found |= {name for node in body if getattr(node, "value", None) is not None for name in assigned(node)}
    return {name for name in found if not name.startswith("_")}


@pytest.fixture(scope="module", params=VERSIONS)
def tree(request):
    return Tree({"vllm": folder(request.param) / "vllm"})


@pytest.mark.parametrize("table", TABLES)
def test_every_name_is_decided(tree, table):
    decided, classes = TABLES[table]
    found = set().union(*(names(tree, cls) for cls in classes))
    assert len(found) > 12 and found - decided.keys() == set()


@pytest.mark.parametrize("table", TABLES)
def test_no_decision_outlives_its_name(table):
    decided, classes = TABLES[table]
    trees = [Tree({"vllm": folder(version) / "vllm"}) for version in VERSIONS]
    assert decided.keys() - set().union(*(names(one, cls) for one in trees for cls in classes)) == set()


def test_a_new_flag_is_noticed(tmp_path):
    """How these tests read classes: methods and attributes, of vLLM's base and of the platforms' own."""
    for module, cls, text in (
        (
            "backend",
            "AttentionBackend",
            "    @classmethod\n    def supports_rewind(cls): ...\n    def _own(self): ...\n",
        ),
        ("flashinfer", "FlashInferBackend", "    supports_undo: bool = True\n    size: int\n    tiles = 3\n"),
        ("cpu_attn", "CPUAttentionBackend", "    @staticmethod\n    def is_slow() -> bool:\n        return True\n"),
    ):
        path = tmp_path.joinpath(*f"vllm.v1.attention.{'' if module == 'backend' else 'backends.'}{module}".split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(f"class {cls}:\n{text}")
    found = Tree({"vllm": tmp_path / "vllm"})
    assert [names(found, cls) for cls in TABLES["BACKEND"][1]] == [
        {"supports_rewind"},
        {"supports_undo", "tiles"},
        {"is_slow"},
    ]


def test_vllm_asks_by_these_parameters(tree):
    validate = tree.member(tree.find(f"{BASE}.AttentionBackend"), "validate_configuration")
    parameters = {argument.arg for argument in validate.args.args}
    asked = {one.asked: name for name, one in BACKEND.items() if one.asked is not None}
    assert asked.keys() <= parameters
    text = ast.unparse(validate)
    assert [name for parameter, name in asked.items() if f"{parameter} and (not cls.{name}())" not in text] == []


@pytest.fixture(scope="module")
def classes():
    """MAC's classes by platform: backend, implementation, builder."""
    from vllm_mac import cpu

    cuda = gpu_backend()
    return {
        "gpu": (cuda.MacCUDABackend, cuda.MacCUDAImpl, cuda.MacCUDAMetadataBuilder),
        "cpu": (cpu.MacCPUBackend, cpu.MacCPUImpl, cpu.MacCPUMetadataBuilder),
    }


@pytest.mark.parametrize("place, table", list(enumerate(TABLES)))
def test_classes_are_as_decided(classes, place, table):
    """What is MAC's own is in the body of a class of MAC's; what is inherited is in none; what is pinned is what it says."""
    ours = [c for role in classes.values() for c in role[place].__mro__ if c.__module__.startswith("vllm_mac.")]
    for name, decision in TABLES[table][0].items():
        within = [vars(cls)[name] for cls in ours if name in vars(cls)]
        if decision.pinned is not _NOTHING:
            for role in classes.values():  # on each platform by a class of MAC's, whatever vLLM's says
                own = [c for c in role[place].__mro__ if c.__module__.startswith("vllm_mac.") and name in vars(c)]
                assert own and inspect.getattr_static(role[place], name) is decision.pinned, name
        elif table == "BUILDER" and name in ("reorder_batch_threshold", "supports_draft_decode_metadata_update"):
            assert f"self.{name} = " in inspect.getsource(classes["gpu"][place].__init__)  # where a layer is served
        else:
            assert bool(within) != decision.inherited, name


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("name, decision", [(name, one) for name, one in BACKEND.items() if one.asked is not None])
def test_what_is_refused_is_refused_with_its_reason(classes, platform, name, decision):
    from vllm.platforms.interface import DeviceCapability

    backend = classes[platform][0]
    plain = dict(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=32, use_mla=False, has_sink=False, use_sparse=False,
        use_mm_prefix=False, use_per_head_quant_scales=False, device_capability=DeviceCapability(9, 0), attn_type="decoder",
    )  # fmt: skip
    assert backend.validate_configuration(**plain) == []
    assert getattr(backend, name)() is False
    reasons = backend.validate_configuration(**plain | {decision.asked: True})
    assert f"{decision.asked}: {decision.because}" in reasons
    assert len(reasons) >= 2  # vLLM's own words first
    # Also where arguments come by place.
    in_order = inspect.signature(backend.__mro__[2].validate_configuration).parameters
    values = [(plain | {decision.asked: True}).get(p.name, p.default) for p in in_order.values()]
    assert backend.validate_configuration(*values) == reasons


@pytest.mark.parametrize("rule", ["index", "match"])
@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_kv_cache_dtypes_foreseen_are_those_that_classes_take(classes, monkeypatch, platform, rule):
    """FP8 with 4 bits of exponent by index on GPUs; vLLM asks the class once it is chosen."""
    from vllm_mac import mixins

    monkeypatch.setattr(mixins, "indexing", lambda: object() if rule == "index" else None)
    backend, fp8 = classes[platform][0], platform == "gpu" and rule == "index"
    assert backend.supports_kv_cache_dtype(None)
    for dtype in ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "nvfp4"):
        taken = dtype in capabilities.KV_CACHE_DTYPES or (fp8 and dtype in capabilities.FP8_DTYPES)
        assert backend.supports_kv_cache_dtype(dtype) == taken, dtype
        found = capabilities.refused_kv_cache_dtype(dtype, {"gpu": "cuda"}.get(platform, platform), rule)
        assert (found is None) == taken
        said = backend.supports_combination(128, torch.bfloat16, dtype, 64, False, False, False, False, None)
        assert said == (found and found[0])
    assert {*backend.supported_kv_cache_dtypes} == {*capabilities.kv_cache_dtypes(backend._platform, "index")}


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 48, 64, 128, 400])
def test_block_sizes_foreseen_are_those_that_classes_take(classes, platform, block_size):
    """`startup` must not import the GPU's class: FlashInfer's import begins with the GPU."""
    reason = capabilities.refused_block_size(block_size, {"gpu": "cuda"}.get(platform, platform), "match")
    assert classes[platform][0].supports_block_size(block_size) == (reason is None)
    assert reason is None or f"--block-size is {block_size}" in reason


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 96, 128, 256, 512])
def test_pages_with_an_index_are_read_whole(classes, monkeypatch, platform, block_size):
    """vLLM splits no padded page, so a kernel must read it. Near tokens are whole pages, so these are not larger."""
    from vllm.v1.worker.utils import select_common_block_size

    backend = classes[platform][0]
    base = backend.__mro__[2]
    if platform == "gpu":  # as FlashInfer's backend of the supported versions says
        monkeypatch.setattr(base, "get_supported_kernel_block_sizes", staticmethod(lambda spec=None: [16, 32, 64]))
    try:
        whole = select_common_block_size(block_size, [backend]) == block_size and 256 % block_size == 0
    except ValueError:
        whole = False
    reason = capabilities.refused_block_size(block_size, {"gpu": "cuda"}.get(platform, platform), "index")
    assert whole == (reason is None)
    assert reason is None or reason.startswith(f"--block-size is {block_size}, and rule: index takes one of ")


@pytest.mark.parametrize("size, head, refused", [(None, 32, False), (64, 64, False), (80, 64, True), (64, 48, True)])
def test_an_index_has_no_more_directions_than_keys_have_numbers(size, head, refused):
    reason = capabilities.refused_index_size(size, head)
    assert (reason is not None) == refused
    if reason is not None:
        assert f"index_size: received {size}, more than the head size {head}" in reason
        assert f"a multiple of 16 from 32 to {head}" in reason


def test_what_a_user_chose_can_be_undone():
    """Of the refusals that are no property of the model, each says what to leave out."""
    of_the_model = {"use_mm_prefix", "use_per_head_quant_scales", "use_rswa"}
    assert {one.asked for one in BACKEND.values() if one.asked and one.cure is None} == of_the_model


def test_large_pages_are_not_offered(classes, monkeypatch):
    backend = classes["gpu"][0]
    base = backend.__mro__[2]
    assert base.__name__ == "FlashInferBackend"
    monkeypatch.setattr(
        base, "get_supported_kernel_block_sizes", staticmethod(lambda spec=None: [16, 32, 64, 128, 1024])
    )
    assert backend.get_supported_kernel_block_sizes() == [16, 32, 64]


@pytest.mark.parametrize(
    "platform, metadata", [("cpu", {"step": None}), ("cpu", {}), ("gpu", {"step": None}), ("gpu", {})]
)
def test_a_served_layer_in_an_unplanned_batch_raises(classes, platform, metadata):
    """Nothing would write its output, which would stay what it was."""
    cls = classes[platform][1]
    impl = object.__new__(cls)
    name, index = "model.layers.3.self_attn.attn", object()
    impl.mac = SimpleNamespace(served=True, name=name, index=index, by_index=index, rows=lambda kv: kv)
    counts = dict(num_decodes=0, num_prefills=0, block_table=None)
    query = torch.zeros(5, 8, 64)
    with pytest.raises(RuntimeError, match=r"MAC serves model\.layers\.3\.self_attn\.attn, but the metadata"):
        impl.forward(None, query, None, None, None, SimpleNamespace(**counts, **metadata), torch.empty_like(query))


def test_reasons_are_short():
    found = [one.because for table in (BACKEND, IMPL, BUILDER) for one in table.values()]
    assert all(0 < len(text) <= 120 and not text.endswith(".") for text in found)
    said = capabilities.refusals({"use_dcp": True, "use_pcp": False, "unknown": True})
    assert said == [f"use_dcp: {BACKEND['supports_dcp'].because}"]
