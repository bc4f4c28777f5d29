"""What a worker settles for its layers once the model is loaded: their configurations, their rings."""

from types import SimpleNamespace

import pytest
import torch

from vllm_mac import layers
from vllm_mac.config import MacConfigError, resolve
from vllm_mac.layers import MacLayer

NAME = "model.layers.{}.self_attn.attn"


@pytest.fixture
def load(monkeypatch):
    """Makes `count` layers under the keys of `mac`, loads all on `device`, and returns them."""
    monkeypatch.setattr(layers, "find_rotary", lambda *_: None)

    def load(count: int, mac: dict, stages=1, dtype=torch.float32, device="cpu", exact=()) -> list[MacLayer]:
        vllm_config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace()),
            parallel_config=SimpleNamespace(pipeline_parallel_size=stages, use_ubatching=False),
            scheduler_config=SimpleNamespace(max_num_seqs=2),
            speculative_config=None,
            additional_config={"mac": {"window": 8, "band": 4, "min_context": 16} | mac},
        )
        made = []
        for i in range(count):
            window = 8 if i in exact else None
            layer = MacLayer(
                vllm_config, 2, 1, 32, 1.0,
                sliding_window=window, logits_soft_cap=None, alibi_slopes=None, sinks=None, kv_sharing=None,
            )  # fmt: skip
            layer.bind(None, NAME.format(i))
            made.append(layer)
            attention = SimpleNamespace(impl=SimpleNamespace(mac=layer))
            vllm_config.compilation_config.static_forward_context[layer.name] = attention
        for layer in made:
            layer.load(dtype, torch.device(device))
        return made

    return load


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(layers.logger, "warning", lambda text, *args: found.append(text % args))
    return found


def test_each_layer_has_its_own_threshold(load, warnings):
    mac = {"threshold": 0.2, "layers": {"threshold": {"1-2": 0.5, "*.layers.2.*": 0.75}}}
    made = load(4, mac)
    assert [layer.config.threshold for layer in made] == [0.2, 0.5, 0.75, 0.2]
    assert not warnings


@pytest.mark.parametrize("stages", [1, 2])
def test_a_threshold_that_no_served_layer_has_is_warned_of(load, warnings, stages):
    """Layer 1 is exact, and there is no 7; but in a pipeline another worker may have it."""
    load(3, {"layers": {"threshold": {0: 0.5, 1: 0.5, "7-8": 0.5}}}, stages, exact=[1])
    expected = ["MAC: layers.threshold: no layer that MAC serves matches 1, '7-8'"]
    assert warnings == (expected if stages == 1 else [])


def test_thresholds_of_a_model_that_is_not_served_need_no_warning(load, warnings):
    load(1, {"enabled": False, "layers": {"threshold": {0: 0.5}}})
    assert warnings == ["MAC serves none of 1 attention layers; exact: 1 (disabled)"]


def test_float8_rings(load):
    mac = {"ring_dtype": "float8_e4m3fn", "max_sequences": 3}
    store = load(1, mac, dtype=torch.bfloat16)[0].store
    assert (store.query.dtype, store.out.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    # 2 heads, 8 entries: 32 elements of 1 and of 2 bytes, LSE and chain.
    size = 2 * 8 * (32 * 3 + 8)
    layer = load(1, mac | {"ring_memory_gib": 2.5 * size / 2**30}, dtype=torch.bfloat16)[0]
    assert len(layer.store.query) == 2


@pytest.mark.parametrize("capability, known", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_float8_is_refused(load, monkeypatch, capability, known):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    allocated = []
    monkeypatch.setattr(layers.RingStore, "allocate", lambda *args: allocated.append(args))
    monkeypatch.setattr(layers.torch, "zeros", lambda *_, **__: None)
    mac = {"ring_dtype": "float8_e4m3fn"}
    if known:
        load(1, mac, device="cuda")
        assert len(allocated) == 1
    else:
        with pytest.raises(MacConfigError) as caught:
            load(1, mac, device="cuda")
        assert "ring_dtype: received 'float8_e4m3fn'" in str(caught.value)
        assert f"sm{capability[0]}{capability[1]}; must be one of auto, float32" in str(caught.value)
        assert not allocated
    load(1, {"ring_dtype": "bfloat16"}, device="cuda")  # any other dtype is welcome


def test_the_refusal_names_every_other_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(MacConfigError) as caught:
        layers.check_device(torch.float8_e4m3fn, torch.device("cuda"))
    choices = str(caught.value).rpartition("one of ")[2].split(", ")
    with pytest.raises(MacConfigError) as caught:
        resolve({"ring_dtype": "x"}, {})
    assert str(caught.value).endswith(", ".join([*choices, "float8_e4m3fn"]))
