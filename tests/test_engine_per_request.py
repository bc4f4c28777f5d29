"""Requests that ask for something of their own, beside others, in whole engines under both model runners."""

import pytest

from support import engine as harness
from support.engine import Add, Limits, Preempt
from support.scenarios import text
from vllm_mac import metrics

pytestmark = pytest.mark.cpu
NEW, LAYERS, HEADS = 24, 2, 8
# At threshold 0 what holds a ring hits. No scheduled audit falls into the first 6000 steps.
CONFIG = {"window": 32, "band": 16, "min_context": 64, "threshold": 0.0, "mass_floor": None, "audit": 0.0001}
LENGTHS = {"plain": 90, "off": 100, "strict": 80, "audited": 85, "neighbour": 120, "short": 20}
ASKED = {
    "off": {"mac": "off"}, "short": {"mac": "off"}, "strict": {"mac_threshold": 1}, "audited": {"mac": "audit"},
    "neighbour": {"mac": "on", "mac_threshold": 0.0},
}  # fmt: skip
STEPS = (NEW - 1) * LAYERS * HEADS  # heads that one request decodes


def events(*names: str, asked: dict = ASKED) -> list[Add]:
    return [Add(0, name, text(name, LENGTHS[name]), NEW, asked.get(name)) for name in names]


class Counted:
    """The counters of an engine, of what was run since the last look."""

    def __init__(self, llm):
        self.llm, self.before = llm, {}

    def __call__(self) -> dict:
        samples = self.llm.collective_rpc(metrics.counters)[0]
        now = {}
        for sample in samples:
            key = sample.name, *[v for k, v in sample.labels.items() if k != "layer"]
            now[key] = now.get(key, 0) + sample.value
        found = {key: value - self.before.get(key, 0) for key, value in now.items()}
        self.before = now
        self.audited = found[f"{metrics.ERROR}_count",]
        self.rings = {state: now[metrics.RINGS, state] for state in ("active", "idle", "free")}
        heads = {outcome: found[metrics.HEADS, outcome] for outcome in ("hit", "miss", "exact")}
        return heads | {key[1]: value for key, value in found.items() if key[0] in (metrics.EXACT, metrics.KV_TOKENS)}


@pytest.fixture(scope="module")
def exact(model):
    """vLLM's own backend, which ignores whatever MAC would refuse."""
    with harness.engine(model) as llm:
        asked = {"off": {"mac": "maybe"}, "strict": {"mac_threshold": 7}}
        return harness.run_schedule(llm, events(*LENGTHS, asked=asked)).tokens


@pytest.mark.parametrize("runner", harness.RUNNERS)
def test_requests_get_what_they_ask_for_and_no_other_does(model, exact, runner):
    with harness.engine(model, runner=runner, backend="MAC", additional_config={"mac": CONFIG}) as llm:
        counted = Counted(llm)
        run = harness.run_schedule(llm, events(*LENGTHS))
        mixed, audited = counted(), counted.audited
        assert run.batch == len(LENGTHS)
        exactly = ["off", "short", "strict"]
        assert [run.tokens[name] for name in exactly] == [exact[name] for name in exactly]
        # Two opted out, whatever their length; nobody else decoded exactly.
        assert mixed["request"] == mixed["exact"] == 2 * STEPS and not mixed["no_ring"] and not mixed["short_context"]
        assert counted.rings["free"] == 8 - 4  # four of six were given a ring, ever

        # Without those who asked for something, the others do what they did beside them.
        others = harness.run_schedule(llm, events("plain", "audited", "neighbour", asked={}))
        alone = counted()
        assert all(run.tokens[name] == tokens for name, tokens in others.tokens.items())
        assert run.tokens["plain"] != exact["plain"]  # reuse shows
        assert alone["hit"] == mixed["hit"] > STEPS and alone["skipped"] == mixed["skipped"] > 0
        assert mixed["miss"] == alone["miss"] + STEPS and not alone["exact"]  # "strict" tried, and may match nothing
        assert not counted.audited

        # Audited are the hits of the request that asked for it, and no others.
        own = harness.run_schedule(llm, events("audited", "short"))
        assert own.tokens["audited"] == run.tokens["audited"]
        assert counted()["hit"] == counted.audited == audited > 0

        # Prompts read in chunks beside tokens that are decoded, all of it anew after a preemption.
        again = harness.run_schedule(llm, [*events(*LENGTHS), Preempt(16)], Limits(chunk=56))
        assert again.chunks["off"] > 1 and again.mixed > 3
        assert set(again.preempted) | {name for name, *_ in again.resumed} == set(LENGTHS)
        assert [again.tokens[name] for name in exactly] == [exact[name] for name in exactly]
        resumed = counted()
        assert resumed["request"] > STEPS and not resumed["no_ring"]
        assert 0 < counted.audited < resumed["hit"]

        add = lambda sent: harness.run_schedule(llm, events("plain", asked={"plain": sent}))
        with pytest.raises(ValueError, match="mac: received 'maybe'"):
            add({"mac": "maybe"})
        with pytest.raises(ValueError, match="mac_treshold: unknown key"):
            add({"mac_treshold": 1})
        assert add(None).tokens["plain"] == run.tokens["plain"]  # the engine never saw them
