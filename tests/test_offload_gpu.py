"""On a GPU, with `rule: index`: what vLLM's own CPU offload loads is indexed anew, in full CUDA graphs too.

python -m pytest tests/test_offload_gpu.py -m gpu
"""

import pytest
import torch

from support import engine as harness
from support.engine import Add
from support.index_engine import check_pages, counts
from support.scenarios import text

pytestmark = pytest.mark.gpu
NEW = 24
PROMPTS = {name: text(name, length) for name, length in {"a": 2100, "b": 1500, "c": 900}.items()}
CONFIG = {"rule": "index", "min_step_mib": 0, "min_context": 256, "band": 64, "tolerance": 1.0}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


def events() -> list[Add]:
    return [Add(4 * i, name, prompt, NEW) for i, (name, prompt) in enumerate(PROMPTS.items())]


@pytest.fixture
def unpinned(monkeypatch):
    """vLLM's simple offload leaves its memory page-locked, and a later engine of this process may get the same addresses."""
    from vllm.v1.simple_kv_offload import worker

    pin, pinned = worker.pin_tensor, []
    monkeypatch.setattr(worker, "pin_tensor", lambda tensor: (pin(tensor), pinned.append(tensor)))
    yield
    for tensor in pinned:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def settle(llm) -> None:
    """Let vLLM free the blocks that it has stored: it learns of a copy's end in a later step."""
    from vllm import SamplingParams

    for _ in range(50):
        if llm.reset_prefix_cache():
            return
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
    raise RuntimeError("vLLM holds blocks that it has stored")


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("simple", [False, True])
def test_what_native_offload_loads_is_indexed(byte_model, monkeypatch, unpinned, simple, eager):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", str(int(simple)))
    graphs = {} if eager else {"compilation_config": GRAPHS}
    with harness.engine(
        byte_model, "v2", "MAC", {"mac": CONFIG}, chunk=4096, prefix_caching=True, max_model_len=4096, dtype="bfloat16",
        block_size=64, memory=256 << 20, enforce_eager=eager, kv_offloading_size=1.0, **graphs,
    ) as llm:  # fmt: skip
        harness.run_schedule(llm, events())
        settle(llm)
        # The GPU's prefix cache is empty now, and its pages get the index of other keys.
        harness.run_schedule(llm, [Add(0, "teacher", text("teacher", 3000), 2)])
        settle(llm)
        before = counts(llm)
        run = harness.run_schedule(llm, events())
        assert all(run.cached[name] > 0.8 * len(prompt) for name, prompt in PROMPTS.items()), run.cached
        assert counts(llm)["SKIPPED"] > before["SKIPPED"] and counts(llm)["HIT"] > before["HIT"]
        assert check_pages(llm) > 50
