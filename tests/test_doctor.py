"""`vllm-mac doctor`: what it says of an installation, of a model's layers and of the gain."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file
from typer.testing import CliRunner

from support import ROOT
from support.engine import ENVIRONMENT, engine, worker
from vllm_mac.capabilities import TO_MATCH
from vllm_mac.tools import cli
from vllm_mac.tools.doctor import checks, show, versions
from vllm_mac.tools.doctor.checks import OK, PROBLEM, UNCHECKED, WARNING, Finding
from vllm_mac.tools.doctor.estimate import LAG, RATE, READ, estimate, measured_bandwidth
from vllm_mac.tools.doctor.model import Examined, IndexRoom, Layer, examine, groups

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HERE = {
    "gpu": None, "vllm": "0.32.0+cpu", "torch": "2.13.0", "triton": None, "flashinfer": None, "vllm_mac": "0.1.0",
    "python": "3.11.7", "commit": "abc",
}  # fmt: skip
SMALL = {"band": 16, "min_context": 64}  # by index
RINGS = SMALL | {"rule": "match", "window": 32}


def test_versions_are_those_that_pip_is_told():
    assert SpecifierSet(versions.spelled(versions.PYTHON)) == SpecifierSet(PROJECT["requires-python"])
    (vllm,) = (r for r in PROJECT["optional-dependencies"]["cuda"] if r.startswith("vllm"))
    assert SpecifierSet(versions.spelled(versions.VLLM)) == SpecifierSet(vllm.removeprefix("vllm"))


@pytest.mark.parametrize(
    "version, fits",
    [
        ("0.31.9", False),
        ("0.32", True),
        ("0.32.0+cpu", True),
        ("0.33.7", True),
        ("0.34.0", False),
        ("0.34rc1", False),
        ("?", False),
    ],
)
def test_versions_within(version, fits):
    assert versions.within(version, versions.VLLM) == fits


@pytest.mark.parametrize(
    "changes, mark, text",
    [
        ({}, OK, None),
        ({"python": "3.10.2"}, PROBLEM, "Python 3.10.2"),
        ({"vllm": None}, PROBLEM, "vLLM is not installed"),
        ({"vllm": "0.31.1"}, PROBLEM, "vLLM 0.31.1 is not supported"),
        ({"torch": None}, PROBLEM, "PyTorch is not installed"),
        ({"gpu": "NVIDIA H200", "triton": "3.6.0", "flashinfer": "0.7.0"}, OK, None),
        (
            {"gpu": "NVIDIA H200", "triton": "3.7.1", "flashinfer": "0.7.0"},
            WARNING,
            "Triton 3.7.1 is untested",
        ),
        (
            {"gpu": "NVIDIA H200", "triton": "3.8.0"},
            PROBLEM,
            "FlashInfer is not installed, and prefill on GPUs needs it",
        ),
    ],
)
def test_versions_are_judged(changes, mark, text):
    found = [one for one in checks.of_versions(HERE | changes) if one.mark != OK]
    assert [(one.mark, one.text) for one in found] == ([] if text is None else [(mark, text)])
    assert all(one.cure for one in found)


@pytest.mark.parametrize(
    "capability, by_index, mark",
    [
        ((7, 5), True, PROBLEM), ((8, 0), True, OK), ((9, 0), True, OK), ((10, 0), True, PROBLEM),
        ((10, 0), False, OK), ((7, 5), False, PROBLEM),
    ],
)  # fmt: skip
def test_devices_are_judged(monkeypatch, capability, by_index, mark):
    facts = SimpleNamespace(name="A GPU", major=capability[0], minor=capability[1], total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    (found,) = checks.of_devices(HERE | {"gpu": "A GPU"}, by_index)
    assert found.mark == mark and found.text.startswith(f"GPU 0: A GPU, sm{capability[0]}{capability[1]}, 80 GiB")
    assert found.cure == {(7, 5): "use another GPU", (10, 0): TO_MATCH if by_index else None}.get(capability)


@pytest.mark.cpu
def test_a_gpu_that_pytorch_cannot_use():
    (found,) = checks.of_devices(HERE | {"gpu": "NVIDIA L4"}, True)
    assert found.mark == PROBLEM and "NVIDIA L4" in found.text
    (found,) = checks.of_devices(HERE, True)
    assert found.mark == OK and found.text.startswith("no GPU: ")


@pytest.mark.parametrize("marks, status", [([OK, UNCHECKED], 0), ([OK, WARNING], 1), ([WARNING, PROBLEM, OK], 2)])
def test_exit_status(marks, status):
    assert show.status([Finding("x", mark, "y") for mark in marks]) == status


# Of each family: what an engine's layers are.
FAMILIES = {
    "llama": [None, None],
    "gemma3": ["sliding_window", None] * 2,
    "gptoss": ["sliding_window", "attention_sinks"],
    "lfm2": [None],
}


@pytest.mark.cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_rings_are_an_engine_s(models, family):
    """The doctor's layers, bytes and number of rings are those that an engine settles and allocates."""
    from vllm_mac.layers import mac_layers

    mac = RINGS | {"ring_memory_gib": 0.002}
    options = {"max_model_len": 512, "dtype": "float32"}
    model = models(family)
    seen = examine(str(model), mac, options, max_num_seqs=8)
    assert seen.refused is None
    ours = [layer for layer in seen.layers if layer.state != "other"]
    with engine(model, "v1", "MAC", {"mac": mac}, max_model_len=512) as llm:
        vllm_config = worker(llm).vllm_config
        layers = mac_layers(vllm_config)
        assert [layer.exact for layer in layers] == FAMILIES[family]
        assert [(x.name, x.reason, x.state == "MAC", x.heads) for x in ours] == [
            (x.name, x.exact, x.served, x.num_heads) for x in layers
        ]
        context = vllm_config.compilation_config.static_forward_context
        assert [x.kv_bytes for x in ours] == [2 * context[x.name].num_kv_heads * x.head_size * 4 for x in ours]
        stores = [layer.state.store for layer in layers if layer.served]
        tensors = [t for store in stores for t in (store.query, store.out, store.lse, store.chain)]
        rings = {len(store.query) for store in stores}
        if stores:
            one, fitting, wanted = seen.ring
            assert rings == {min(fitting, wanted)} and wanted == 8
            assert sum(t.nbytes for t in tensors) == one * min(fitting, wanted)
        else:
            assert seen.ring is None
        assert seen.max_model_len == 512 and seen.kv_cache_dtype == "auto (float32)"
    # Many rows read all but the embedding, which has a head beside it; vLLM pads the head to a multiple of 64 rows.
    stored = load_file(model / "model.safetensors")
    weights = sum(tensor.nbytes for name, tensor in stored.items() if "embed" not in name)
    assert "lm_head.weight" in stored and 0 <= seen.weight_bytes(10**6) - weights < 64 * 128 * 4


