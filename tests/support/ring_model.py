"""A small model of vLLM around `RingOwners` and `RingTable`, with an oracle that checks every answer.

`Engine` schedules requests, pages their KV with prefix caching and copy-on-write of blocks that are
shared in part, speculates, preempts, resumes, resets, sleeps, and names all this to the owners as
vLLM's scheduler does. For each slot of each ring it keeps the tokens that the entry was recorded
from, and compares them with the tokens of whoever may read it.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_mac.counters import OPTED_OUT
from vllm_mac.owners import Arrival, Growth, RingOwners
from vllm_mac.ring import RingTable


def assign(table: RingTable, start, length, ring, fresh, prefilling, skips) -> list[int]:
    """`table.assign` for lists."""
    ints, flags = torch.tensor([start, length, ring]), torch.tensor([fresh, prefilling, skips], dtype=torch.bool)
    return table.assign(*ints, *flags).tolist()


@dataclass
class Request:
    name: str
    tokens: list[int]
    prompt: int
    end: int  # length at which it stops
    lane: int  # which of the batches in flight it belongs to
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    told: int = 0  # blocks that the scheduler has named so far
    begun: bool = False  # whether it has been scheduled before
    given: int | None = None  # position from which its ring should hold everything
    scheduled: int = -9  # the step that it was last in
    drafts: list[int] = field(default_factory=list)  # tokens speculated in that step
    exact: bool = False  # whether it opted out


class Blocks:
    """vLLM's BlockPool: block 0 is null, freed blocks stay cached until they are taken again."""

    def __init__(self, n: int):
        self.free = OrderedDict.fromkeys(range(1, n))
        self.users = [0] * n
        self.content: list[tuple | None] = [None] * n  # the history up to the end of what is in the block
        self.cached: dict[tuple, int] = {}

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        if self.cached.get(self.content[block]) == block:
            del self.cached[self.content[block]]
        self.content[block], self.users[block] = None, 1
        return block

    def share(self, block: int) -> int:
        self.free.pop(block, None)
        self.users[block] += 1
        return block

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None

    def cache(self, block: int, history: tuple) -> None:
        self.content[block] = history
        self.cached.setdefault(history, block)


