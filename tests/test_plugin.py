"""How the name MAC reaches vLLM: in this process, through pickles, and in a real server."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vllm_mac
from support.servers import environment
from vllm_mac import plugin

REGISTRY = "vllm.v1.attention.backends.registry"


@pytest.fixture
def vllm():
    """The parts of vLLM these tests need."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig, get_attn_backend

    load_general_plugins()
    return SimpleNamespace(
        backends=AttentionBackendEnum,
        engine_args=EngineArgs,
        get_attn_backend=get_attn_backend,
        platform=type(current_platform),
        selector_config=AttentionSelectorConfig,
        set_config=set_current_vllm_config,
    )


@pytest.fixture
def errors():
    """Messages that the plugin logs; vLLM's loggers do not hand theirs on to pytest's."""
    found = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())
    plugin.logger.addHandler(handler)
    yield found
    plugin.logger.removeHandler(handler)


def fresh(script: str, *arguments: str, data: bytes = b"", **changes: str) -> str:
    """What a new Python process prints last when it runs `script`."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], input=data, capture_output=True, env=environment(**changes)
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()[-1]


def test_registering_again_changes_nothing(vllm):
    before = dict(vllm.backends.__members__), vllm.platform.get_attn_backend_cls.__func__
    for step in (plugin.platform, plugin.register, plugin.register):
        assert step() is None
    assert before == (dict(vllm.backends.__members__), vllm.platform.get_attn_backend_cls.__func__)
    assert vllm.backends["MAC"].get_path() == plugin.BACKEND


@pytest.mark.parametrize("absent, step", [(REGISTRY, "register_name"), ("vllm.platforms", "honour_on_cpu")])
def test_a_failure_is_one_logged_error(monkeypatch, errors, absent, step):
    monkeypatch.setitem(sys.modules, absent, None)  # importing it now fails
    plugin.register()
    assert len(errors) == 1
    assert errors[0].startswith(f"vllm-mac {vllm_mac.__version__} does not fit this vLLM ({step} failed)")


def test_other_members_pickle_as_without_us(vllm, monkeypatch):
    def pickles():
        members = [m for m in vllm.backends if m.name != "MAC"]
        return [[pickle.dumps(m, protocol) for m in members] for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]

    with_us = pickles()
    monkeypatch.delitem(plugin.copyreg.dispatch_table, vllm.backends)
    assert with_us == pickles()


def test_member_survives_copies(vllm):
    member = vllm.backends["MAC"]
    assert copy.deepcopy({"a": [member]})["a"][0] is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


READ_PICKLE = f"""
import pickle, sys
from {REGISTRY} import AttentionBackendEnum
assert "MAC" not in AttentionBackendEnum.__members__
config = pickle.load(sys.stdin.buffer).attention_config
assert config.backend is AttentionBackendEnum["MAC"] is config.backend_per_kind["full_attention"]
print(config.backend.get_path())
"""


@pytest.mark.cpu
def test_configuration_is_unpickled_before_plugins_load(vllm, model):
    chosen = {"backend": "MAC", "backend_per_kind": {"full_attention": "MAC"}}
    config = vllm.engine_args(model=str(model), attention_config=chosen).create_engine_config()
    # An empty list of plugins: only unpickling can register the name.
    assert fresh(READ_PICKLE, data=pickle.dumps(config), VLLM_PLUGINS="") == plugin.BACKEND


@pytest.mark.cpu
@pytest.mark.parametrize(
    "options, windowed",
    [
        ({"attention_backend": "MAC"}, "MAC"),
        ({"attention_config": {"backend": "MAC"}}, "MAC"),
        ({"attention_config": {"backend_per_kind": {"full_attention": "MAC"}}}, "CPU_ATTN"),
        ({}, "CPU_ATTN"),
    ],
)
def test_every_way_to_choose(vllm, model, options, windowed):
    config = vllm.engine_args(model=str(model), **options).create_engine_config()
    with vllm.set_config(config):
        full, window = (
            vllm.get_attn_backend(32, torch.float32, "auto", has_sliding_window=sliding).get_name()
            for sliding in (False, True)
        )
    assert (full, window) == ("MAC" if options else "CPU_ATTN", windowed)


CHOOSE_FIRST = """
import json, sys
from vllm import LLM
llm = LLM(sys.argv[1], attention_config={"backend": "MAC"}, max_model_len=256, enforce_eager=True, dtype="float32")
layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
print(json.dumps([type(layer.impl).__name__ for layer in layers]))
llm.llm_engine.engine_core.shutdown()
"""


@pytest.mark.cpu
def test_choice_in_a_dictionary_is_the_first_thing_a_process_says(model):
    # LLM() parses it before vLLM loads general plugins.
    printed = fresh(CHOOSE_FIRST, str(model), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert json.loads(printed) == ["MacCPUImpl"] * 2


def selector(vllm, **changes):
    return vllm.selector_config(
        **{"head_size": 32, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": None, **changes}
    )


@pytest.mark.cpu
@pytest.mark.parametrize("changes", [{}, {"use_mla": True}, {"attn_type": "encoder_only"}])
def test_other_choices_are_left_to_vllm(vllm, changes):
    ours = vllm.platform.get_attn_backend_cls
    config = selector(vllm, **changes)
    for name in (None, "CPU_ATTN", "FLASH_ATTN"):
        chosen = name and vllm.backends[name]
        original = ours.__func__.__wrapped__(vllm.platform, chosen, config, 8)
        assert ours(chosen, attn_selector_config=config, num_heads=8) == original != plugin.BACKEND


@pytest.mark.cpu
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"use_mla": True}, "MLA"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype is fp8, and MAC takes one of auto, float16, bfloat16 here"),
        ({"use_kv_connector": True}, "KV connector"),
        ({"use_non_causal": True}, "non-causal"),
    ],
)
def test_what_mac_cannot_serve_is_refused(vllm, changes, reason):
    choose = vllm.platform.get_attn_backend_cls
    assert choose(vllm.backends["MAC"], selector(vllm), 8) == plugin.BACKEND
    with pytest.raises(ValueError) as refused:
        choose(vllm.backends["MAC"], selector(vllm, **changes), 8)
    assert reason in str(refused.value)
    assert "--attention-backend MAC" in str(refused.value)