@pytest.mark.cpu
@pytest.mark.parametrize("family, options", [("llama", {}), ("gemma3", {}), ("gemma3", {"block_size": 64})])
def test_the_room_for_an_index_is_an_engine_s(models, family, options):
    """Pages, directions and the loss of room, as an engine makes them where it chooses the page too."""
    from vllm_mac.layers import mac_layers

    mac, options = SMALL | {"index_size": 32}, {"max_model_len": 512, "dtype": "float32"} | options
    seen = examine(str(models(family)), mac, options, max_num_seqs=8)
    assert seen.refused is None and seen.ring is None
    with engine(
        models(family), "v1", "MAC", {"mac": mac}, **{"block_size": None, "max_model_len": 512, "rule": None} | options
    ) as llm:
        layers = mac_layers(worker(llm).vllm_config)
        assert [layer.exact for layer in layers] == [layer.reason for layer in seen.layers] == FAMILIES[family]
        served = [(layer, told) for layer, told in zip(layers, seen.layers, strict=True) if layer.served]
        assert {layer.index.maps.shift.shape[1] for layer, _ in served} == {32} and seen.index.directions == (32,)
        config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        specs = [group.kv_cache_spec for group in config.kv_cache_groups for _ in group.layer_names]
        assert {spec.block_size for spec in specs} == {seen.index.page}
        assert sum(spec.page_size_bytes for spec in specs) == seen.index.padded
        assert sum(spec.unpadded_page_size_bytes for spec in specs) == seen.index.plain
        # Of a page: half a byte a direction and token, and the mean of its values.
        page = seen.index.page
        heads = served[0][0].num_kv_heads
        assert {told.index_bytes * page for _, told in served} == {heads * (32 // 2 * page + 32 * 4)}
    (found,) = show.of_index(seen)
    assert found.mark == OK and f"in 32 directions, in pages of {page} tokens" in found.text
    assert f"{1 - seen.index.plain / seen.index.padded:.1%} fewer tokens" in found.text


@pytest.mark.cpu
@pytest.mark.parametrize(
    "family, mac, options, reason",
    [
        ("deepseek", {}, {}, "MLA"),
        ("llama", {"windw": 3}, {}, "did you mean 'window'?"),
        ("llama", {}, {"kv_cache_dtype": "fp8"}, "give --kv-cache-dtype bfloat16"),
        (
            "llama",
            {"rule": "match", "ring_memory_gib": 0.0001},
            {},
            "ring_memory_gib: received 0.0001, which holds no ring",
        ),
        ("llama", {"index_size": 48}, {}, "index_size: received 48, more than the head size 32"),
    ],
)
def test_what_an_engine_would_refuse(models, family, mac, options, reason):
    seen = examine(str(models(family)), mac, {"max_model_len": 512} | options)
    assert reason in seen.refused and "MacConfigError" in seen.refused
    (found,) = show.of_layers(seen)
    assert found.mark == PROBLEM and reason in found.text


@pytest.mark.cpu
def test_a_rotation_that_cannot_be_undone_is_explained(models, tmp_path):
    """LongRoPE, of which vLLM's module has no plain cache: what the engine's log says of it, and no estimate."""
    config = json.loads((models("phi3") / "config.json").read_text())
    config.pop("rope_parameters", None)
    factors = {"long_factor": [1.5] * 16, "short_factor": [1.0] * 16, "original_max_position_embeddings": 4096}
    config |= {
        "rope_scaling": {"type": "longrope", **factors},
        "rope_theta": 1e4,
        "original_max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli.app, ["doctor", str(tmp_path), "--mac", '{"rule": "match"}'], env={"COLUMNS": "120"})
    assert done.exit_code == 1, done.output
    assert "layers 0-1: exact (rotary), 2 of 2" in done.output and "has no cos_sin_cache" in done.output
    assert "MAC serves no layer of this model" in done.output and "estimate" not in done.output


@pytest.mark.cpu
def test_what_cannot_be_built_here_is_no_refusal(models, monkeypatch):
    from vllm.model_executor.model_loader import utils

    monkeypatch.setattr(utils, "initialize_model", lambda config: torch.ones(1, device="meta").item())
    seen = examine(str(models("llama")), {}, {"max_model_len": 512})
    assert seen.refused is None and seen.unbuilt.startswith("RuntimeError: ")
    (found,) = show.of_layers(seen)
    assert found.mark == WARNING and found.text.startswith("could not be built here")


@pytest.mark.cpu
def test_a_large_model_takes_no_memory_of_its_own_size(models, tmp_path):
    """Of 140 GB in bfloat16, with 64 heads that four workers share."""
    config = json.loads((models("llama") / "config.json").read_text()) | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    seen = examine(str(tmp_path), {"rule": "match"}, {"tensor_parallel_size": 4}, max_num_seqs=16)
    assert seen.refused is None and groups(seen.layers) == [("MAC", None, "layers 0-79", 80)]
    one = 80 * 16 * 512 * (2 * 128 * 2 + 8)  # layers, heads, window, query and output in bfloat16, LSE and chain
    assert seen.ring == (one, (4 << 30) // one, 16)
    each = 8192 * 8192 * 2 + 8192 * 1024 * 2 + 3 * 8192 * 28672  # query and output, keys and values, the MLP
    matrices = 2 * (80 * each + 8192 * 128256) / 4
    assert matrices < seen.weight_bytes(1) < 1.001 * matrices
    (found,) = show.of_rings(seen)
    assert (
        found.mark == WARNING
        and "4 of 16 would decode exactly" in found.text
        and "raise ring_memory_gib to 5.1" in found.cure
    )


@pytest.mark.parametrize("dtype, warned", [("fp8", True), ("fp8_e4m3", True), ("auto (bfloat16)", False)])
def test_large_keys_in_fp8_are_warned_of(dtype, warned):
    found = show.of_layers(replace(model_of(), kv_cache_dtype=dtype))
    assert [one.mark for one in found if "Qwen2.5" in one.text] == ["warning"] * warned


def test_layers_in_words():
    layers = [
        Layer(f"l{i}", i, "MAC" if i not in (2, 7) else "exact", None if i not in (2, 7) else "rotary", 1, 1, 1, None)
        for i in range(8)
    ]
    assert groups(layers) == [("MAC", None, "layers 0-1, 3-6", 6), ("exact", "rotary", "layers 2, 7", 2)]
    assert groups(layers[:1]) == [("MAC", None, "layer 0", 1)]


def model_of(**changes) -> Examined:
    """Two layers that MAC serves and one of sliding windows; 10 GB of weights, 16 experts of which two are chosen."""
    served = [Layer(f"l{i}", i, "MAC", None, 8, 64, 1000, None) for i in range(2)]
    window = Layer("l2", 2, "exact", "sliding_window", 8, 64, 1000, 128)
    from vllm_mac.config import resolve

    return Examined(
        layers=[*served, window], ring=(1, 4, 8), dense_bytes=10**10, experts=[(16 * 10**9, 1 / 8)], ring_element=2,
        config=resolve({"rule": "match", "window": 512, "band": 256}), max_model_len=10**6, **changes,
    )  # fmt: skip


def test_the_estimate_adds_up():
    row = estimate(model_of(), context=100_000, batch=1, hit_rate=0.75, bandwidth=1e12)
    assert row.weight_bytes == pytest.approx(10e9 + 2e9)
    assert row.exact_kv_bytes == 1000 * (2 * 100_000 + 128)
    assert row.mac_kv_bytes == pytest.approx(1000 * (2 * (0.25 * 100_000 + 0.75 * (256 + LAG)) + 128))
    assert row.ring_bytes == 2 * 8 * 512 * 64 * 2
    assert row.exact_ms == pytest.approx((12e9 + row.exact_kv_bytes) / 1e9)
    assert row.mac_ms == pytest.approx((12e9 + row.mac_kv_bytes + row.ring_bytes) / 1e9)
    assert row.gain == pytest.approx(row.exact_ms / row.mac_ms) and not row.pays  # 12.2 over 12.1


def test_rows_without_a_ring_and_short_contexts_are_exact():
    row = estimate(model_of(), 100_000, 6, 1.0, 1e12)
    assert row.ringed == 4
    assert row.mac_kv_bytes == pytest.approx(4 * 1000 * (2 * (256 + LAG) + 128) + 2 * row.exact_kv_bytes / 6)
    assert row.weight_bytes == pytest.approx(10e9 + 16e9 * (1 - (7 / 8) ** 6))
    short = estimate(model_of(), 2047, 6, 1.0, 1e12)
    assert (short.ringed, short.ring_bytes, short.mac_kv_bytes, short.gain) == (0, 0, short.exact_kv_bytes, 1.0)
    assert estimate(model_of(), 100_000, 6, 0.0, 1e12).gain < 1


def indexed(**keys) -> Examined:
    """The model of `model_of` with an index of 60 bytes a token and layer. keys: of the configuration."""
    model = model_of()
    layers = [replace(layer, index_bytes=60.0 * (layer.state == "MAC")) for layer in model.layers]
    config = model.config.model_copy(update={"rule": "index", "min_step_mib": 0} | keys)
    return replace(model, layers=layers, ring=None, index=IndexRoom((64,), 64, 100, 107), config=config)


def test_the_estimate_with_an_index_adds_up():
    row = estimate(indexed(), context=100_000, batch=8, hit_rate=0.0, bandwidth=1e12)
    assert (row.hit_rate, row.ringed, row.ring_bytes) == (None, 0, 0)
    assert row.exact_kv_bytes == 8 * 1000 * (2 * 100_000 + 128)
    assert row.mac_kv_bytes == pytest.approx(8 * 1000 * (2 * READ * 100_000 + 128))
    assert row.index_bytes == pytest.approx(8 * 2 * 60 * 100_000)
    others = 8 * 1000 * 128  # of the layer with a window
    looked_up = row.mac_kv_bytes - others + row.index_bytes
    assert row.mac_ms == pytest.approx((row.weight_bytes + others + looked_up / RATE) / 1e9)
    near = estimate(indexed(band=512), 2048, 1, 0.0, 1e12)
    assert near.mac_kv_bytes == pytest.approx(1000 * (2 * 512 + 128))  # the band alone is more than READ of them
    short = estimate(indexed(), 2047, 8, 0.0, 1e12)
    assert (short.index_bytes, short.mac_kv_bytes, short.gain) == (0, short.exact_kv_bytes, 1.0)
    # 8 rows of 1,000 bytes a token and layer: 24 MiB are 3,146 tokens.
    small, enough = (estimate(indexed(min_step_mib=24), tokens, 8, 0.0, 1e12) for tokens in (3145, 3146))
    assert small.mac_kv_bytes == small.exact_kv_bytes and enough.mac_kv_bytes < enough.exact_kv_bytes


def test_what_an_index_costs_is_said():
    (found,) = show.of_index(indexed())
    assert found.mark == OK and "in 64 directions, in pages of 64 tokens: 120 bytes a token" in found.text
    assert "6.0% of their keys and values" in found.text and "holds 6.5% fewer tokens" in found.text
    assert show.of_index(model_of()) == [] and show.of_rings(indexed()) == []
    (no,) = show.of_estimates(indexed(), [estimate(indexed(), 2047, 1, 0.0, 1e12)], judged=True)
    assert no.mark == WARNING and "hit" not in no.text + no.cure


def test_it_says_when_mac_will_not_pay():
    rows = [estimate(model_of(), 10**6, 32, rate, 1e12) for rate in (0.0, 1.0)]
    no, yes = show.of_estimates(model_of(), rows, judged=True)
    assert no.mark == WARNING and "MAC will not pay" in no.text and "vllm_mac_heads_total" in no.cure
    assert yes.mark == OK and f"{rows[1].gain:.2f}x at best" in yes.text
    (cpu,) = show.of_estimates(model_of(), rows, judged=False)
    assert cpu.mark == UNCHECKED and "on CPUs MAC is slower" in cpu.text
    beyond, *_ = show.of_estimates(model_of(), [estimate(model_of(), 10**6 + 1, 1, 1.0, 1e12)], judged=True)
    assert beyond.mark == WARNING and "beyond max_model_len 1000000" in beyond.text


@pytest.mark.cpu
def test_a_bandwidth_is_measured():
    speed, how = measured_bandwidth()
    assert 1e8 < speed < 1e13 and "CPU" in how


@pytest.mark.cpu
def test_the_command(models, tmp_path):
    """All sections; what a section says comes from the same findings as JSON."""
    out = tmp_path / "report.json"
    command = [
        "doctor", str(models("gemma3")), "--context", "4096,8192", "--hit-rate", "0,1", "--bandwidth", "1000",
        "--mac", json.dumps(RINGS), "--max-num-seqs", "4", "--json", str(out),
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "120"})
    told = json.loads(out.read_text())
    assert done.exit_code == told["status"] == 1, done.output  # no gain without a hit
    assert "layers 0, 2: exact (sliding_window), 2 of 4" in done.output and "layers 1, 3: MAC, 2 of 4" in done.output
    assert list(dict.fromkeys(one["section"] for one in told["findings"])) == [
        "versions", "devices", "plugin", "model", "rings", "estimate",
    ]  # fmt: skip
    plugin = [(one["mark"], one["text"]) for one in told["findings"] if one["section"] == "plugin"]
    assert [mark for mark, _ in plugin] == [OK] * 5 + [UNCHECKED], plugin
    assert (OK, "MAC is known in a spawned process") in plugin
    assert [layer["reason"] for layer in told["model"]["layers"]] == ["sliding_window", None] * 2
    assert (told["model"]["rings_wanted"], told["model"]["name"]) == (4, command[1])
    assert [(row["context"], row["hit_rate"]) for row in told["estimates"]] == [
        (4096, 0.0),
        (4096, 1.0),
        (8192, 0.0),
        (8192, 1.0),
    ]
    assert told["bandwidth"] == {"bytes_per_second": 1e12, "how": "as given"}
    assert all(one["text"] in done.output for one in told["findings"])


@pytest.mark.cpu
def test_the_command_with_an_index(models, tmp_path):
    out = tmp_path / "report.json"
    command = [
        "doctor", str(models("gemma3")), "--context", "4096,8192", "--bandwidth", "1000", "--mac", json.dumps(SMALL),
        "--json", str(out),
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "120"})
    told = json.loads(out.read_text())
    assert [one["section"] for one in told["findings"] if one["section"] in ("rings", "index")] == ["index"], (
        done.output
    )
    assert [(row["context"], row["hit_rate"]) for row in told["estimates"]] == [(4096, None), (8192, None)]
    assert told["model"]["index"]["directions"] == [32] and "ring_bytes" not in told["model"]
    assert "at 50% of the bandwidth, as measured on one model" in done.output and "index GB" in done.output
    done = CliRunner().invoke(cli.app, [*command, "--hit-rate", "0.5"], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and "--hit-rate: received '0.5', which only rule: match has" in done.output


@pytest.mark.cpu
def test_a_plugin_that_is_left_out(models, tmp_path):
    out = tmp_path / "report.json"
    env = {**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": "other"}
    script = "import sys; from vllm_mac.tools.cli import main; sys.argv[0] = 'vllm-mac'; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", str(models("llama")), "--json", str(out)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 2, done.stderr
    found = {one["text"]: one for one in json.loads(out.read_text())["findings"] if one["mark"] != OK}
    assert found["VLLM_PLUGINS='other' leaves the plugin out"]["cure"] == "add mac to VLLM_PLUGINS, or unset it"
    assert found["vLLM does not know MAC once its plugins are loaded"]["mark"] == PROBLEM
    assert any(text.endswith("solve the plugin's problems first") for text in found)


@pytest.mark.parametrize(
    "arguments, option",
    [(["--hit-rate", "2"], "--hit-rate"), (["--context", "x"], "--context"), (["--mac", "{"], "--mac")],
)
def test_wrong_options_are_named(arguments, option):
    done = CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and option in done.output
