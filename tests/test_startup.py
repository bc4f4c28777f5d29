"""What is wrong with a configuration is said when vLLM makes it, in the process that the user started."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from vllm_mac import compilers, connectors, startup
from vllm_mac.capabilities import BACKEND
from vllm_mac.config import MacConfigError

pytestmark = pytest.mark.cpu
# What llm-compressor writes into a checkpoint whose KV cache is to be FP8.
FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.fixture
def make(models, tmp_path):
    """make(family, **options): what vLLM makes of these options; they are those of `vllm serve`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()

    def made(family="llama", quantization=None, **options):
        model = models(family)
        if quantization is not None:
            config = json.loads((model / "config.json").read_text()) | {"quantization_config": quantization}
            model = tmp_path / f"{family}-quantised"
            model.mkdir(exist_ok=True)
            (model / "config.json").write_text(json.dumps(config))
        options = {"max_model_len": 512, "skip_tokenizer_init": True} | options
        return EngineArgs(model=str(model), **options).create_engine_config()

    return made


@pytest.fixture
def warnings(make):
    """What MAC warns of; a message that vLLM gives once may come again in each test."""
    from vllm.logger import _print_warning_once

    make()  # vLLM sets its loggers up anew with the first configuration
    _print_warning_once.cache_clear()
    found, logger = [], logging.getLogger("vllm.mac")
    handler, level = logging.Handler(logging.WARNING), logger.level
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def refused(make, *arguments, **options) -> str:
    with pytest.raises(MacConfigError) as caught:
        make(*arguments, **{"attention_backend": "MAC"} | options)
    return str(caught.value)


@pytest.mark.parametrize(
    "mac, reason",
    [
        ({"windw": 256}, "windw: unknown key, received 256 (int) from --additional-config mac; did you mean 'window'?"),
        (
            {"band": "wide"},
            "band: received 'wide' (str) from --additional-config mac; must be an integer of at least 1",
        ),
        ({"band": 8192}, "band + sink must be less than min_context - 1"),
        (
            {"window": 64},
            "which only rule: match reads, and rule is index, the default; leave it out, or set rule to match",
        ),
        ({"config": "absent.yaml"}, "--additional-config mac.config: received 'absent.yaml': no file at"),
        ("wide", "--additional-config mac: received 'wide' (str); must be a mapping"),
    ],
)
def test_what_is_wrong_in_the_block(make, mac, reason):
    for chosen in (
        {},
        {"attention_backend": None, "attention_config": {"backend_per_kind": {"full_attention": "MAC"}}},
    ):
        assert reason in refused(make, additional_config={"mac": mac}, **chosen).splitlines()[-1]


@pytest.mark.parametrize(
    "keys, received, right",
    [
        ({"window": 256}, "'window'", '{"mac": {"window": 256}}'),
        ({"Mac": {"window": 256}}, "'Mac'", '{"mac": {"window": 256}}'),
    ],
)
def test_keys_beside_the_block_that_are_certainly_meant_for_it(make, warnings, keys, received, right):
    message = refused(make, additional_config=keys)
    assert f"--additional-config: received {received} at the top" in message and message.endswith(f"'{right}'")
    make(additional_config=keys)  # of another plugin, where MAC is not chosen
    assert [w for w in warnings if "but no layer's backend is MAC" in w] == warnings
    assert len(warnings) == sum(key.lower() == "mac" for key in keys)


@pytest.mark.parametrize(
    "key, said",
    [("mac_attention", True), ("treshold", True), ("audit", True), ("gdn_prefill_backend", False), ("machine", False)],
)
def test_keys_beside_the_block_that_look_like_its_own(make, warnings, key, said):
    for _ in range(2):
        make(attention_backend="MAC", additional_config={key: {}, "mac": {"band": 32}})
    assert [repr(key) in text for text in warnings] == [True] * said


