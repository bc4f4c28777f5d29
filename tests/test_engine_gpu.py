"""Whole engines on a GPU: vLLM's FLASHINFER against MAC, eager and in full CUDA graphs.

* With threshold 1.0 MAC gives FLASHINFER's greedy tokens. Two engines part where rounding decides
  between two tokens: that is accepted where both find both tokens equally likely within what rounding
  explains, and all log-probabilities up to there must agree within it. The measure is taken from the
  model itself: how far evaluations in the engine's dtype and in float32 lie apart, on the same tokens.
* With reuse on, every row of every layer equals `paged` beside it (`gpu_shadow`), counters too, and
  graphs give what eager steps give.
* As vLLM runs by default (asynchronous scheduling, compiled in pieces, full graphs of decode steps) MAC gives the tokens of
  FLASHINFER run alike, and with reuse on it hits as often as in eager steps.
* On two GPUs each has half of the heads, and both the tokens and the counters are those of one.

    python -m pytest tests/test_engine_gpu.py -m gpu -s
"""

import random
import statistics
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from vllm.compilation.counter import compilation_counter

from support import engine as harness
from support.engine import Add, mac_counters, run_schedule
from support.scenarios import SCENARIOS
from vllm_mac.layers import mac_layers

pytestmark = pytest.mark.gpu

WIDE = {
    "threshold": 0.5,
    "mass_floor": None,
    "miss_engine": "flashinfer",
    "sink": 20,
}  # default window, band and min_context
SMALL = {"window": 32, "band": 16, "min_context": 64, "threshold": 0.5, "mass_floor": 0.2}
DEFAULT_SIZES = (1, 2, 4, 8, 16, 1024)  # vLLM's own for eight sequences, and one that whole chunks of prompts replay
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
# backend, dtype, MAC's configuration, batch sizes captured (none: eager). A "default" engine is told nothing else.
ENGINES = {
    "flashinfer": ("FLASHINFER", "float16", {}, ()),
    "exact": ("MAC", "float16", {"threshold": 1.0}, ()),
    "exact graphs": ("MAC", "float16", {"threshold": 1.0}, (1, 2, 4, 8)),  # other batches are padded
    "wide": ("MAC", "bfloat16", WIDE, ()),
    "small": ("MAC", "float16", SMALL, ()),
    # Every size of its own, so that each kernel runs as in eager steps, bit for bit: a hit that turns
    # into a miss by rounding would change tokens by more than rounding.
    "small graphs": ("MAC", "float16", SMALL, (1, 2, 3, 4, 5, 6, 7, 8)),
    "default flashinfer": ("FLASHINFER", "float16", {}, DEFAULT_SIZES),
    "default exact": ("MAC", "float16", {"threshold": 1.0}, DEFAULT_SIZES),
    "default small": ("MAC", "float16", SMALL, DEFAULT_SIZES),
    "two flashinfer": ("FLASHINFER", "float16", {}, ()),
    "two exact graphs": ("MAC", "float16", {"threshold": 1.0}, (1, 2, 4, 8)),
    "two small graphs": ("MAC", "float16", SMALL, (1, 2, 3, 4, 5, 6, 7, 8)),
}
NEW = 48
OUTCOMES = ("hit", "miss", "exact")


def text(name: str, length: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(256) for _ in range(length)]


def prompts() -> list[Add]:
    """Short and long, several at once, read in chunks beside decoding; two begin as earlier ones do."""
    shared = text("c", 3000)
    return [
        Add(0, "a", text("a", 2100), NEW),
        Add(0, "b", text("b", 4700), NEW),
        Add(0, "short", text("short", 37), NEW),
        Add(3, "c", shared, NEW),
        Add(14, "shares", shared[:2560] + text("d", 300), NEW),
        Add(16, "again", shared[:2900] + text("e", 5), NEW),
    ]


class Engines:
    """The one engine that is open; asking for another closes it. Runs of `prompts` are kept."""

    def __init__(self, model):
        self.model, self.stack, self.runs = model, ExitStack(), {}
        self.name = self.llm = None

    def get(self, name: str):
        if self.name != name:
            self.close()
            backend, dtype, config, sizes = ENGINES[name]
            default = name.startswith("default ")
            graphs = (
                {"compilation_config": ({} if default else GRAPHS) | {"cudagraph_capture_sizes": list(sizes)}}
                if sizes
                else {}
            )
            if default:  # the harness turns the compiler off, for the sake of quick starts
                self.stack.enter_context(patch.dict(harness.ENVIRONMENT, TORCHDYNAMO_DISABLE="0"))
            self.llm = self.stack.enter_context(harness.engine(
                self.model, "v2", backend, {"mac": config} if config else {}, chunk=1024, prefix_caching=True,
                max_model_len=6144, dtype=dtype, memory=256 << 20, enforce_eager=not sizes, async_scheduling=None if default else False,
                tensor_parallel_size=2 if name.startswith("two ") else 1,
                worker_extension_cls="vllm_mac.metrics.WorkerExtension", **graphs,
            ))  # fmt: skip
            self.name = name
        return self.llm

    def run(self, name: str):
        if name not in self.runs:
            llm = self.get(name)
            mac = ENGINES[name][0] == "MAC"
            before = mac_counters(llm) if mac else {}  # other tests use the engine too
            run = run_schedule(llm, prompts(), logprobs=8)
            assert run.cached["shares"] == 2560 and run.cached["again"] >= 2880 and run.mixed > 5 and run.batch >= 4
            assert all(len(tokens) == NEW for tokens in run.tokens.values())
            self.runs[name] = run, {k: n - before[k] for k, n in mac_counters(llm).items()} if mac else None
        return self.runs[name]

    def close(self):
        self.name = self.llm = None
        self.stack.close()


