"""With `rule: index`, what users combine with long contexts gives what vLLM's own attention gives.

At tolerance 0 tokens are equal. With another tolerance each page's index is that of its keys, whatever happened.
"""

import json
import re

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from support import engine as harness
from support.engine import Abort, Add, Call, Limits, Preempt
from support.index_engine import CONFIG, check_pages, counts, forget, layers, rest, set_tolerance
from support.index_shadow import index_shadow
from support.scenarios import text

pytestmark = pytest.mark.cpu
NEW = 24
SHARED = text("shared", 160)
PROMPTS = {name: SHARED + text(name, length) for name, length in {"a": 180, "b": 70, "c": 121}.items()}
# On CPUs vLLM gives requests without an adapter the last slot's, so there is one more slot than adapters.
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
OPTIONS = {"prefix_caching": True, "chunk": 1024, "max_logprobs": 10, **LORA}
# V2 draws other random numbers, and its kernel for grammars does not run in Triton's interpreter.
OF_V1 = ("several", "digits", "digits, lora")
DIGITS = r"[0-9]{24}"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter of the tiny Llama's attention, large enough to change what it says."""
    from safetensors.torch import save_file

    path, draw = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(0)
    shapes, rank, weights = (
        {"q_proj": (256, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 256)},
        8,
        {},
    )
    for layer in range(2):
        for name, (rows, columns) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) * columns**-0.5
            weights[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) * rank**-0.5
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [*shapes], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest("tiny", 1, str(path))


def mixed(llm, adapter, runner: str) -> dict:
    """One batch of requests that ask for different things; of each, what vLLM says."""
    ask = lambda **what: SamplingParams(**{"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True} | what)
    digits = StructuredOutputsParams(regex=DIGITS)
    asked = {
        "plain": ("a", ask(), None),
        "lora": ("a", ask(), adapter),
        "several": ("b", ask(n=3, temperature=1.0, seed=7), None),
        "digits": ("b", ask(structured_outputs=digits), None),
        "digits, lora": ("c", ask(structured_outputs=digits), adapter),
    }
    asked = {name: what for name, what in asked.items() if runner == "v1" or name not in OF_V1}
    prompts = [{"prompt_token_ids": PROMPTS[name]} for name, *_ in asked.values()]
    params, adapters = [row[1] for row in asked.values()], [row[2] for row in asked.values()]
    return dict(zip(asked, llm.generate(prompts, params, lora_request=adapters, use_tqdm=False), strict=True))


def tokens(outputs: dict) -> dict:
    return {name: [list(one.token_ids) for one in output.outputs] for name, output in outputs.items()}


def beams(llm) -> list:
    found = llm.beam_search(
        [{"prompt_token_ids": PROMPTS["b"]}, {"prompt_token_ids": PROMPTS["c"]}],
        BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True),
    )
    return [[list(sequence.tokens) for sequence in one.sequences] for one in found]


def disturbed() -> list:
    """Requests while which the scheduler pauses, caches are reset, weights are loaded again, and clients leave."""
    core = lambda llm: llm.llm_engine.engine_core.engine_core
    adds = [Add(4 * i, name, prompt, 40) for i, (name, prompt) in enumerate(PROMPTS.items())]
    reload = lambda llm: llm.collective_rpc("reload_weights")
    return [
        *adds,
        Add(3, "leaves", text("leaves", 200), 40),
        Call(12, lambda llm: core(llm).pause_scheduler("keep", clear_cache=False)),
        Call(14, lambda llm: core(llm).resume_scheduler()),
        Abort(16, "leaves"),
        Call(18, lambda llm: core(llm).pause_scheduler("keep", clear_cache=True)),
        Call(20, lambda llm: core(llm).resume_scheduler()),
        Call(26, reload),
        Preempt(30),
        Add(31, "again", PROMPTS["a"], 40),
    ]


@pytest.fixture(scope="module")
def exact(model, adapter):
    """What vLLM's own backend says."""
    with harness.engine(model, **OPTIONS) as llm:
        said = mixed(llm, adapter, "v1")
        run = harness.run_schedule(llm, [event for event in disturbed() if isinstance(event, Add)])
        return said, beams(llm), run.tokens


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_features_are_exact_at_tolerance_nought(model, adapter, exact, runner):
    said, beamed, alone = exact
    assert tokens(said)["lora"] != tokens(said)["plain"] and len(set(map(tuple, tokens(said)["several"]))) == 3
    config = {"mac": CONFIG | {"tolerance": 0.0}}
    with harness.engine(model, runner, "MAC", config, **OPTIONS) as llm:
        found = mixed(llm, adapter, runner)
        assert counts(llm)["HIT"] > 0 and counts(llm)["SKIPPED"] == 0
        expected = {name: of for name, of in tokens(said).items() if name in found}
        assert tokens(found) == expected
        assert tokens(mixed(llm, adapter, runner)) == expected  # whose prompts are in the prefix cache now
        assert beams(llm) == beamed
        run = harness.run_schedule(llm, disturbed(), Limits(chunk=100))
        assert run.tokens == {name: alone[name][: len(run.tokens[name])] for name in alone}
        assert 0 < run.aborted["leaves"] < 40 and run.preempted["a"] > 1
        small = harness.run_schedule(llm, [event for event in disturbed() if isinstance(event, Add)], Limits(blocks=22))
        assert small.preempted and small.tokens == alone

        set_tolerance(llm, 1.0)
        forget(llm)
        near = mixed(llm, adapter, runner)
        assert runner == "v2" or re.fullmatch(DIGITS, bytes(near["digits"].outputs[0].token_ids).decode())
        assert check_pages(llm) > 20 and counts(llm)["SKIPPED"] > 0
        beams(llm)
        check_pages(llm)
        with index_shadow(llm) as watch:
            harness.run_schedule(llm, disturbed(), Limits(chunk=100))
        assert check_pages(llm) > 10
        assert watch.worst < 1e-4 and watch.looked > 50

        # Other weights have other keys, so the next long prompt teaches the maps anew.
        rest(llm)
        group, maps = layers(llm)[0].group, layers(llm)[0].index.maps
        before, same = maps.to_key.clone(), [Add(0, "same", text("same", group.lessons.longest), 2)]
        harness.run_schedule(llm, same)
        assert torch.equal(maps.to_key, before)
        llm.collective_rpc("reload_weights")
        harness.run_schedule(llm, same)
        assert not torch.equal(maps.to_key, before) and check_pages(llm) > 5