@pytest.mark.parametrize("chosen", [False, True])
def test_what_nothing_reads_draws_one_warning(make, warnings, monkeypatch, chosen):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "MAC")
    for _ in range(2):
        make(attention_backend="MAC" if chosen else None, additional_config={"mac": {"band": 32}})
    assert len(warnings) == (0 if chosen else 2)
    assert chosen or (
        "Give --attention-backend MAC" in warnings[0] and "has 'mac', but no layer's backend is MAC" in warnings[1]
    )


REFUSED = [
    ({"kv_cache_dtype": "fp8"},
     "--kv-cache-dtype is fp8, and MAC takes one of auto, float16, bfloat16 here: give --kv-cache-dtype bfloat16"),
    ({"kv_offloading_size": 1.0, "additional_config": {"mac": {"rule": "match"}}},
     "kv_connector is OffloadingConnector, and with rule: match no ring has seen what a connector loads: leave out "
     "--kv-transfer-config and --kv-offloading-size, or set rule: index"),
    ({"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache", "disable_hybrid_kv_cache_manager": True,
      "additional_config": {"mac": {"rule": "match"}}}, "kv_connector is LMCacheMPConnector, and with rule: match no ring"),
    ({"additional_config": {"mac": {"maps": "/nowhere/maps"}}},
     "maps: received '/nowhere/maps': no folder at /nowhere; must be a file in a folder that is there, or null: choose another file"),
    ({"block_size": 48}, "--block-size is 48, and rule: index takes one of 32, 64, 128, 256: leave out --block-size"),
    ({"block_size": 48, "additional_config": {"mac": {"rule": "match"}}},
     "--block-size is 48, and MAC takes multiples of 32: leave out --block-size"),
    ({"attention_config": {"backend": "MAC", "use_non_causal": True}, "attention_backend": None}, "use_non_causal: "),
    ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "leave out --decode-context-parallel-size"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "attention_backend": "MAC"}},
     "speculative_config.attention_backend: received MAC, which serves no draft model"),
]  # fmt: skip


OURS = {"kv_connector": "ExampleConnector"}
CONNECTED = [
    (OURS, None),
    ({"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [OURS, OURS]}}, None),
    ({"kv_connector": "LMCacheMPConnector"}, None),
    ({"kv_connector": "LMCacheConnectorV1"}, "LMCacheConnectorV1"),
    ({"kv_connector": "NixlConnector"}, None),
    ({"kv_connector": "NixlPushConnector"}, "NixlPushConnector"),
    (OURS | {"kv_connector_module_path": "elsewhere"}, "ExampleConnector of elsewhere"),
    ({"kv_connector": "MultiConnector",
      "kv_connector_extra_config": {"connectors": [OURS, {"kv_connector": "MooncakeConnector"}]}}, "MooncakeConnector"),
]  # fmt: skip
TO_MATCH = """set rule: match, as in --additional-config '{"mac": {"rule": "match"}}' (rule: index is the default)"""
REFUSED_INDEX = [
    ("llama", {}, {"block_size": 96},
     f"--block-size is 96, and rule: index takes one of 32, 64, 128, 256: leave out --block-size, or {TO_MATCH}"),
    ("llama", {"index_size": 48}, {},
     "index_size: received 48, more than the head size 32; must be null or a multiple of 16 from 32 to 32: choose"),
    ("llama", {}, {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "1"]},
     f"--kv-cache-dtype-skip-layers gives KV pages of two sizes, and rule: index takes one: {TO_MATCH}"),
]  # fmt: skip


def test_hybrid_models_have_an_index(make):
    make("lfm2", attention_backend="MAC")
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    message = refused(make, "lfm2", kv_transfer_config=transfer, disable_hybrid_kv_cache_manager=False)
    assert "the model is hybrid, and rule: index was not tried with a KV connector there: start without it" in message
    speculation = {"method": "ngram", "num_speculative_tokens": 2}
    assert "rule: index was not tried with speculation there: start" in refused(
        make, "lfm2", speculative_config=speculation
    )
    make("lfm2", attention_backend="MAC", additional_config={"mac": {"rule": "match"}})


@pytest.mark.parametrize("family, keys, options, reason", REFUSED_INDEX)
def test_what_an_index_cannot_serve(make, family, keys, options, reason):
    message = refused(make, family, additional_config={"mac": keys}, **options)
    assert reason in message and len(message.splitlines()) == 1
    for other in ({"rule": "match"}, {"enabled": False} | keys):
        make(family, attention_backend="MAC", additional_config={"mac": other}, **options)
    make(family, **options)  # without MAC


@pytest.mark.parametrize("transfer, other", CONNECTED)
def test_kv_connectors_that_an_index_takes(make, transfer, other):
    # Where it may choose, vLLM asks the connectors' classes, some of which are not installed.
    options = {"kv_transfer_config": {"kv_role": "kv_both"} | transfer, "disable_hybrid_kv_cache_manager": True}
    if other is None:
        make(attention_backend="MAC", **options)
    else:
        reason = f"kv_connector is {other}, and rule: index takes one of DecodeBenchConnector, ExampleConnector, "
        message = refused(make, **options)
        assert reason in message and "choose one of these, or leave out --kv-transfer-config and" in message
    match = refused(make, additional_config={"mac": {"rule": "match"}}, **options)
    assert ("or set rule: index" in match) == (other is None)
    make(attention_backend="MAC", additional_config={"mac": {"enabled": False}}, **options)


@pytest.mark.parametrize("among", [False, True])
def test_pages_with_an_index_are_not_permuted(among):
    from vllm.config import KVTransferConfig

    one = {"kv_connector": "NixlConnector", "enable_permute_local_kv": True}
    several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [OURS, one]}}
    transfer = KVTransferConfig(kv_role="kv_both", **(several if among else one))
    reason, cure = connectors.refused(transfer, "index", "cuda")
    assert reason.startswith("enable_permute_local_kv is true") and cure == "leave it out of --kv-transfer-config"


