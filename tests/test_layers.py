"""What a worker settles for its layers once the model is loaded: their configurations, their rings."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)

from vllm_mac import index_pages, layers, ring_room
from vllm_mac.config import MacConfigError, resolve
from vllm_mac.layers import MacLayer
from vllm_mac.rope import Rotary

NAME = "model.layers.{}.self_attn.attn"


@pytest.fixture
def load(monkeypatch):
    """Makes `count` layers under the keys of `mac`, loads all on `device`, and returns them.

    after: the layers of a model that has been loaded, which this one drafts for. backend: by name, the one that
    `speculative_config` chooses for the draft model. holders: the modules that hold them. media: whether
    the model takes images. hybrid: whether it has states in KV blocks. sequences: `max_num_seqs`. speculated: tokens that a step verifies. specs: the KV caches of some, or their kinds, by the layer's index.
    """
    monkeypatch.setattr(layers, "find_rotary", lambda *_: Rotary(None))

    def load(
        count: int, mac: dict, stages=1, dtype=torch.float32, device="cpu", exact=(), after=(), backend=None,
        holders=None, media=False, specs={}, speculated=0, method="ngram", v2=True, kv_cache_dtype="auto", sequences=2, hybrid=False,
    ) -> list[MacLayer]:  # fmt: skip
        of_rule = {} if mac.get("rule") == "index" else {"rule": "match", "window": 8}
        drafting = SimpleNamespace(
            attention_backend=backend and SimpleNamespace(name=backend),
            num_speculative_tokens=speculated,
            method=method,
        )
        vllm_config = after[0].vllm_config if after else SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            model_config=SimpleNamespace(
                hf_text_config=SimpleNamespace(), max_model_len=64, supports_multimodal_inputs=media, is_hybrid=hybrid,
            ),
            parallel_config=SimpleNamespace(pipeline_parallel_size=stages, use_ubatching=False),
            scheduler_config=SimpleNamespace(max_num_seqs=sequences),
            speculative_config=drafting if backend or speculated else None, use_v2_model_runner=v2,
            additional_config={"mac": of_rule | {"band": 4, "min_context": 16} | mac},
        )  # fmt: skip
        made = []
        for i in range(len(after), len(after) + count):
            window = 8 if i in exact else None
            layer = MacLayer(vllm_config, 2, 1, 32, 1.0, window)
            layer.bind(holders and holders[i], NAME.format(i))
            made.append(layer)
            attention = torch.nn.Module()
            attention.impl, attention.kv_cache_dtype = SimpleNamespace(mac=layer), kv_cache_dtype
            attention._k_scale, attention._v_scale = torch.tensor(0.5), torch.tensor(2.0)
            kind = specs.get(i, FullAttentionSpec)
            spec = kind if isinstance(kind, KVCacheSpec) else object.__new__(kind)
            attention.get_kv_cache_spec = lambda _, spec=spec: spec
            vllm_config.compilation_config.static_forward_context[layer.name] = attention
        for layer in made:
            layer.load(dtype, torch.device(device))
        return made

    return load


@pytest.fixture
def warnings(monkeypatch):
    found = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(layers.logger, name, lambda text, *args, **_: found.append(text % args))
    return found


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(layers.logger, "info", lambda text, *args, **_: found.append(text % args))
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


def test_include_and_exclude_that_match_no_layer_are_warned_of(load, warnings):
    """A layer that is exact anyway is a layer; what is excluded is not served, but was meant."""
    load(3, {"layers": {"include": ["0-2", 40], "exclude": ["*.mlp", 1, 2]}}, exact=[2])
    assert warnings == ["MAC: layers.include: no layer matches 40", "MAC: layers.exclude: no layer matches '*.mlp'"]
    warnings.clear()
    load(2, {"layers": {"include": [7]}})
    assert warnings == [
        "MAC: layers.include: no layer matches 7", "MAC serves none of 2 attention layers; exact: 2 (excluded)",
    ]  # fmt: skip
    warnings.clear()
    load(2, {"layers": {"include": [0, 7]}}, stages=2)  # another worker may have it
    assert warnings == []


def state(made: list[MacLayer]) -> list[tuple]:
    return [(x.exact, x.config, x.rotary, x.state, x.counts) for x in made]


def same(now: list[tuple], then: list[tuple]) -> bool:
    return all(x is y for one, other in zip(now, then, strict=True) for x, y in zip(one, other, strict=True))


def test_a_draft_model_leaves_the_model_it_drafts_for_as_it_was(load, warnings, said):
    size = 2 * 8 * (2 * 4 * 32 + 8)  # one ring of one layer
    mac = {"ring_memory_gib": 1.5 * size / 2**30, "layers": {"threshold": {0: 0.5}}, "audit": 1.0}
    target = load(2, mac, exact=[1])
    before, lines = state(target), len(said)
    assert [x.exact for x in target] == [None, "sliding_window"] and target[0].state.store.rings == 1
    warnings.clear()
    # The second layer of the draft would have a reason of its own.
    drafts = [load(2, {}, after=target, exact=[3])]
    drafts.append(load(1, {}, after=[*target, *drafts[0]]))  # and there may be several models
    assert [[x.exact for x in draft] for draft in drafts] == [["draft", "draft"], ["draft"]]
    assert not any(x.state is not None or x.counts is not None for draft in drafts for x in draft)
    assert same(state(target), before)
    assert not warnings and said[lines:] == [f"MAC leaves {n} attention layers of a draft model exact" for n in (2, 1)]


@pytest.mark.parametrize(
    "method, changes, most",
    [
        ("draft_model", {}, 5),  # one more than a step verifies
        ("eagle", {}, 4),
        ("qwen3_next_mtp", {}, 4),
        ("dflash", {}, None),  # its queries see tokens behind them
        ("eagle", {"rule": "match"}, None),
        ("eagle", {"exact": [2]}, None),  # a sliding window
        ("eagle", {"specs": {2: SlidingWindowSpec}}, None),
        ("eagle", {"hybrid": True}, None),
        ("eagle", {"v2": False}, None),
        ("eagle", {"all": [0, 1]}, None),  # all layers of the model are exact, so pages have no index
        ("eagle", {"device": "cpu"}, None),
        ("draft_model", {"speculated": 15}, 17),  # 17 tokens of a group of two heads take two parts
        ("draft_model", {"speculated": 63}, None),  # and 65 more than four
    ],
)
def test_which_layers_of_a_draft_run_on_macs_kernels(load, warnings, monkeypatch, method, changes, most):
    """most: tokens of a row; None where the platform's own backend runs them. They stay exact, and have no counters."""
    monkeypatch.setattr(layers, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    options = {"device": "meta", "rule": "index", "speculated": 3} | changes
    mac, device = {"rule": options.pop("rule")}, options.pop("device")
    ours = {name: options.pop(name) for name in ("hybrid", "speculated", "v2") if name in options}
    windows = options.pop("all", ())
    target = load(2, mac, method=method, exact=windows, **ours)
    warnings.clear()
    (draft,) = load(1, mac, after=target, device=device, **options)
    assert draft.exact == "draft" and not draft.served and draft.counts is None
    assert all(x.served == (not windows) for x in target)
    assert (draft.drafting is not None) == (most is not None) and draft.apart == (method == "draft_model")
    assert most in (None, layers.at_once(draft)) and not any(x.drafting or x.apart for x in target)
    assert [text.partition(",")[0] for text in warnings] == (
        ["MAC leaves layers of a draft model to FlashInfer"] if changes == {"speculated": 63} else []
    )
    before = draft.drafting
    draft.load(torch.float32, torch.device(device))
    assert draft.drafting is before


def test_weights_that_are_loaded_again_change_nothing(load, warnings, said):
    target = load(2, {}, exact=[1])
    draft = load(1, {}, after=target)
    before, lines = state([*target, *draft]), len(said)
    for layer in (*target, *draft):
        layer.load(torch.float32, torch.device("cpu"))
    assert same(state([*target, *draft]), before)
    assert len(said) == lines and not warnings


def test_a_draft_model_cannot_choose_mac(load):
    """Where the model that it drafts for runs without MAC, the draft's layers are the first that MAC sees."""
    load(1, {}, backend="FLASHINFER")
    with pytest.raises(MacConfigError, match="speculative_config.attention_backend: received MAC"):
        load(1, {}, backend="MAC")


@pytest.mark.parametrize(
    "rule, speculated, gpu, most",
    [
        ("match", 1, False, 1),
        ("index", 0, True, 1),
        ("index", 63, True, 64),
        ("index", 64, True, 1),
        ("index", 64, False, 65),
    ],
)
def test_how_many_tokens_of_a_row_decode_at_once(load, warnings, monkeypatch, rule, speculated, gpu, most):
    """With two heads of a group GPUs decode 16 tokens of a part, of which a row has four."""
    monkeypatch.setattr(layers, "current_platform", SimpleNamespace(is_cuda=lambda: gpu))
    (layer,) = load(1, {"rule": rule}, speculated=speculated)
    assert layer.served and layers.at_once(layer) == most
    said = ["MAC leaves steps that verify speculated tokens exact"] if speculated and most == 1 else []
    assert [line.partition(":")[0] for line in warnings] == said


@pytest.mark.parametrize(
    "mac, kept", [({}, {"counts"}), ({"audit": 0.5, "error_budget": 0.1}, {"counts", "audited", "paused"})]
)
def test_what_outlasts_sleep_is_a_buffer_of_the_layer(load, mac, kept):
    served, windowed = load(2, mac, exact=[1])
    context = served.vllm_config.compilation_config.static_forward_context
    buffers = dict(context[served.name].named_buffers())
    assert buffers.keys() == {f"mac_{name}" for name in kept}
    assert all(buffers[f"mac_{name}"] is getattr(served.state, name) for name in kept)
    assert not context[served.name].state_dict()  # no checkpoint has them
    assert not dict(context[windowed.name].named_buffers())


def test_thresholds_of_a_model_that_is_not_served_need_no_warning(load, warnings):
    load(1, {"enabled": False, "layers": {"threshold": {0: 0.5}}})
    assert warnings == ["MAC serves none of 1 attention layers; exact: 1 (disabled)"]


@pytest.mark.parametrize("media", [True, False])
def test_rotation_by_several_positions_needs_text_alone(load, warnings, monkeypatch, media):
    """As of Qwen2-VL: where a request may hold an image, attention does not know by what its queries are rotated."""
    monkeypatch.undo()  # the layers' real rotations, and nobody to hear what is said
    monkeypatch.setattr(layers.logger, "warning", lambda text, *args: warnings.append(text % args))
    with set_current_vllm_config(VllmConfig()):
        several = {"rope_type": "default", "mrope_section": [4, 6, 6]}
        modules = [
            get_rope(32, 64, rope_parameters=keys, dtype=torch.float32) for keys in (several, {"rope_type": "default"})
        ]
        made = load(2, {}, holders=[SimpleNamespace(rotary_emb=module) for module in modules], media=media)
    assert [layer.exact for layer in made] == (["mrope", None] if media else [None, None])
    assert made[1].rotary.module is modules[1] and (made[0].state is None) == media
    said = f"MAC leaves {NAME.format(0)} exact: MRotaryEmbedding rotates by positions that attention is not told"
    assert [text.startswith(said) and "--language-model-only" in text for text in warnings] == [True] * media


def test_float8_rings(load):
    mac = {"ring_dtype": "float8_e4m3fn", "max_sequences": 3}
    store = load(1, mac, dtype=torch.bfloat16)[0].state.store
    assert (store.query.dtype, store.out.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    # 2 heads, 8 entries: 32 elements of 1 and of 2 bytes, LSE and chain.
    size = 2 * 8 * (32 * 3 + 8)
    layer = load(1, mac | {"ring_memory_gib": 1.5 * size / 2**30, "max_sequences": 1}, dtype=torch.bfloat16)[0]
    assert layer.state.store.rings == 1


RING = 2 * 8 * (2 * 4 * 32 + 8)  # bytes of one ring of a layer of `load`, in float32


def test_more_sequences_than_the_memory_holds_rings_for(load, warnings):
    """Asked for, they are refused with the most that it holds; else the others decode exactly."""
    three = {"ring_memory_gib": 3.5 * 2 * RING / 2**30}
    message = r"max_sequences: received 8, .*which holds 3: choose 3 or less, or raise ring_memory_gib"
    with pytest.raises(MacConfigError, match=message):
        load(2, three | {"max_sequences": 8})
    assert load(2, three | {"max_sequences": 3})[0].state.store.rings == 3 and not warnings
    assert load(2, {"ring_memory_gib": 1.5 * 2 * RING / 2**30})[0].state.store.rings == 1
    assert "holds 1 rings" in warnings[0] and "not 2; sequences beyond that decode exactly" in warnings[0]
    with pytest.raises(MacConfigError, match=r"ring_memory_gib: received .* holds no ring"):
        load(2, {"ring_memory_gib": 0.5 * 2 * RING / 2**30})


def gpu_of(monkeypatch, load, memory: int, weights: int, **cache) -> MacLayer:
    """A layer of a worker on a GPU with so many bytes of memory, of which vLLM may use half, and of weights."""
    (layer,) = load(1, {"min_context": 16})
    cuda = SimpleNamespace(is_cuda=lambda: True, get_device_total_memory=lambda: memory)
    monkeypatch.setattr(ring_room, "current_platform", cuda)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: weights)
    layer.vllm_config.scheduler_config.max_num_seqs = 64
    layer.vllm_config.cache_config = SimpleNamespace(
        **{"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": None} | cache
    )
    return layer


@pytest.mark.parametrize(
    "memory, weights, cache, rings",
    [
        # 5 % of half the memory.
        (2 * 20 * 10 * RING, 0, {}, 10),
        (2 * 20 * 100 * RING, 0, {}, 64),  # max_num_seqs
        # A sequence of 16 tokens has 16 KV heads' keys and values of 2 * 32 numbers, 4,096 bytes: what weights leave holds 7.
        (2 * 20 * 100 * RING, 20 * 100 * RING - 7 * 4096 - 99, {}, 7),
        (2 * 20 * 100 * RING, 0, {"kv_cache_memory_bytes": 5 * 4096}, 5),
        (2 * 20 * 100 * RING, 20 * 100 * RING, {}, 1),
    ],
)
def test_rings_are_sized_by_the_gpu(monkeypatch, load, warnings, memory, weights, cache, rings):
    layer = gpu_of(monkeypatch, load, memory, weights, **cache)
    assert ring_room.ring_count([layer], torch.float32) == rings
    assert any("sequences beyond that decode exactly" in text for text in warnings) == (rings == 10)


def test_all_layers_have_as_many_rings(monkeypatch, load):
    """Though the rings of the first ones take of the memory by which they are counted."""
    left = iter(range(9, 0, -1))
    monkeypatch.setattr(ring_room, "_most_long_sequences", lambda *_: next(left))
    made = load(3, {"min_context": 16}, sequences=64)
    assert [layer.state.store.rings for layer in made] == [9, 9, 9]


@pytest.mark.parametrize("capability, known", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_float8_is_refused(load, monkeypatch, capability, known):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    allocated = []
    monkeypatch.setattr(layers.RingStore, "allocate", lambda *args: allocated.append(args))
    allocate = layers.allocate
    monkeypatch.setattr(layers, "allocate", lambda *args: allocate(*args[:-1], "cpu"))
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


@pytest.mark.parametrize("kv_cache_dtype, fp8", [("auto", False), ("fp8", True), ("fp8_e4m3", True)])
def test_an_index_has_the_scales_of_its_layer(load, kv_cache_dtype, fp8):
    """The tensors themselves: vLLM may write them after a layer is loaded."""
    (layer,) = load(1, {"rule": "index"}, kv_cache_dtype=kv_cache_dtype)
    attention, scales = layer.attention, layer.index.maps.scales
    assert layer.fp8 == fp8 == (scales is not None)
    if scales is not None:
        assert scales.key is attention._k_scale and scales.value is attention._v_scale
    assert {name for name, _ in attention.named_buffers()} == {
        "mac_counts", *(f"mac_index_{name}" for name in layer.index.maps.own())
    }  # fmt: skip


@pytest.mark.parametrize("capability, known", [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_that_reads_no_float8_has_no_fp8_cache(monkeypatch, capability, known):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    layers.check_index_device(torch.device("cuda"), fp8=False)
    if known:
        layers.check_index_device(torch.device("cuda"), fp8=True)
    else:
        with pytest.raises(MacConfigError, match="FP8 KV cache on sm89 or later: give --kv-cache-dtype bfloat16"):
            layers.check_index_device(torch.device("cuda"), fp8=True)


def test_the_refusal_names_every_other_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(MacConfigError) as caught:
        layers.check_device(torch.float8_e4m3fn, torch.device("cuda"))
    choices = str(caught.value).rpartition("one of ")[2].split(", ")
    with pytest.raises(MacConfigError) as caught:
        resolve({"rule": "match", "ring_dtype": "x"}, {})
    assert str(caught.value).endswith(", ".join([*choices, "float8_e4m3fn"]))


def test_layers_of_chunked_local_attention_are_exact(load):
    """vLLM gives them each request as several rows of a batch, which are no requests."""
    made = load(3, {}, specs={1: ChunkedLocalAttentionSpec, 2: SinkFullAttentionSpec})
    assert [layer.exact for layer in made] == [None, "local_attention", "local_attention"]
    assert [layer.served for layer in made] == [True, False, False]


def test_pages_of_an_fp8_cache_have_room_for_means_in_float16(monkeypatch):
    """vLLM has such a cache as bytes."""
    monkeypatch.setattr(index_pages, "indexing", lambda: resolve({}, {}))
    spec = FullAttentionSpec(
        block_size=64, num_kv_heads=2, head_size=128, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR
    )
    found = index_pages.with_index(spec, 16)
    plain, codes, means = 2 * 64 * 2 * 128, 2 * 64 * 64 // 2, 2 * 128 * 2
    assert found.real_page_size_bytes == plain and found.page_size_bytes == plain + codes + means
    assert (plain + codes + means) % 128 == 0


def test_an_index_of_more_directions_than_keys_have_numbers_is_refused(load):
    name = NAME.format(0)
    with pytest.raises(
        MacConfigError, match=f"^{name}: index_size: received 48, more than the head size 32; must be null"
    ):
        load(1, {"rule": "index", "index_size": 48})
    assert [layer.exact for layer in load(2, {"rule": "index", "index_size": 48}, exact=(0, 1))] == [
        "sliding_window"
    ] * 2
    (layer,) = load(1, {"rule": "index", "index_size": 32})
    assert layer.index.maps.shift.shape == (1, 32)


def page(kind=FullAttentionSpec, block=32, heads=1, **fields):
    return kind(block_size=block, num_kv_heads=heads, head_size=32, dtype=torch.float32, **fields)


WINDOW = {"kind": SlidingWindowSpec, "sliding_window": 8}
STATES = MambaSpec(block_size=32, shapes=((2, 32),), dtypes=(torch.float32,), page_size_padded=page().page_size_bytes)


@pytest.mark.parametrize("other, refused", [
    (page(**WINDOW), False), (page(**WINDOW, block=64), False), (page(heads=2), False), (page(**WINDOW, heads=2), True),
    (STATES, True),
])  # fmt: skip
def test_no_index_lies_where_other_layers_have_their_keys(load, other, refused):
    """Layers of several kinds share their memory page by page; those of one kind have memory of their own."""
    made = lambda rule, exact=(1,): load(2, {"rule": rule}, specs={0: page(), 1: other}, exact=exact)
    if refused:
        with pytest.raises(
            MacConfigError,
            match=r"^rule: index needs .* those of model.layers.1.* differ from .*0.*: set rule: match, as in ",
        ):
            made("index")
    else:
        assert made("index")[0].served
    assert made("match")[0].served and not any(layer.served for layer in made("index", (0, 1)))


def test_states_of_hybrid_models_are_left_alone_and_windows_are_refused(load):
    """Their blocks are told apart; those of layers that do not see everything would be of another size."""
    made = lambda other: load(2, {"rule": "index"}, specs={0: page(), 1: other}, exact=(1,), hybrid=True)
    assert made(STATES)[0].served
    with pytest.raises(
        MacConfigError, match=r"^the model is hybrid, and model.layers.1.* does not see everything: set"
    ):
        made(page(**WINDOW))


def config_of(model, rule: str):
    """vLLM's configuration of an engine with MAC."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"attention_backend": "MAC", "additional_config": {"mac": {"rule": rule}}, "skip_tokenizer_init": True}
    return EngineArgs(model=str(model), max_model_len=512, **options).create_engine_config()


@pytest.mark.parametrize("rule", ["index", "match"])
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"sliding_window": 64}, "sliding_window"),
        ({"logits_soft_cap": 30.0}, "soft_cap"),
        ({"alibi_slopes": [0.5] * 8}, "alibi"),
        ({"sinks": torch.zeros(8)}, "attention_sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "kv_sharing"),
        ({"dbo": True}, "micro_batches"),
    ],
)
def test_what_mac_does_not_compute_is_exact(models, monkeypatch, rule, changes, reason):
    from vllm.config import ParallelConfig, set_current_vllm_config

    from vllm_mac import cpu

    vllm_config = config_of(models("llama"), rule)
    if changes.get("dbo"):  # whose kernels are not there
        monkeypatch.setattr(ParallelConfig, "use_ubatching", True)
    given = {"alibi_slopes": None, "sliding_window": None} | {key: x for key, x in changes.items() if key != "dbo"}
    with set_current_vllm_config(vllm_config):
        impl = cpu.MacCPUImpl(8, 32, 32**-0.5, 2, kv_cache_dtype="auto", **given)
    assert impl.mac.exact == reason


@pytest.mark.parametrize(
    "exact, padded", [([False], True), ([True], False), ([True, False], True), ([False, True], True)]
)
def test_pages_have_room_where_a_layer_may_use_it(models, monkeypatch, exact, padded):
    """Models all of whose layers are exact, as those with attention sinks, keep their whole cache."""
    from vllm.config import set_current_vllm_config

    from vllm_mac import cpu

    monkeypatch.setattr(index_pages, "_served", not padded), monkeypatch.setattr(index_pages, "_last", None)
    vllm_config = config_of(models("llama"), "index")
    context = vllm_config.compilation_config.static_forward_context
    with set_current_vllm_config(vllm_config):
        for i, soft in enumerate(exact):
            impl = cpu.MacCPUImpl(8, 32, 32**-0.5, 2, None, None, "auto", logits_soft_cap=30.0 if soft else None)
            assert (impl.mac.exact is not None) == soft
            context[f"layer {i}"] = SimpleNamespace(impl=impl)
        spec = FullAttentionSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        assert (index_pages.with_index(spec, 16).page_size_padded is not None) == padded
