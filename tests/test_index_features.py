"""What users combine with long contexts gives what vLLM's own attention gives, by index and with `rule: match`.

At tolerance 0 tokens are equal. With another tolerance each step is the rule's (`index_shadow`), and each page's index
that of its keys, whatever happened.
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
from support.index_engine import CONFIG, OUTCOMES, check_pages, counts, forget, layers, rest, set_tolerance
from support.index_shadow import Watch, index_shadow
from support.scenarios import text
from vllm_mac.counters import Count
from vllm_mac.layers import mac_layers

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
MATCH = {"mac": {"rule": "match", "threshold": 1.0, "window": 32, "band": 16, "min_context": 64}}


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


def check(llm, watch: Watch, looked: int) -> None:
    """That every step since `forget` was the rule's, and counted as what it was."""
    found = counts(llm)
    assert watch.worst < 1e-4 and watch.looked > looked and watch.undecided < watch.rows / 10
    assert sum(found[outcome] for outcome in OUTCOMES) == watch.tokens * layers(llm)[0].num_heads
    assert found["SKIPPED"] > 0 and (watch.undecided or found["READ"] == watch.read)


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
        with index_shadow(llm) as watch:
            near = mixed(llm, adapter, runner)
        check(llm, watch, 80)
        assert runner == "v2" or re.fullmatch(DIGITS, bytes(near["digits"].outputs[0].token_ids).decode())
        assert check_pages(llm) > 20
        forget(llm)
        with index_shadow(llm) as watch:
            beams(llm)  # each step is a prefill of what is not in the prefix cache, at times of one token
        check(llm, watch, 2)
        assert check_pages(llm) > 10 and watch.chunks > 50
        forget(llm)
        with index_shadow(llm) as watch:
            harness.run_schedule(llm, disturbed(), Limits(chunk=100))
        check(llm, watch, 50)
        assert check_pages(llm) > 10

        # Other weights have other keys, so the next long prompt teaches the maps anew.
        rest(llm)
        group, maps = layers(llm)[0].group, layers(llm)[0].index.maps
        before, same = maps.to_key.clone(), [Add(0, "same", text("same", group.lessons.longest), 2)]
        harness.run_schedule(llm, same)
        assert torch.equal(maps.to_key, before)
        llm.collective_rpc("reload_weights")
        harness.run_schedule(llm, same)
        assert not torch.equal(maps.to_key, before) and check_pages(llm) > 5


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_features_are_exact_with_the_other_rule_at_threshold_one(model, adapter, exact, runner):
    said, beamed, alone = exact
    with harness.engine(model, runner, "MAC", MATCH, **OPTIONS) as llm:
        found = mixed(llm, adapter, runner)
        assert tokens(found) == {name: of for name, of in tokens(said).items() if name in found}
        assert beams(llm) == beamed
        run = harness.run_schedule(llm, disturbed(), Limits(chunk=100))
        assert run.tokens == {name: alone[name][: len(run.tokens[name])] for name in alone}
        found = sum(layer.counts for layer in mac_layers(harness.worker(llm).vllm_config)).tolist()
        assert run.preempted["a"] > 1 and found[Count.MISS] > 1000 and found[Count.HIT] == 0


def beside_others(llm) -> tuple[torch.Tensor, list]:
    """The log-probabilities of a prompt that is prefilled in chunks while two others decode, and what all three say."""
    ask = lambda **what: SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, **what)
    prompts = [{"prompt_token_ids": PROMPTS[name]} for name in "bca"]
    said = llm.generate(prompts, [ask(), ask(), ask(prompt_logprobs=1)], use_tqdm=False)
    rows = zip(PROMPTS["a"][1:], said[2].prompt_logprobs[1:], strict=True)
    return torch.tensor([row[token].logprob for token, row in rows]), [list(one.outputs[0].token_ids) for one in said]


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_prompt_logprobs_beside_requests_that_decode(model, runner):
    """Without LoRA, with which vLLM fails. A prompt is read exactly, whatever the tolerance."""
    options = {"prefix_caching": True, "chunk": 100}
    with harness.engine(model, runner, **options) as llm:
        exact, tokens_of = beside_others(llm)
    with harness.engine(model, runner, "MAC", MATCH, **options) as llm:
        found, same = beside_others(llm)
        assert same == tokens_of and (found - exact).abs().max() < 4e-4
    with harness.engine(model, runner, "MAC", {"mac": CONFIG | {"tolerance": 0.0}}, **options) as llm:
        for _ in range(2):  # at the second time the others' prompts are in the prefix cache
            found, same = beside_others(llm)
            assert same == tokens_of and (found - exact).abs().max() < 4e-4
        assert counts(llm)["HIT"] > 0 and counts(llm)["SKIPPED"] == 0
        set_tolerance(llm, 1.0)
        forget(llm)
        llm.reset_prefix_cache()
        with index_shadow(llm) as watch:
            found, _ = beside_others(llm)
        check(llm, watch, 80)
        assert (found - exact).abs().max() < 4e-4 and watch.chunks > 10
