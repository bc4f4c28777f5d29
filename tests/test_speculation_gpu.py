"""On a GPU, with `rule: index` and speculation: whole engines, eager and in full CUDA graphs, scheduled ahead and not.

* In eager engines every decode step of a layer, of several tokens a row, is the oracle's (`vllm_mac.lookup.decode`).
* Graphs give the tokens of eager steps. FLASH_ATTN gives the same first tokens, most of the others, and accepts as many
  drafts.
* With another tolerance tokens are skipped in steps that verify. Pages have the index of their own keys in the end.

python -m pytest tests/test_speculation_gpu.py -m gpu -s

Layers of a draft are exact: MAC's kernels read everything there. Some share the metadata builder of the model that
they draft for.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

from support import engine as harness
from support.drafts import write_eagle_head, write_near_twin
from support.engine import Add, Run
from support.index_engine import OUTCOMES, Watch, check_pages, counts, forget, layers, watched
from support.scenarios import text
from vllm_mac import layers as mac_layers
from vllm_mac import state

pytestmark = pytest.mark.gpu
DRAFTS, NEW, EXACT = 3, 32, "FLASH_ATTN"
TOKENS = 1 + DRAFTS  # that a step verifies, of each request
PROMPTS = {name: text(name, length) for name, length in {"alone": 1100, "a": 2100, "b": 1500, "c": 700}.items()}
PROMPTS["again"] = PROMPTS["a"][:1700] + text("again", 40)
# "alone" is done when the others come, so its steps are the same whatever else an engine does.
BEGIN = {"alone": 0, "a": 48, "b": 50, "c": 52, "again": 54}
CONFIG = {"rule": "index", "min_step_mib": 0, "min_context": 256, "band": 64}
# One to four requests that verify, and steps of the EAGLE head with one token each: no batch is padded, so each kernel
# runs as in eager steps.
SIZES = sorted({n * tokens for n in (1, 2, 3, 4) for tokens in (1, TOKENS)})
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
DRAFTED = ("draft_model", "eagle")
DTYPES = {"draft_model": torch.bfloat16, "eagle": torch.bfloat16, "ngram": torch.float16}


@dataclass(frozen=True)
class Kind:
    """An engine. ahead: whether it schedules a step before the one in front has ended. parts: of each row that verifies."""

    backend: str
    tolerance: float = 0.0
    eager: bool = True
    ahead: bool = False
    cache: str = "auto"
    parts: int = 1


# Graphs with and without asynchronous scheduling: one at tolerance 0, the other skips. 0.32 has none for n-grams.
EAGER, FP8 = Kind("MAC"), Kind("MAC", cache="fp8")
AHEAD = {"draft_model": False, "eagle": True, "ngram": not version("vllm").startswith("0.32")}
GRAPH = {method: Kind("MAC", eager=False, ahead=ahead) for method, ahead in AHEAD.items()}
SKIPPING = {method: Kind("MAC", 1.0, eager=False, ahead=not AHEAD[method]) for method in DRAFTED}


@dataclass
class Done:
    """What an engine did with the prompts. full: steps in full graphs. found: counters. decoded: tokens, as the host
    counts them. heads: of all layers. pages: in the prefix cache, all of which were checked."""

    run: Run
    watch: Watch
    full: int
    found: dict[str, int]
    decoded: int = 0
    heads: int = 0
    pages: int = 0

    @property
    def steps(self) -> int:
        """In which a request decoded, all requests together. Its first token came with its prompt."""
        return sum(len(ends) - 1 for ends in self.run.said.values())


@contextmanager
def full_graphs(llm):
    """How often the model's own steps, not a draft's, ran as one graph."""
    manager, ran = harness.worker(llm).model_runner.cudagraph_manager, Counter()
    run = manager.run_fullgraph
    manager.run_fullgraph = lambda *args, **kwargs: (ran.update(["full"]), run(*args, **kwargs))[1]
    try:
        yield ran
    finally:
        del manager.run_fullgraph


class Engines:
    """Runs the prompts in engines, each of which is started once."""

    def __init__(self, model, folder):
        self.model, self.done = model, {}
        self.drafts = {"draft_model": write_near_twin(model, folder), "eagle": write_eagle_head(model, folder)}

    def speculation(self, method: str) -> dict:
        lookup = {"prompt_lookup_min": 1, "prompt_lookup_max": 2}
        own = {"model": self.drafts[method]} if method in self.drafts else lookup
        return {"method": method, "num_speculative_tokens": DRAFTS, **own}

    @contextmanager
    def engine(self, method: str, kind: Kind):
        if kind.parts == 1:
            with self._engine(method, kind) as llm:
                yield llm
            return
        together = lambda *_: -(-TOKENS // kind.parts)  # as if a group had more heads
        with patch.object(state, "most_together", together), patch.object(mac_layers, "most_together", together):
            with self._engine(method, kind) as llm:
                assert layers(llm)[0].group.decoder.geometry.parts == kind.parts
                yield llm

    @contextmanager
    def _engine(self, method: str, kind: Kind):
        mac = {"mac": CONFIG | {"tolerance": kind.tolerance}} if kind.backend == "MAC" else {}
        graphs = {} if kind.eager else {"compilation_config": GRAPHS}
        with harness.engine(
            self.model, "v2", kind.backend, mac, chunk=1024, prefix_caching=True, max_model_len=4096,
            dtype=DTYPES[method], block_size=64, memory=256 << 20, enforce_eager=kind.eager, kv_cache_dtype=kind.cache,
            async_scheduling=kind.ahead, speculative_config=self.speculation(method), **graphs,
        ) as llm:  # fmt: skip
            assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling == kind.ahead
            yield llm

    def run(self, method: str, kind: Kind) -> Done:
        if (method, kind) not in self.done:
            with self.engine(method, kind) as llm:
                self.done[method, kind] = of_mac(llm, kind) if kind.backend == "MAC" else of_another(llm)
        return self.done[method, kind]


def of_another(llm) -> Done:
    return Done(harness.run_schedule(llm, events()), Watch(), 0, {})


def of_mac(llm, kind: Kind) -> Done:
    group = layers(llm)[0].group
    forget(llm)  # vLLM has warmed up with requests
    before, watch, ran = group.decoded, Watch(), Counter()
    if kind.eager:
        with watched() as watch:
            run = harness.run_schedule(llm, events())
    else:
        with full_graphs(llm) as ran:
            run = harness.run_schedule(llm, events())
    found, heads = counts(llm), sum(layer.num_heads for layer in layers(llm))
    print(f"\n{kind}: {dict(ran)} {found} {watch} tokens of each step {Counter(grown(run))}")
    return Done(run, watch, ran["full"], found, group.decoded - before, heads, check_pages(llm))


def grown(run: Run) -> list[int]:
    """How many tokens each step of a request gave."""
    return [after - before for ends in run.said.values() for before, after in pairwise(ends)]


def events() -> list[Add]:
    return [Add(BEGIN[name], name, prompt, NEW) for name, prompt in PROMPTS.items()]


@pytest.fixture(scope="module")
def engines(byte_model, tmp_path_factory):
    return Engines(byte_model, tmp_path_factory.mktemp("drafts"))


def check_run(done: Done, kind: Kind) -> None:
    """That each step verified all drafts and looked all of them up, and what is left in the prefix cache."""
    run, found = done.run, done.found
    assert all(len(tokens) == NEW for tokens in run.tokens.values())
    assert run.batch >= 3 and run.mixed > 1 and run.cached["again"] >= 1536, run
    # Every head of a row is counted once for each of its tokens, by one outcome. Scheduled ahead, a request may run in
    # a step or two more than it needs.
    assert sum(found[outcome] for outcome in OUTCOMES) == done.decoded * done.heads
    more = 2 * len(PROMPTS) * kind.ahead
    assert TOKENS * done.steps <= done.decoded <= TOKENS * (done.steps + more), (done.steps, done.decoded)
    # All prompts are longer than `min_context`, and the first one teaches before it decodes. With one token of each row
    # looked up, the heads would be a quarter of these.
    assert found["HIT"] >= TOKENS * done.steps * done.heads, found
    # What parts read together may be more than all that there is.
    assert (found["SKIPPED"] > 0) == (kind.tolerance > 0) or kind.parts > 1
    assert found["READ"] > 0
    assert done.pages > 50
    assert kind.eager or done.full > NEW // TOKENS, (
        "steps that verify did not run in full graphs: has vLLM turned them off?"
    )


def check_said_alike(run: Run, other: Run) -> None:
    """First tokens are prefill's, exact in both, and lead by more than rounding. The next ones part where rounding
    does. Up to there drafts are accepted alike, but where rounding gives another draft."""
    assert all(run.tokens[name][0] == tokens[0] for name, tokens in other.tokens.items())
    same, steps = {}, [0, 0]
    for name, tokens in run.tokens.items():
        pairs = list(zip(tokens, other.tokens[name], strict=True))
        same[name] = next((i for i, (a, b) in enumerate(pairs) if a != b), NEW)
        steps = [n + sum(end <= same[name] for end in x.said[name]) for n, x in zip(steps, (run, other), strict=True)]
    print(f"\ntokens of {NEW} that agree: {same}, in so many steps: {steps}")
    assert sum(same.values()) > 0.5 * NEW * len(same)
    assert abs(steps[0] - steps[1]) <= 2 + 0.1 * steps[1]


@pytest.mark.parametrize("method", DRAFTED)
def test_every_step_is_the_rule_s(engines, method):
    """With tolerance 0, where no choice is left to rounding."""
    done = engines.run(method, EAGER)
    check_run(done, EAGER)
    assert done.watch.steps > done.watch.several > NEW  # a draft's own steps have one token
    # Weights are rounded to the cache's dtype, the output to the model's: half a step each, twice for sums of float32.
    assert done.watch.worst <= 2 * torch.finfo(DTYPES[method]).eps
    assert min(grown(done.run)) == 1 < max(grown(done.run)), "drafts are right and wrong"


@pytest.mark.parametrize("parts", [2, 4])
def test_every_step_is_the_rule_s_in_parts(engines, parts):
    """As those are where a group has many heads. The draft model's first step, of a token more, has parts too."""
    eager, kind = Kind("MAC", parts=parts), Kind("MAC", 1.0, eager=False, ahead=True, parts=parts)
    done = engines.run("draft_model", eager)
    check_run(done, eager)
    assert done.watch.steps >= done.watch.several > NEW // 2  # with four FlashInfer runs the draft's, of five tokens
    assert done.watch.worst <= 2 * torch.finfo(DTYPES["draft_model"]).eps
    graph = engines.run("draft_model", kind)
    check_run(graph, kind)
    assert done.found["SKIPPED"] == 0 and graph.found["READ"] < 0.95 * done.found["READ"], (done.found, graph.found)
    check_said_alike(done.run, engines.run("draft_model", Kind(EXACT)).run)