@pytest.fixture(scope="module")
def engines(byte_model):
    engines = Engines(byte_model)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def rounding(engines):
    """How far a log-probability may be off in an engine: three times the most by which evaluations by
    Transformers in float16 and float32 differ, over the best tokens of every position that FLASHINFER decoded."""
    from transformers import AutoModelForCausalLM

    run, _ = engines.run("flashinfer")
    engines.close()
    found = []
    for dtype in (torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(engines.model, dtype=dtype).cuda().eval()
        rows = []
        for event in prompts():
            tokens = torch.tensor([event.prompt + run.tokens[event.id]], device="cuda")
            with torch.no_grad():
                logits = model(tokens, logits_to_keep=NEW + 1).logits[0, :-1]
            every = logits.float().log_softmax(-1).cpu()
            rows += [[every[i, t] for t in top] for i, top in enumerate(map(list_of_two, run.tops[event.id]))]
        found.append(torch.tensor(rows))
        del model
    torch.cuda.empty_cache()
    allowed = 3 * float((found[0] - found[1]).abs().max())
    engine = [[top[t] for t in list_of_two(top)] for event in prompts() for top in run.tops[event.id]]
    error = float((torch.tensor(engine) - found[0]).abs().max())
    print(f"\nlog-probabilities: rounding allows {allowed:.4f}; FLASHINFER is {error:.4f} from float32")
    assert error <= allowed, "vLLM's own attention is further off than rounding: the measure is wrong"
    return allowed


def list_of_two(top: dict) -> list[int]:
    return sorted(top, key=top.get, reverse=True)[:2]


def agree(a, b, allowed: float) -> None:
    """Tokens are equal up to a tie in both, log-probabilities up to there within `allowed`."""
    lengths = []
    for name in a.tokens:
        ours, theirs = a.tokens[name], b.tokens[name]
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), NEW)
        lengths.append(at)
        for i in range(at):
            apart = abs(a.logprobs[name][i] - b.logprobs[name][i])
            assert apart <= allowed, (name, i, apart, allowed)
        if at < NEW:
            for run, own, other in ((a, ours[at], theirs[at]), (b, theirs[at], ours[at])):
                top = run.tops[name][at]
                assert other in top, f"{name}, token {at}: {other} is not among the best, {top}"
                gap = top[own] - top[other]
                # One engine puts one token ahead, the other the other: each gap is below what two numbers move.
                assert gap <= 2 * allowed, f"{name}, token {at}: {own} leads {other} by {gap:.4f}, no tie"
    mean = sum(lengths) / len(lengths)
    print(f"\nagreed tokens of {NEW}: {dict(zip(a.tokens, lengths))}, mean {mean:.1f}")
    assert max(lengths) == NEW, "no prompt agrees to its end"
    assert mean >= NEW / 2


@pytest.mark.parametrize("name", ["exact", "exact graphs"])
def test_threshold_one_gives_flashinfers_tokens(engines, rounding, name):
    expected, _ = engines.run("flashinfer")
    run, counts = engines.run(name)
    assert counts["miss"] > 1000 and counts["hit"] == 0 and counts["exact"] > 0 and counts["skipped"] == 0
    agree(expected, run, rounding)


def watched(llm, events, limits=harness.Limits()):
    """A run under the shadow, whose counters must be the engine's."""
    from support.gpu_shadow import shadow

    before = mac_counters(llm)
    with shadow(llm) as watch:
        run = run_schedule(llm, events, limits)
    counts = mac_counters(llm)
    counts.subtract(before)
    for name in ("hit", "miss", "exact", "read", "skipped"):
        assert counts[name] == getattr(watch, name), name
    # Two choices within rounding of each other are rare.
    assert watch.ties <= (watch.hit + watch.miss) / 1000
    print(f"\n{watch.rows} rows, {watch.hit} heads hit, {watch.miss} missed, {watch.ties} ties; worst {watch.worst}")
    return run, watch