@pytest.mark.parametrize("among", [False, True])
def test_lmcache_is_taken_on_cpus(monkeypatch, among):
    """In LMCache's own connector, which says how pages lie."""
    from vllm.config import KVTransferConfig

    monkeypatch.delenv("LMCACHE_USE_UPSTREAM_MP", raising=False)
    one = {"kv_connector": "LMCacheMPConnector"}
    several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [OURS, one]}}
    transfer = KVTransferConfig(kv_role="kv_both", **(several if among else one))
    assert connectors.refused(transfer, "index", "cpu") is None
    reason, cure = connectors.refused(transfer, "index", "cuda")
    assert reason.startswith("kv_connector is LMCacheMPConnector, and rule: index takes one of DecodeBenchConnector, ")
    assert "LMCache" not in reason.partition("takes")[2] and cure.startswith("choose one of these")
    monkeypatch.setenv("LMCACHE_USE_UPSTREAM_MP", "0")
    assert connectors.refused(transfer, "index", "cpu") == (
        "LMCACHE_USE_UPSTREAM_MP is 0, by which LMCacheMPConnector is vLLM's copy, and rule: index takes LMCache's own",
        "unset LMCACHE_USE_UPSTREAM_MP",
    )


@pytest.mark.parametrize("layout, serves", [("NHD", True), ("LBHNC", True), ("LHBNC", False), ("BLHNC", False)])
def test_layouts_of_pages_that_an_index_takes(make, monkeypatch, layout, serves):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    if serves:
        make(attention_backend="MAC")
    else:
        because = f"VLLM_KV_CACHE_LAYOUT is {layout}, and rule: index takes one of LBNHC, LBHNC, NHD, HND"
        assert f"{because}: unset VLLM_KV_CACHE_LAYOUT, or {TO_MATCH}" in refused(make)
    make(attention_backend="MAC", additional_config={"mac": {"rule": "match"}})


