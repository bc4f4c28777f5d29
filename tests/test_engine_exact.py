"""Whole engines: with threshold 1.0 nothing matches, so MAC gives the tokens of exact attention.

One tiny model, and one with sliding-window layers, go through every scenario on Model Runner V1; every other one
through three, so that each scenario is another model's too. V2, whose kernels run in Triton's interpreter, takes the
scenarios whose schedules differ there. The reference is always V1 with vLLM's own CPU backend.

To check the harness itself: MAC_TEST_BACKEND= pytest tests/test_engine_exact.py
compares vLLM's backend with itself.
"""

import os
from contextlib import ExitStack

import pytest

from support.engine import Add, engine, first_divergence, mac_counters, run_schedule, worker
from support.scenarios import SCENARIOS, text
from support.tiny_models import DECODERS, write
from vllm_mac.layers import mac_layers

pytestmark = pytest.mark.cpu
BACKEND = os.environ.get("MAC_TEST_BACKEND", "MAC") or None
SMALL = {"threshold": 1.0, "window": 32, "band": 16, "min_context": 64}
CONFIG = {"mac": SMALL} if BACKEND else {}
HYBRID = ("gemma3",)
# V2 hands a preempted request over as a new one.
ON_V2 = {
    "llama": ("chunked17", "turns", "preempt", "preempt_answer", "mixed8"),
    "gemma3": ("chunked33", "prefix", "preempt"),
}
WITHOUT_CACHING = "chunked33", "preempt", "preempt_all", "identical"
# Two engines agree on logits to about 3e-5 here: a gap above this decides a token on any machine.
CLEAR = 2e-4


def cases():
    """(model, runner, prefix caching, scenario), sorted so that neighbours share an engine."""
    others = [model for model in DECODERS if model not in ("llama", *HYBRID)]
    for model in DECODERS:
        for runner, caching in (("v1", True), ("v1", False), ("v2", True)):
            for i, (name, scenario) in enumerate(SCENARIOS.items()):
                wanted = model == "llama" and name in WITHOUT_CACHING
                if runner == "v2":
                    wanted = name in ON_V2.get(model, ())
                elif caching:  # vLLM's default
                    wanted = model not in others or (i - others.index(model)) % 4 == 0
                if wanted and caching in scenario.caching and (scenario.hybrid or model not in HYBRID):
                    yield model, runner, caching, name


class Engines:
    """The one engine that is open; asking for another closes it. References are computed once."""

    def __init__(self, folder):
        self.folder, self.stack, self.references = folder, ExitStack(), {}
        self.key = self.llm = None

    def get(self, model, runner, caching, backend):
        if self.key != (model, runner, caching, backend):
            self.close()
            config = CONFIG if backend else {}
            self.llm = self.stack.enter_context(
                engine(write(model, self.folder), runner, backend, config, prefix_caching=caching)
            )
            self.key = (model, runner, caching, backend)
        return self.llm

    def reference(self, model, caching, name):
        """vLLM's own backend on `name`; a model's scenarios all run at once, on one engine."""
        if (model, caching, name) not in self.references:
            llm = self.get(model, "v1", caching, None)
            for other in {case[3] for case in cases() if case[0] == model and case[2] == caching}:
                scenario = SCENARIOS[other]
                self.references[model, caching, other] = run_schedule(llm, scenario.events, scenario.limits, logprobs=2)
        return self.references[model, caching, name]

    def close(self):
        self.key = self.llm = None
        self.stack.close()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    engines = Engines(tmp_path_factory.mktemp("models"))
    yield engines
    engines.close()


@pytest.mark.parametrize("model, runner, caching, name", list(cases()))
def test_tokens_equal_exact_attention(engines, model, runner, caching, name):
    scenario = SCENARIOS[name]
    expected = engines.reference(model, caching, name)
    assert not scenario.missed(expected), expected
    assert min(gap for gaps in expected.gaps.values() for gap in gaps) > CLEAR, "a tie decides nothing: new seed"
    try:
        llm = engines.get(model, runner, caching, BACKEND)
        before = mac_counters(llm) if BACKEND else None
        run = run_schedule(llm, scenario.events, scenario.limits)
        after = mac_counters(llm) if BACKEND else None
    except BaseException:
        engines.close()  # what an engine does after an error tells nothing
        raise
    assert not scenario.missed(run), run
    assert first_divergence(expected, run) is None
    if BACKEND:
        assert after["miss"] > before["miss"], "MAC never looked for a match"
        assert after["hit"] == 0


def test_layers_with_attention_sinks_are_exact(engines):
    """vLLM's backend for CPUs attends to sinks, so such layers are its own, and the model is not refused."""
    events = [Add(0, "a", text("a", 150), 8)]
    exact = run_schedule(engines.get("gptoss", "v1", True, None), events, logprobs=2)
    llm = engines.get("gptoss", "v1", True, "MAC")
    run = run_schedule(llm, events, logprobs=2)
    assert [layer.exact for layer in mac_layers(worker(llm).vllm_config)] == ["sliding_window", "attention_sinks"]
    assert run.tokens == exact.tokens and run.logprobs == exact.logprobs


def test_sequences_longer_than_the_rotary_cache(engines, monkeypatch):
    """vLLM goes on where its rotation ends, and so does MAC, all layers exact, instead of ending the engine."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    engines.close()
    model, found = write("llama", engines.folder), {}
    # At most 512 tokens: served. The same with room for more: not even a sequence of 512 is.
    for length in (512, 1024):
        mac, override = SMALL | {"threshold": 0.4}, {"max_position_embeddings": 512}
        with engine(model, "v1", "MAC", {"mac": mac}, max_model_len=length, hf_overrides=override) as llm:
            layers = mac_layers(worker(llm).vllm_config)
            served = [layer for layer in layers if layer.rotary]
            assert [len(layer.rotary.module.cos_sin_cache) for layer in served] == [512, 512] * (length == 512)
            run = run_schedule(llm, [Add(0, "a", [7 * i % 200 for i in range(length // 2)], length // 2 - 8)])
            found[length] = mac_counters(llm), {layer.exact for layer in layers}
            assert len(run.tokens["a"]) == length // 2 - 8
    (reused, reasons), (left, why) = found[512], found[1024]
    assert reused["hit"] > 0 and reasons == {None}
    assert left["hit"] == left["miss"] == 0 and why == {"rotary"}
