"""With `rule: index` no rotation is undone, so models are served whole that `rule: match` leaves exact.

Each goes through vLLM's own attention and through MAC's, once with the default tolerance and once with none. So does a
conversation of two turns. With the default tolerance every step is compared with the rule (`index_shadow`).
"""

from collections.abc import Iterable
from typing import ClassVar

import pytest
import torch
from byte_model import LOGIT_STD, OUTPUT_STD
from transformers import LlamaModel
from vllm import SamplingParams

from support import engine as harness
from support.engine import Add
from support.index_engine import CONFIG
from support.index_shadow import index_shadow
from support.scenarios import text
from vllm_mac import layers
from vllm_mac.counters import Count
from vllm_mac.layers import mac_layers

pytestmark = pytest.mark.cpu
LAYERS, SIZE, NEW = 2, 32, 24
LENGTHS = {"a": 400, "b": 300}
EVENTS = [Add(3 * i, name, text(name, length), NEW) for i, (name, length) in enumerate(LENGTHS.items())]
# A conversation, whose first turn is in the prefix cache at the second.
TURNS = [EVENTS[0], Add(NEW + 4, "on", lambda said: [*EVENTS[0].prompt, *said["a"], *text("on", 60)], NEW)]
# Both sides sum the same float32 products in other orders. A score is one of SIZE terms; it is 3 LOGIT_STD at most
# and enters an exponential, so it is a relative error of what attention writes. Both add up over the layers, and
# reach logits of 3 OUTPUT_STD. Rounding errors are as often up as down.
TOLERANCE = LAYERS * SIZE**0.5 * torch.finfo(torch.float32).eps * 3 * LOGIT_STD * 3 * OUTPUT_STD


# Of each: the tiny model, and vLLM's options.
MODELS = {
    "LongRoPE": ("longrope", {}),
    "the Transformers backend": ("llama", {"model_impl": "transformers"}),
    "a layer without RoPE": ("smollm3", {}),
    "no RoPE": ("opt", {}),
    "M-RoPE": ("mrope", {"hf_overrides": {"architectures": ["PicturesForCausalLM"]}}),
}


@pytest.fixture(autouse=True)
def _transformers_own_class():
    """vLLM's Transformers backend changes the model's class for good; other tests make models of it in this process."""
    kept, bases = dict(vars(LlamaModel)), LlamaModel.__bases__
    yield
    LlamaModel.__bases__ = bases
    for name in [name for name in vars(LlamaModel) if name not in kept]:
        delattr(LlamaModel, name)
    for name, value in kept.items():
        if vars(LlamaModel)[name] is not value:
            setattr(LlamaModel, name, value)


@pytest.fixture
def pictures():
    """Registers a model; the lengths of the prompts that it gives positions.

    A Qwen2 in which tokens 20 to 83 of every prompt are a picture: they share a time and lie in 8 rows of 8.

    Qwen2-VL itself needs torchvision, of which there is no build for this PyTorch. To attention it is the same: the
    rotation's positions are not the sequence's, neither in the picture nor behind it.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    asked = []

    class PicturesForCausalLM(Qwen2ForCausalLM):
        supports_mrope: ClassVar[bool] = True

        def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Iterable) -> tuple[torch.Tensor, int]:
            asked.append(len(input_tokens))
            position = torch.arange(len(input_tokens)).expand(3, -1).clone()
            grid = torch.arange(64)
            position[:, 20:84] = 20 + torch.stack((torch.zeros(64, dtype=torch.int64), grid // 8, grid % 8))
            position[:, 84:] -= 64 - 8
            return position, 8 - 64

    ModelRegistry.register_model("PicturesForCausalLM", PicturesForCausalLM)
    return asked


def worst(a: harness.Run, b: harness.Run) -> float:
    """The largest difference of two runs' log-probabilities, up to the first token that differs."""
    found = 0.0
    for name, tokens in a.tokens.items():
        same = next((i for i, pair in enumerate(zip(tokens, b.tokens[name])) if len(set(pair)) > 1), len(tokens))
        pairs = zip(a.logprobs[name][:same], b.logprobs[name][:same])
        found = max([found, *(abs(x - y) for x, y in pairs)])
    return found


def prompt_logprobs(llm) -> torch.Tensor:
    """Of all tokens of a prompt but the first, whatever of it is in the prefix cache."""
    ask = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate([{"prompt_token_ids": EVENTS[0].prompt}], ask, use_tqdm=False)
    rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([row[token].logprob for token, row in rows])


@pytest.mark.parametrize("which", MODELS)
def test_models_whose_rotation_is_unknown_are_served(models, monkeypatch, pictures, which):
    said, (name, own) = [], MODELS[which]
    for level in ("info", "warning"):
        monkeypatch.setattr(layers.logger, level, lambda line, *args: said.append(line % args))
    path, options = models(name), {"chunk": 512, "prefix_caching": True} | own
    with harness.engine(path, **options) as llm:
        exact = harness.run_schedule(llm, EVENTS, logprobs=2)
        of_prompt = prompt_logprobs(llm)
        turns = harness.run_schedule(llm, TURNS, logprobs=2)
    with harness.engine(path, backend="MAC", additional_config={"mac": CONFIG}, **options) as llm:
        found = mac_layers(harness.worker(llm).vllm_config)
        assert [(layer.exact, layer.index is not None, layer.state) for layer in found] == [(None, True, None)] * LAYERS
        assert "MAC serves 2 of 2 attention layers; keys indexed in 32 directions" in said
        with index_shadow(llm) as watch:
            near = harness.run_schedule(llm, EVENTS, logprobs=2)
        read = sum(layer.counts for layer in found)
        heads = sum(layer.num_heads for layer in found)
        assert read[Count.HIT] == len(EVENTS) * (NEW - 1) * heads and read[Count.NO_MAPS] == 0
        assert 0.1 < read[Count.READ] / (read[Count.READ] + read[Count.SKIPPED]) < 0.9
        assert watch.worst < 1e-4 and watch.looked == watch.rows == len(EVENTS) * (NEW - 1) * LAYERS
        with index_shadow(llm) as watch:
            of_turns = harness.run_schedule(llm, TURNS)
        assert watch.worst < 1e-4 and watch.looked == watch.rows == len(TURNS) * (NEW - 1) * LAYERS
        assert of_turns.cached["on"] == 416 and watch.undecided < watch.rows / 5
        # What is estimated shows, so the comparison below would see it.
        assert worst(near, exact) > 10 * TOLERANCE
        # Prompts are read exactly, whatever the tolerance.
        assert (prompt_logprobs(llm) - of_prompt).abs().max() < TOLERANCE
        for layer in found:
            layer.config = layer.config.model_copy(update={"tolerance": 0.0})
            layer.counts.zero_()
        same = harness.run_schedule(llm, EVENTS, logprobs=2)
        assert same.tokens == exact.tokens and worst(same, exact) < TOLERANCE
        of_turns = harness.run_schedule(llm, TURNS, logprobs=2)
        assert of_turns.tokens == turns.tokens and worst(of_turns, turns) < TOLERANCE
        assert of_turns.cached["on"] == turns.cached["on"] == 416
        assert sum(int(layer.counts[Count.SKIPPED]) for layer in found) == 0
    assert sorted(pictures) == ([300] * 3 + [400] * 8 + [484] * 3 if which == "M-RoPE" else [])