def test_wide_rings_equal_the_plain_result(engines):
    """Default window, band and context, bf16, sinks, misses read by FlashInfer."""
    _, watch = watched(engines.get("wide"), prompts())
    assert watch.hit > 500 and watch.miss > 500 and watch.exact > 500 and watch.chunks > 10


@pytest.mark.parametrize("name", ["chunked33", "prefix", "preempt", "preempt_cached", "preempt_all", "mixed8", "abort"])
def test_scenarios_equal_the_plain_result(engines, name):
    scenario = SCENARIOS[name]
    run, watch = watched(engines.get("small"), scenario.events, scenario.limits)
    assert set(scenario.missed(run)) <= {"all the same"}, run
    assert watch.hit > 100 and watch.miss > 10 and watch.chunks > 1
    assert watch.empty > 0


def test_graphs_give_what_eager_steps_give(engines, rounding):
    expected, before = engines.run("small")
    run, counts = engines.run("small graphs")
    assert counts["hit"] > 1000 and counts["miss"] > 100
    agree(expected, run, rounding)


@contextmanager
def graphs_run(llm):
    """How many steps ran in which kind of graph meanwhile: `full`, or in `pieces`."""
    manager, ran = harness.worker(llm).model_runner.cudagraph_manager, Counter()
    full, pieces = manager.run_fullgraph, manager.run_pw_graph
    manager.run_fullgraph = lambda *args, **kwargs: (ran.update(["full"]), full(*args, **kwargs))[1]
    manager.run_pw_graph = lambda *args, **kwargs: (ran.update(["pieces"]), pieces(*args, **kwargs))[1]
    try:
        yield ran
    finally:
        del manager.run_fullgraph, manager.run_pw_graph


def run_as_by_default(engines, name: str):
    """The run of a "default" engine, and its counters if it has any; all that vLLM does by default was really done."""
    if name not in engines.runs:
        llm = engines.get(name)
        config = llm.llm_engine.vllm_config
        assert config.scheduler_config.async_scheduling
        assert config.compilation_config.mode.name == "VLLM_COMPILE"
        assert config.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
        seen = compilation_counter.num_graphs_seen + compilation_counter.num_aot_artifacts_loaded
        assert seen > 0, "nothing was compiled"
        with graphs_run(llm) as ran:
            engines.run(name)
        print(f"\n{name}: {dict(ran)} steps in graphs, {seen} graphs compiled or loaded so far")
        assert ran["full"] > NEW and ran["pieces"] > 2
    return engines.run(name)


def test_vllms_default_gives_flashinfers_tokens(engines, rounding):
    """Both engines compiled and scheduled alike, so that attention alone may differ."""
    expected, _ = run_as_by_default(engines, "default flashinfer")
    run, counts = run_as_by_default(engines, "default exact")
    assert counts["miss"] > 1000 and counts["hit"] == 0 and counts["exact"] > 0 and counts["skipped"] == 0
    agree(expected, run, rounding)


def test_vllms_default_reuses_what_eager_steps_reuse(engines, rounding):
    """Compiled code rounds otherwise, and so does a padded batch: a hit may turn into a miss, and then texts part."""
    expected, before = engines.run("small")
    run, counts = run_as_by_default(engines, "default small")
    tried, expected_tried = (c["hit"] + c["miss"] for c in (counts, before))
    # Asynchronous scheduling may run a request for one step more than it needs; all else follows from the schedule.
    layers = [layer for layer in mac_layers(harness.worker(engines.llm).vllm_config) if layer.served]
    steps = len(run.tokens) * len(layers)
    assert counts["hit"] > 1000 and 0 <= tried - expected_tried <= steps * layers[0].num_heads
    more = counts["read"] + counts["skipped"] - before["read"] - before["skipped"]
    assert 0 <= more <= steps * layers[0].num_kv_heads * 6144
    apart = []
    for name, ours in run.tokens.items():
        pairs = list(zip(ours, expected.tokens[name], strict=True))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), NEW)
        apart += [abs(run.logprobs[name][i] - expected.logprobs[name][i]) for i in range(at)]
    tokens, middle = NEW * len(run.tokens), statistics.median(apart)
    print(f"\nagreed tokens: {len(apart)} of {tokens}; apart by {middle:.4f}, at most {max(apart):.4f}")
    # A request's first token is exact in both.
    assert len(apart) >= len(run.tokens) and middle <= rounding


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["two exact graphs", "two small graphs"])
def test_two_gpus_give_what_one_gives(engines, rounding, name):
    one, before = engines.run(name.removeprefix("two "))
    run, counts = engines.run(name)
    assert sum(counts[k] for k in OUTCOMES) == sum(before[k] for k in OUTCOMES)
    if name == "two exact graphs":
        assert counts["hit"] == 0
        expected, _ = engines.run("two flashinfer")
        agree(expected, run, rounding)
        agree(one, run, rounding)
    else:  # a hit that turns into a miss by rounding changes what follows
        assert counts["hit"] > 1000
        assert counts["hit"] == pytest.approx(before["hit"], rel=0.05)
