"""On a GPU, with `rule: index` and an FP8 KV cache: what is written, and what is decoded, in full CUDA graphs too.

python -m pytest tests/test_fp8_gpu.py -m gpu -s
"""

from contextlib import contextmanager

import pytest
import torch

from support import engine as harness
from support.engine import Add
from support.index_engine import check_pages, counts, layers, watched
from support.indexed import Batch, Case
from support.scenarios import text
from vllm_mac.kernels.encode import append
from vllm_mac.key_index import numbers
from vllm_mac.layers import index_rule

pytestmark = pytest.mark.gpu
NEW = 24
PROMPTS = {name: text(name, length) for name, length in {"a": 2100, "b": 1500, "c": 900}.items()}
CONFIG = {"rule": "index", "min_step_mib": 0, "min_context": 256, "band": 64, "tolerance": 0.0}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 3]}
KEY_SCALE, VALUE_SCALE = 0.11, 0.07


@contextmanager
def engine(model, backend: str, eager: bool, dtype: str):
    """An engine with an FP8 cache, and scales as of a checkpoint."""
    mac = {"additional_config": {"mac": CONFIG}} if backend == "MAC" else {}
    graphs = {} if eager else {"compilation_config": GRAPHS}
    with harness.engine(
        model, "v2", backend, chunk=4096, prefix_caching=True, max_model_len=4096, dtype=dtype, block_size=64,
        memory=256 << 20, enforce_eager=eager, kv_cache_dtype="fp8", async_scheduling=False, **mac, **graphs,
    ) as llm:  # fmt: skip
        context = harness.worker(llm).vllm_config.compilation_config.static_forward_context
        for attention in context.values():
            attention._k_scale.fill_(KEY_SCALE), attention._v_scale.fill_(VALUE_SCALE)
            attention._k_scale_float, attention._v_scale_float = KEY_SCALE, VALUE_SCALE
        yield llm


def events() -> list[Add]:
    return [Add(4 * i, name, prompt, NEW) for i, (name, prompt) in enumerate(PROMPTS.items())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_append_writes_what_vllm_writes(dtype):
    """Bit for bit, also what FP8 does not reach, Inf and NaN."""
    import vllm._custom_ops  # noqa: F401, loads vLLM's kernels

    case = Case(scales=(0.37, 3.3), dtype=dtype, d=128)
    batch, theirs = Batch(case), Batch(case)
    pages = torch.arange(1, len(batch.kv), device="cuda")
    slots = pages * case.page + pages % case.page
    draw = torch.Generator("cuda").manual_seed(0)
    both = torch.randn(len(slots), case.kv_heads, 2 * case.d, generator=draw, device="cuda") * 100
    both[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    both = both.to(dtype)
    key, value = (x.contiguous() for x in both.chunk(2, -1))  # vLLM's kernel takes the heads of a token to be packed
    append(key, value, slots, batch.kv, batch.layout, batch.maps, pdl=True)
    caches = theirs.kv.view(torch.uint8).transpose(1, 2).split(case.d, -1)
    scales = theirs.maps.scales
    torch.ops._C_cache_ops.reshape_and_cache_flash(key, value, *caches, slots, "fp8", scales.key, scales.value)
    assert torch.equal(batch.kv.view(torch.uint8), theirs.kv.view(torch.uint8))
    assert (batch.kv.float().abs() == 448).any() and batch.kv.float()[1, 0, 1, 2].isnan()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_step_is_the_rule_s(byte_model, dtype):
    """With tolerance 0, where no choice is left to rounding; graphs give the tokens of eager steps."""
    with engine(byte_model, "MAC", True, dtype) as llm:
        with watched() as watch:
            run = harness.run_schedule(llm, events())
        assert all(len(tokens) == NEW for tokens in run.tokens.values()) and watch.steps > NEW
        assert counts(llm)["HIT"] > 0 and all(layer.fp8 and layer.index.maps.ready.item() for layer in layers(llm))
        # Weights are float16 and the output is in the model's dtype: half a step each, twice for sums of float32.
        eps = torch.finfo(getattr(torch, dtype)).eps
        print(f"\n{dtype}: {watch.steps} steps of layers, at most {watch.worst:.2e} off")
        assert watch.worst <= 2 * (2**-11 + eps / 2)
        assert all(index_rule(layer).tolerance == 0 for layer in layers(llm)) and check_pages(llm) > 50
    with engine(byte_model, "MAC", False, dtype) as llm:
        graphs = harness.run_schedule(llm, events())
        assert graphs.tokens == run.tokens
    with engine(byte_model, "FLASHINFER", True, dtype) as llm:
        exact = harness.run_schedule(llm, events())
    # The first token is prefill's, which both run alike; the next ones part where rounding to FP8 does.
    assert all(exact.tokens[name][0] == tokens[0] for name, tokens in run.tokens.items())
    same = [sum(a == b for a, b in zip(exact.tokens[name], tokens, strict=True)) for name, tokens in run.tokens.items()]
    print(f"\n{dtype}: tokens of {NEW} as FLASHINFER's: {same}")


def test_the_cache_is_bytes_to_vllm(byte_model):
    with engine(byte_model, "MAC", True, "bfloat16") as llm:
        layer = layers(llm)[0]
        assert layer.attention.kv_cache.dtype == torch.uint8
        assert layer.cache.data_ptr() == numbers(layer.attention.kv_cache).data_ptr()
        scales = layer.index.maps.scales
        assert scales.key is layer.attention._k_scale and scales.key.device.type == "cuda"