def test_every_step_is_the_rule_s_with_an_fp8_cache(engines):
    """The draft model has such a cache too."""
    done = engines.run("draft_model", FP8)
    check_run(done, FP8)
    assert done.watch.steps > done.watch.several > NEW  # a draft's own steps have one token
    # As above, and weights are float16.
    assert done.watch.worst <= 2 * (2**-11 + torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("method", DRAFTED)
def test_graphs_decode_as_eager_steps(engines, method):
    kind = GRAPH[method]
    done, eager = engines.run(method, kind), engines.run(method, EAGER)
    check_run(done, kind)
    check_said_alike(done.run, eager.run)
    if kind.ahead:  # other batches round otherwise, as do those of steps that are run too many
        assert done.run.tokens["alone"] == eager.run.tokens["alone"]
    else:
        assert (done.run.tokens, done.run.said) == (eager.run.tokens, eager.run.said)


@pytest.mark.parametrize("method", DTYPES)
def test_exact_attention_says_the_same(engines, method):
    kind = GRAPH[method]
    done, exact = engines.run(method, kind), engines.run(method, Kind(EXACT))
    check_run(done, kind)
    check_said_alike(done.run, exact.run)


@pytest.mark.parametrize("method", DRAFTED)
def test_steps_that_verify_skip_tokens(engines, method):
    kind = SKIPPING[method]
    done = engines.run(method, kind)
    check_run(done, kind)
    assert done.found["SKIPPED"] > 0.05 * done.found["READ"], done.found
    # Prefill is exact.
    assert all(tokens[0] == engines.run(method, EAGER).run.tokens[name][0] for name, tokens in done.run.tokens.items())
