"""Named schedules, each of which drives an engine through one path of the scheduler.

Every scenario says what must have happened for it to mean anything (`reached`):
tests check that on the run itself. Contexts are a few hundred tokens and KV blocks
hold 32, so that a ring of 32 and a band of 16 are crossed many times.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from support.engine import Abort, Add, Limits, Preempt, Run

BLOCK = 32
BOTH, ON = (False, True), (True,)
NONE = Limits()


@dataclass(frozen=True)
class Scenario:
    events: list
    reached: Callable[[Run], dict]  # {fact: whether it held}
    limits: Limits = NONE
    caching: tuple = BOTH  # prefix caching settings it makes sense under
    hybrid: bool = True  # whether its facts hold with sliding-window layers, whose blocks go early

    def missed(self, run: Run) -> list[str]:
        """The facts that did not hold in `run`."""
        return [fact for fact, held in self.reached(run).items() if not held]


def text(name: str, length: int) -> list[int]:
    """`length` random bytes, the same for the same name."""
    generator = random.Random(name)
    return [generator.randrange(256) for _ in range(length)]


def chunked(chunk: int) -> Scenario:
    """Prompts longer than a step, one ending in a chunk of one token; the last meets decodes."""
    # b begins in what a's last chunk leaves of a step and goes on beside a's decode tokens.
    length = (chunk - 150 % chunk) + (80 // chunk + 1) * (chunk - 1) + 1
    events = [
        Add(0, "a", text("a", 150), 30),
        Add(0, "b", text("b", length), 24),
        Add(18, "c", text("c", 210), 24),
    ]
    return Scenario(
        events,
        limits=Limits(chunk=chunk),
        reached=lambda run: {
            "a chunked": run.chunks["a"] > 1,
            "c chunked": run.chunks["c"] > 1,
            "one-token chunk": run.single["b"] == 1,
            "prefill beside decode": run.mixed > 3,
        },
    )


def prefix() -> Scenario:
    """A shared prefix is found in the step that computes it, in flight, and after its owner."""
    shared = text("shared", 4 * BLOCK)
    events = [
        Add(0, "a", shared + text("a", 10), 40),
        Add(0, "b", shared + [7], 24),
        Add(5, "c", shared + text("c", 60), 30),
        Add(50, "d", shared + text("a", 10), 30),
        Add(52, "e", shared + [7], 24),
    ]
    return Scenario(
        events,
        caching=ON,
        reached=lambda run: {
            "found by all but the first": run.cached == dict.fromkeys("abcde", 4 * BLOCK) | {"a": 0},
            "one token left to prefill": run.single["b"] == run.single["e"] == 1,
        },
    )


def turns() -> Scenario:
    """A conversation: a prompt holds earlier answers, so blocks filled by decoding are found."""
    first = text("first", 80)

    def second(tokens):
        return first + tokens["a"] + text("b", 7)

    events = [
        Add(0, "a", first, 60),
        Add(60, "b", second, 30),
        Add(62, "c", lambda tokens: first + tokens["a"] + text("c", 9), 30),
        Add(100, "d", lambda tokens: second(tokens) + tokens["b"] + text("d", 3), 30),
    ]
    return Scenario(
        events,
        caching=ON,
        hybrid=False,
        reached=lambda run: {"found": run.cached == {"a": 0, "b": 4 * BLOCK, "c": 4 * BLOCK, "d": 5 * BLOCK}},
    )


def preempt() -> Scenario:
    """Four requests in a KV cache that holds about three: some are thrown out and come back."""
    events = [Add(i, name, text(name, 90 + 10 * i), 60) for i, name in enumerate("abcd")]
    return Scenario(
        events,
        limits=Limits(blocks=16),
        reached=lambda run: {
            "preempted": run.preempted.total() > 0,
            "resumed": len(run.resumed) == run.preempted.total(),
        },
    )


def preempt_cached() -> Scenario:
    """A preempted request comes back with all but its last token in the prefix cache."""
    events = [Add(0, "a", text("a", 3 * BLOCK), 20), Add(0, "b", text("b", 3 * BLOCK), 60)]
    return Scenario(
        events,
        limits=Limits(blocks=7),
        caching=ON,
        hybrid=False,
        reached=lambda run: {"resumed by one token": run.resumed == [("b", 3 * BLOCK, 1)]},
    )


def preempt_answer() -> Scenario:
    """A preempted request comes back inside its own answer, the rest found in the prefix cache."""
    events = [Add(0, "a", text("a", 121), 50), Add(0, "b", text("b", 70), 80)]
    return Scenario(
        events,
        limits=Limits(blocks=9),
        caching=ON,
        hybrid=False,
        reached=lambda run: {"resumed past its prompt": run.resumed == [("b", 3 * BLOCK, 14)]},
    )


def preempt_all() -> Scenario:
    """Twice everything is thrown out at once, in mid-decode and in mid-prefill."""
    events = [
        Add(0, "a", text("a", 100), 40),
        Add(0, "b", text("b", 160), 40),
        Add(17, "c", text("c", 200), 40),
        Preempt(10),
        Preempt(19),
    ]
    return Scenario(
        events,
        limits=Limits(chunk=64),
        reached=lambda run: {
            "all preempted": run.preempted == {"a": 2, "b": 2, "c": 1},
            "all resumed": len(run.resumed) == 5,
        },
    )


def mixed8() -> Scenario:
    """Eight requests at once, of very different lengths, arriving and ending at different steps."""
    lengths = (5, 40, 70, 100, 150, 220, 300, 380)
    steps = (0, 0, 1, 2, 3, 5, 8, 12)
    events = [
        Add(step, f"r{length}", text(str(length), length), 20 + 5 * (i * 3 % 8))
        for i, (step, length) in enumerate(zip(steps, lengths))
    ]
    return Scenario(
        events,
        limits=Limits(chunk=128),
        reached=lambda run: {
            "eight at once": run.batch == 8,
            "prefill beside decode": run.mixed > 5,
        },
    )


def abort() -> Scenario:
    """Clients leave in mid-decode and in mid-prefill; others take their places in the same step."""
    events = [
        Add(0, "a", text("a", 120), 45),
        Add(0, "b", text("b", 150), 60),
        Add(0, "c", text("c", 80), 50),
        Add(0, "d", text("d", 300), 60),
        Abort(8, "d"),
        Add(8, "e", text("e", 130), 30),
        Abort(20, "b"),
        Add(20, "f", text("f", 100), 30),
    ]
    return Scenario(
        events,
        limits=Limits(chunk=64, seqs=4),
        reached=lambda run: {
            "four at most": run.batch == 4,
            "left in mid-prefill": run.chunks["d"] > 0 and run.aborted["d"] == 0,
            "left in mid-decode": 0 < run.aborted["b"] < 60,
            "rest finished": len(run.tokens["f"]) == 30,
        },
    )


def identical() -> Scenario:
    """One prompt three times at once, and twice more one after the other."""
    prompt = text("same", 4 * BLOCK + 10)
    events = [Add(step, name, prompt, 30) for name, step in zip("abcde", (0, 0, 0, 35, 70))]
    return Scenario(
        events,
        reached=lambda run: {
            "three at once": run.batch == 3,
            "all the same": len(set(map(tuple, run.tokens.values()))) == 1,
        },
    )


def marathon() -> Scenario:
    """Everything above around one long answer: three hundred tokens and more, thrown out once."""
    first = text("long", 4 * BLOCK + 9)
    events = [
        Add(0, "long", first, 340),
        Add(10, "shares", first[: 4 * BLOCK] + [7], 60),
        Add(40, "chunked", text("chunked", 200), 40),
        Add(60, "leaves", text("leaves", 90), 200),
        Add(90, "same", first, 30),
        Abort(100, "leaves"),
        Preempt(160),
        Add(200, "again", lambda tokens: first + tokens["same"], 60),
    ]
    return Scenario(
        events,
        limits=Limits(chunk=64),
        caching=ON,
        reached=lambda run: {
            "300 tokens": len(run.tokens["long"]) == 340,
            "chunked": run.chunks["chunked"] > 1,
            "shared prefix": run.cached["shares"] == 4 * BLOCK,
            "aborted": 0 < run.aborted["leaves"] < 200,
            "preempted": run.preempted["long"] == 1,
        },
    )


SCENARIOS = {
    "chunked17": chunked(17),
    "chunked33": chunked(33),
    "chunked64": chunked(64),
    "prefix": prefix(),
    "turns": turns(),
    "preempt": preempt(),
    "preempt_cached": preempt_cached(),
    "preempt_answer": preempt_answer(),
    "preempt_all": preempt_all(),
    "mixed8": mixed8(),
    "abort": abort(),
    "identical": identical(),
}