@pytest.mark.parametrize("options", [{}, {"block_size": 64}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_an_index_serves(make, family, options):
    make(family, attention_backend="MAC", additional_config={"mac": {"index_size": 32}}, **options)


@pytest.mark.parametrize("options, reason", REFUSED)
def test_what_mac_cannot_serve(make, options, reason):
    message = refused(make, **options)
    assert message.startswith("--attention-backend MAC cannot serve this model as configured: ")
    assert reason in message and len(message.splitlines()) == 1
    without = {
        key: value
        for key, value in options.items()
        if key not in ("attention_config", "speculative_config", "attention_backend")
    }
    make(**without)  # vLLM itself has nothing against it


@pytest.mark.parametrize(
    "family, reason", [("deepseek", "MLA"), ("bert", "attention is encoder_only, and MAC takes decoder")]
)
def test_models_that_mac_cannot_serve(make, family, reason):
    message = refused(make, family)
    assert reason in message and message.endswith(": leave --attention-backend MAC out")


def test_batch_invariance(make, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert refused(make).endswith(": unset VLLM_BATCH_INVARIANT")


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_a_checkpoint_that_quantises_its_kv_cache(make, strategy):
    """An explicit dtype cures the one, and nothing the other."""
    from vllm.config import set_current_vllm_config

    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [],
                    "kv_cache_scheme": FP8_SCHEME | {"strategy": strategy}}  # fmt: skip
    options = {"quantization": quantization, "dtype": "bfloat16"}
    message = refused(make, **options)
    assert (
        "--kv-cache-dtype is fp8, and MAC takes one of auto, float16, bfloat16 here, which is the checkpoint's choice"
        in message
    )
    if strategy == "tensor":
        assert message.endswith(": give --kv-cache-dtype bfloat16")
        config = make(**options, attention_backend="MAC", kv_cache_dtype="bfloat16")
        with set_current_vllm_config(config):
            assert config.cache_config.cache_dtype == "bfloat16"
    else:
        assert "use_per_head_quant_scales: " in refused(make, **options, kv_cache_dtype="bfloat16")


def test_the_layers_that_the_refusals_are_about(make):
    """What concerns layers that MAC was not chosen for is no refusal."""
    windows = {"backend_per_kind": {"sliding_window_mla": "MAC"}}
    make(attention_config=windows, kv_cache_dtype="fp8")
    make("deepseek", attention_config={"backend_per_kind": {"full_attention": "MAC"}})
    match = {"additional_config": {"mac": {"rule": "match"}}}  # by index pages would have two sizes
    make(attention_backend="MAC", kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["0", "1"], **match)


@pytest.mark.parametrize("options", [{}, {"block_size": 64}, {"attention_config": {"use_non_causal": True}}])
def test_asked_is_what_vllm_will_ask(make, monkeypatch, options):
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention import selector

    config, seen = make(**options), []
    monkeypatch.setattr(
        selector, "_cached_get_attn_backend", lambda **found: seen.append(found["attn_selector_config"])
    )
    with set_current_vllm_config(config):
        selector.get_attn_backend(32, torch.float32, "auto")
    expected = startup.asked(config)
    assert {key: getattr(seen[0], key) for key in expected} == expected
    assert {one.asked for one in BACKEND.values() if one.asked} == expected.keys()


def test_in_process_it_is_the_error_itself(model):
    from vllm import LLM

    with pytest.raises(MacConfigError, match="windw: unknown key"):
        LLM(str(model), attention_backend="MAC", additional_config={"mac": {"windw": 256}})


def test_one_of_several_api_servers_says_nothing(make, warnings):
    config = make(additional_config={"mac": {}})
    warnings.clear()
    said = []
    for count, rank in ((2, -1), (2, 0), (2, 1), (1, 0), (1, -1)):
        parallel = SimpleNamespace(_api_process_count=count, _api_process_rank=rank)
        broken = SimpleNamespace(
            parallel_config=parallel,
            additional_config={"window": 1},
            attention_config=make(attention_backend="MAC").attention_config,
        )
        try:
            startup.check(broken)
        except MacConfigError:
            said.append((count, rank))
    assert said == [(2, -1), (1, 0), (1, -1)]
    assert config.additional_config == {"mac": {}}


def test_installing_again_changes_nothing(make):
    from vllm.engine.arg_utils import EngineArgs

    before = EngineArgs.create_engine_config
    assert before.checks_mac
    startup.install()
    assert EngineArgs.create_engine_config is before


def test_a_fault_of_the_check_stops_no_start(make, warnings, monkeypatch):
    monkeypatch.setattr(startup, "chosen_by", lambda config: 1 / 0)
    assert make().model_config is not None
    assert warnings == ["vllm-mac could not check its configuration before the engine starts"]


def test_gpus_that_are_too_old_for_a_ring(monkeypatch, make):
    from vllm.platforms import current_platform

    config = make(attention_backend="MAC")
    for capability, ring, reason in (
        ((7, 5), "auto", "this GPU is sm75, and MAC needs sm80 or later"), ((8, 0), "auto", None),
        ((8, 6), "float8_e4m3fn", "needs a GPU of sm89 or later, and this one is sm86"),
        ((9, 0), "float8_e4m3fn", None),
    ):  # fmt: skip
        monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
        monkeypatch.setattr(compilers, "has_flashinfer", lambda: True)
        monkeypatch.setattr(type(current_platform), "get_device_capability", lambda self, device_id=0: capability)
        found = [
            because for because, _ in startup.refusals(config, startup.resolve({"rule": "match", "ring_dtype": ring}))
        ]
        assert len(found) == (reason is not None) and all(reason in because for because in found)


@pytest.mark.parametrize("dtype, mac, capability, reason", [
    ("fp8", {}, (9, 0), None), ("fp8_e4m3", {}, (8, 9), None), ("bfloat16", {}, (8, 0), None),
    ("fp8", {}, (8, 0), ("MAC reads an FP8 KV cache on sm89 or later", "give --kv-cache-dtype bfloat16")),
    ("fp8_e5m2", {}, (9, 0), (
        "--kv-cache-dtype is fp8_e5m2, and MAC takes one of auto, float16, bfloat16, fp8, fp8_e4m3",
        "give --kv-cache-dtype fp8_e4m3",
    )),
    ("nvfp4", {}, (9, 0), ("fp8_e4m3", "give --kv-cache-dtype bfloat16")),
    ("fp8", {"rule": "match"}, (9, 0), (
        "MAC takes one of auto, float16, bfloat16 without rule: index",
        "give --kv-cache-dtype bfloat16, or set rule: index",
    )),
    ("fp8", {"enabled": False}, (9, 0), ("without rule: index", "or set rule: index")),
])  # fmt: skip
def test_fp8_caches_by_index_on_gpus(monkeypatch, make, dtype, mac, capability, reason):
    from vllm.platforms import current_platform

    config = make(attention_backend="MAC")
    config.cache_config.cache_dtype = dtype
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(compilers, "has_flashinfer", lambda: True)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda self, device_id=0: capability)
    found = [*startup.refusals(config, startup.resolve(mac), dtype)]
    assert len(found) == (reason is not None), found
    assert all(reason[0] in because and cure.endswith(reason[1]) for because, cure in found)


@pytest.mark.parametrize("capability, refused", [((8, 0), False), ((9, 0), False), ((10, 0), True), ((12, 0), True)])
def test_gpus_that_are_too_new_for_an_index(monkeypatch, make, capability, refused):
    from vllm.platforms import current_platform

    config = make(attention_backend="MAC")
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(compilers, "has_flashinfer", lambda: True)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda self, device_id=0: capability)
    found = [*startup.refusals(config, startup.resolve())]
    assert [cure for because, cure in found if "rule: index are for GPUs before sm100" in because] == [
        TO_MATCH
    ] * refused
    assert not [*startup.refusals(config, startup.resolve({"rule": "match"}))]
    monkeypatch.setattr(compilers, "has_flashinfer", lambda: False)
    (absent,) = startup.refusals(config, startup.resolve({"rule": "match"}))
    assert absent == ("FlashInfer is not installed, which MAC needs on GPUs", compilers.FLASHINFER)