class Engine:
    """Runs requests step by step and checks each answer against the oracle.

    unit: prefixes are found in multiples of it; below `size`, the last block of a prefix is copied.
    lanes: batches in flight. drafts: most tokens that are speculated at once. told: whether the scheduler
    names preempted requests (V2). answer: stands in for `assign`. exact: share of requests that opt out.
    """

    def __init__(
        self, rings, blocks, size, window, min_context, chunk, unit=None, lanes=1, drafts=0, told=True, seed=0,
        answer: Callable = assign, device="cpu", exact=0.0,
    ):  # fmt: skip
        self.owners = RingOwners(rings, min_context, (size,), lanes)
        self.table, self.answer = RingTable(rings, window, device), answer
        self.pool, self.size, self.unit, self.chunk, self.lanes = Blocks(blocks), size, unit or size, chunk, lanes
        self.window, self.min_context, self.drafts, self.told = window, min_context, drafts, told
        self.rng, self.exact = random.Random(seed), exact
        self.skipped = self.rng.choice((0, 0.5, 1))  # share of these rows
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.ended: set[str] = set()
        self.recorded = [{} for _ in range(rings)]  # ring -> slot -> the history it is from
        self.used = [-lanes] * rings  # step that each ring was last used in
        self.holder: list[Request | None] = [None] * rings
        self.step_no = self.added = 0
        self.seen = Counter()  # what really happened, for tests that mean to reach it

    def add(self, prompt: list[int], new: int) -> None:
        limit = (len(self.pool.users) - 1) * self.size - self.drafts
        end = min(len(prompt) + new, limit)
        if len(prompt) < end:
            # A client may use a name again.
            name = f"request {self.added % 7}" if self._is_free(self.added % 7) else f"request {7 + self.added}"
            self.added += 1
            self.waiting.append(Request(name, list(prompt), len(prompt), end, self.rng.randrange(self.lanes)))
            self.waiting[-1].exact = self.exact > 0 and self.rng.random() < self.exact

    def _is_free(self, number: int) -> bool:
        return all(r.name != f"request {number}" for r in self.running + self.waiting)

    def drop(self, request: Request, resume: bool) -> None:
        """End a running request, or preempt it."""
        self.running.remove(request)
        self.pool.release(request.blocks)
        if self.told or not resume:
            self.ended.add(request.name)
        request.blocks, request.computed, request.told, request.given = [], 0, 0, None
        if resume:
            self.waiting.insert(0, request)
            self.seen["preempted"] += 1

    def reset(self) -> None:
        """All running requests are preempted, and nothing stays cached."""
        for request in list(self.running):
            self.drop(request, resume=True)
        self.pool.cached.clear()
        self.pool.content = [None] * len(self.pool.users)
        self.seen["reset"] += 1

    def sleep(self) -> None:
        """Rings and tables lose what they held, which is then anything."""
        self.reset()
        self.table.first.random_(0, 99)
        self.table.last.random_(0, 99)
        self.recorded = [{} for _ in self.recorded]
        self.seen["slept"] += 1

    def _allocate(self, request: Request, stop: int, cacheable: int) -> bool:
        missing = -(-stop // self.size) - len(request.blocks)
        if missing > len(self.pool.free):
            return False
        request.blocks += [self.pool.take() for _ in range(missing)]
        # vLLM caches blocks when they are given out, before the step that fills them.
        for end in range(self.unit, cacheable + 1, self.unit):
            if end > request.computed and (end % self.size == 0 or end + self.unit > cacheable):
                self.pool.cache(request.blocks[(end - 1) // self.size], tuple(request.tokens[:end]))
        return True

    def _schedule(self, stalled: bool) -> tuple[list[tuple[Request, int, int]], list[Arrival]]:
        """`(request, stop, drafts)` of each row, and who arrives."""
        lane, plan, arrived = self.step_no % self.lanes, [], []
        for request in list(self.running):
            if request.lane != lane or request not in self.running:
                continue
            if stalled and self.rng.random() < 0.5:
                self.seen["stalled"] += 1
                continue
            known = min(len(request.tokens), request.computed + self.chunk)
            drafts = self.rng.randint(0, self.drafts) if known == len(request.tokens) == request.computed + 1 else 0
            while not self._allocate(request, known + drafts, known):
                victims = [r for r in self.running if r.lane == lane and all(r is not x for x, *_ in plan)]
                self.drop(victims[-1], resume=True)
                if victims[-1] is request:
                    break
            else:
                plan.append((request, known + drafts, drafts))
        for request in [r for r in self.waiting if r.lane == lane]:
            held, computed = self._cached_prefix(request)
            stop = min(len(request.tokens), computed + self.chunk)
            request.blocks = [self.pool.share(block) for block in held]
            request.computed = computed
            if computed % self.size and not self._copy(request):
                self.pool.release(request.blocks)
                request.blocks, request.computed = [], 0
                break
            if not self._allocate(request, stop, stop):
                self.pool.release(request.blocks)
                request.blocks, request.computed = [], 0
                break
            self.seen["prefix found"] += bool(held)
            self.seen["resumed as decode"] += request.prompt <= request.computed
            self.waiting.remove(request)
            self.running.append(request)
            plan.append((request, stop, 0))
            arrived.append(Arrival(request.name, computed, (list(request.blocks),)))
            request.told = len(request.blocks)
        return plan, arrived

    def _cached_prefix(self, request: Request) -> tuple[list[int], int]:
        held, computed = [], 0
        for end in range(self.unit, len(request.tokens), self.unit):  # the last token is always computed
            block = self.pool.cached.get(tuple(request.tokens[:end]))
            if block is None and end % self.size == 0:
                break
            if block is not None and end % self.size == 0:
                held, computed = [*held[: end // self.size - 1], block], end
            elif block is not None and end - computed < self.size:
                held, computed = [*held[: end // self.size], block], end
        return held[: -(-computed // self.size)], computed

    def _copy(self, request: Request) -> bool:
        """Copy-on-write: no slot mapping shows it."""
        if not self.pool.free:
            return False
        source = request.blocks.pop()
        request.blocks.append(self.pool.take())
        self.pool.content[request.blocks[-1]] = tuple(request.tokens[: request.computed])
        self.pool.release([source])
        self.seen["copied"] += 1
        return True

    def step(self, stalled: bool = False) -> None:
        plan, arrived = self._schedule(stalled)
        self._begin(plan, arrived)
        self.rng.shuffle(plan)
        # Rows that verify speculated tokens skip their ring today; the table allows for their recording.
        skips = [drafts > 0 and self.rng.random() < self.skipped for *_, drafts in plan]
        held = [self.owners.ring(r.name) for r, *_ in plan]
        for i in [i for i, (request, *_) in enumerate(plan) if request.exact]:
            assert held[i] == (-1, False), "a request that opted out was given a ring"
            held[i] = OPTED_OUT, False
            self.seen["opted out"] += plan[i][1] >= self.min_context
        ring = [r for r, _ in held]
        fresh = [f for _, f in held]
        start, stops = [r.computed for r, *_ in plan], [stop for _, stop, _ in plan]
        prefilling = [r.computed < r.prompt for r, *_ in plan]
        pads = self.rng.randrange(3) if plan else 1
        for pad in [self.rng.choice([(0, 0), (5, 5), (-1, 0)]) for _ in range(pads)]:
            start.append(pad[0]), stops.append(pad[1]), ring.append(-1), fresh.append(False)
            prefilling.append(False), skips.append(False)
        first = self.answer(self.table, start, stops, ring, fresh, prefilling, skips)
        assert first[len(plan) :] == stops[len(plan) :], "padding reads nothing"
        self._check(plan, held, [-1 if skip else r for r, skip in zip(ring, skips)], first)
        self._advance(plan)

    def _begin(self, plan, arrived: list[Arrival]) -> None:
        """Tell the owners of a step, as vLLM's scheduler would."""
        new = {x.request for x in arrived}
        grown = []
        for request, *_ in plan:
            if request.name not in new and len(request.blocks) > request.told:
                grown.append(Growth(request.name, (request.blocks[request.told :],)))
                request.told = len(request.blocks)
        # Under asynchronous speculation the host believes that every draft was accepted.
        lengths = {r.name: stop + self.rng.choice((0, self.drafts)) for r, stop, _ in plan if not r.exact}
        self.owners.begin_step(self.ended, arrived, grown, lengths)
        self.ended = set()

    def _advance(self, plan) -> None:
        """After a step: what was computed, and new tokens for each request that is through with its own."""
        for request, stop, drafts in plan:
            accepted = self.rng.randint(0, drafts)
            self.seen["rejected"] += accepted < drafts
            request.computed = stop - drafts + accepted
            if stop - drafts == len(request.tokens):
                # Two letters, so that requests with one history often stay equal.
                request.tokens += [*request.drafts[:accepted], self.rng.randrange(2)]
                if len(request.tokens) > request.end:
                    self.drop(request, resume=False)
        self.step_no += 1

    def _check(self, plan, held, rings, firsts) -> None:
        window = self.window
        taken = [ring for ring, _ in held if ring >= 0]
        assert len(taken) == len(set(taken)), "one ring, two requests"
        for ring in taken:
            self.used[ring] = self.step_no
        for (request, stop, _), (ring, fresh) in zip(plan, held):
            self._check_held(request, stop, ring)
            if ring >= 0:
                if fresh:
                    request.given = request.computed
                elif self.holder[ring] is not request or request.given is None:
                    self.seen["ring taken over"] += 1
                    request.given = request.computed  # at least
                self.holder[ring] = request
            request.scheduled = self.step_no
        for (request, stop, drafts), ring, first in zip(plan, rings, firsts):
            request.drafts = [self.rng.randrange(2) for _ in range(drafts)]
            start, history = request.computed, (*request.tokens[: stop - drafts], *request.drafts)
            if ring < 0:
                assert first == stop, "a row without a ring reads nothing"
                if drafts:
                    request.given = None  # what follows leaves a gap
                continue
            assert start >= request.prompt or first == stop, "a prompt is read exactly"
            for p in range(max(first, start - window, 0), start):
                self.seen["entries read"] += 1
                assert self.recorded[ring].get(p % window) == history[: p + 1], (ring, p)
            if start >= request.prompt and request.given is not None and not self.drafts:
                assert first <= max(request.given, start - window), "entries were lost"
            if request.given is None:
                request.given = start
            for p in range(max(start, stop - window), stop):
                self.recorded[ring][p % window] = history[: p + 1]

    def _check_held(self, request, stop, ring) -> None:
        """Rings are kept from step to step, and refused only when all are in use."""
        if request.exact:
            assert ring == OPTED_OUT
        elif ring < 0:
            in_use = [self.step_no - self.lanes < step for step in self.used]
            assert stop < self.min_context or all(in_use), "a ring was left"
            self.seen["exhausted"] += stop >= self.min_context
            request.given = None
        elif (
            request.given is not None
            and request.scheduled == self.step_no - self.lanes
            and self.holder[ring] is not request
        ):
            raise AssertionError("a live request lost its ring")

    def finish(self) -> None:
        """End everything; then as many new requests as there are rings get one each."""
        for request in list(self.running):
            self.drop(request, resume=False)
        self.ended |= {request.name for request in self.waiting}  # which may have held rings before they were preempted
        self.waiting.clear()
        for _ in range(self.lanes):
            self.owners.begin_step(self.ended, [], [], {})
        assert not self.owners._arrival, "requests that ended pile up"
        names = [f"last {i}" for i in range(self.owners.rings)]
        arrived = [Arrival(name, 0, ([1 + i],)) for i, name in enumerate(names)]
        self.owners.begin_step((), arrived, (), dict.fromkeys(names, self.min_context))
        assert sorted(self.owners.ring(name) for name in names) == [(i, True) for i in range(self.owners.rings)]
        assert self.owners.states() == {"active": self.owners.rings, "idle": 0, "free": 0}


def play(engine: Engine, schedule) -> None:
    for event, what, extra in schedule:
        if event in ("add", "twins"):
            # Contents that share their first half, so that prefixes meet and part.
            letters, length = what
            prompt = [0, 1] * 2 + [letters // 2, letters % 2] * 3
            for _ in range(1 + (event == "twins")):
                engine.add(prompt[:length], extra)
        elif event == "step":
            engine.step(what)
        elif event in ("reset", "sleep"):
            getattr(engine, event)()
        elif engine.running:
            engine.drop(engine.running[what % len(engine.running)], resume=event == "preempt")
    engine.finish()


def random_schedule(rng: random.Random, length: int) -> list:
    kinds = ["add", "twins", "abort", "preempt"] * 3 + ["step"] * 36 + ["reset", "sleep"]
    schedule = []
    for _ in range(length):
        kind = rng.choice(kinds)
        prompt = rng.randrange(4), rng.randint(1, 9)
        what = {"step": rng.random() < 0.2, "abort": rng.randrange(9), "preempt": rng.randrange(9)}
        schedule.append((kind, what.get(kind, prompt), rng.randint(1, 12)))
    return schedule


def random_engine(rng: random.Random, **more) -> Engine:
    size = rng.choice([1, 2, 4])
    return Engine(
        rings=rng.randint(1, 4), blocks=rng.randint(10, 24), size=size, unit=rng.choice([size, max(1, size // 2)]),
        window=rng.randint(1, 6), min_context=rng.randint(3, 6), chunk=rng.randint(1, 8), **more,
    )  # fmt: skip
