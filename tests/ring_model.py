"""A small model of vLLM around a RingTable, with an oracle that checks the table's answers.

`Engine` schedules requests, pages their KV with prefix caching, preempts, resumes and lays out
batches as vLLM does. For each slot of each ring it keeps the tokens that the entry was
recorded from, and compares them with the tokens of whoever may read it.
"""

import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from itertools import count

import torch

from vllm_mac.config import MacConfig
from vllm_mac.ring import RingTable


def make_config(window: int, min_context: int) -> MacConfig:
    return MacConfig(window=window, band=1, sink=0, min_context=min_context)


@dataclass
class Row:
    """One row of a batch: positions `[start, stop)` of a sequence that lies in `blocks`."""

    blocks: list[int]
    start: int
    stop: int
    prefilling: bool = False
    request: int = -1


def assign(table: RingTable, rows: list[Row], requests: bool = False, slots_unset: int = 0):
    """`table.assign` for `rows`, with `slots_unset` tokens of padding, as lists `(ring, first)`.

    first: the oldest position that the row may read in its ring as soon as it decodes.
    """
    size = table.block_size
    width = max(len(row.blocks) for row in rows)
    slots, owners = [], []
    for i, row in enumerate(rows):
        for p in range(max(row.start, 0), row.stop):
            slots.append(row.blocks[p // size] * size + p % size)
            owners.append(i)
    answer = table.assign(
        torch.tensor([row.start for row in rows]),
        torch.tensor([row.stop for row in rows]),
        torch.tensor([row.prefilling for row in rows]),
        torch.tensor([row.blocks + [0] * (width - len(row.blocks)) for row in rows], dtype=torch.int32),
        torch.tensor(slots + [-1] * slots_unset, dtype=torch.int64),
        torch.tensor(owners + [len(rows) - 1] * slots_unset, dtype=torch.int64),
        torch.tensor([row.request for row in rows]) if requests else None,
    )
    rings = answer.ring.tolist()
    first = [int(table.first[ring]) if ring >= 0 else row.stop for ring, row in zip(rings, rows)]
    now = [row.stop if row.prefilling else p for row, p in zip(rows, first)]
    assert answer.first.tolist() == now, "a prompt is read exactly"
    return rings, first


@dataclass
class Request:
    tokens: list[int]
    prompt: int
    end: int  # length at which it stops
    lane: int  # which of the batches in flight it belongs to
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    index: int = -1  # row of the runner's request table (V2)
    ring: int = -1
    used: int = -9  # step in which `ring` was used


class Blocks:
    """vLLM's BlockPool: block 0 is null, freed blocks stay cached until they are taken again."""

    def __init__(self, n: int):
        self.free = OrderedDict.fromkeys(range(1, n))
        self.users = [0] * n
        self.content: list[tuple | None] = [None] * n
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
    """Runs requests step by step and checks each answer of the table against the oracle."""

    def __init__(self, rings, blocks, size, window, min_context, chunk, v2, lanes=1, seed=0):
        self.config = make_config(window, min_context)
        self.table = RingTable(rings, blocks, size, self.config, "cpu", idle_steps=lanes)
        self.pool, self.size, self.chunk, self.v2, self.lanes = Blocks(blocks), size, chunk, v2, lanes
        self.rng = random.Random(seed)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.indices = list(range(64))
        self.recorded = [{} for _ in range(rings)]  # ring -> slot -> the history it is from
        self.holder: list[Request | None] = [None] * rings
        self.last_use = [-lanes] * rings
        self.step_no = 0
        self.seen = Counter()  # what really happened, for tests that mean to reach it

    def add(self, prompt: list[int], new: int) -> None:
        limit = (len(self.pool.users) - 1) * self.size
        end = min(len(prompt) + new, limit)
        if len(prompt) < end:
            self.waiting.append(Request(list(prompt), len(prompt), end, self.rng.randrange(self.lanes)))

    def drop(self, request: Request, resume: bool) -> None:
        """End a running request, or preempt it."""
        self.running.remove(request)
        self.pool.release(request.blocks)
        self.indices.append(request.index)  # the next request takes it at once
        request.blocks, request.computed, request.index, request.used = [], 0, -1, -9
        if resume:
            self.waiting.insert(0, request)
            self.seen["preempted"] += 1

    def _allocate(self, request: Request, stop: int) -> bool:
        missing = -(-stop // self.size) - len(request.blocks)
        if missing > len(self.pool.free):
            return False
        request.blocks += [self.pool.take() for _ in range(missing)]
        # vLLM caches blocks when they are given out, before the step that fills them.
        for i in range(request.computed // self.size, stop // self.size):
            self.pool.cache(request.blocks[i], tuple(request.tokens[: (i + 1) * self.size]))
        return True

    def _schedule(self, stalled: bool) -> list[tuple[Request, int]]:
        lane, plan = self.step_no % self.lanes, []
        for request in list(self.running):
            if request.lane != lane or request not in self.running:
                continue
            if stalled and self.rng.random() < 0.5:
                self.seen["stalled"] += 1
                continue
            stop = min(len(request.tokens), request.computed + self.chunk)
            while not self._allocate(request, stop):
                victims = [r for r in self.running if r.lane == lane and all(r is not x for x, _ in plan)]
                self.drop(victims[-1], resume=True)
                if victims[-1] is request:
                    break
            else:
                plan.append((request, stop))
        for request in [r for r in self.waiting if r.lane == lane]:
            held = self._cached_prefix(request)
            stop = min(len(request.tokens), len(held) * self.size + self.chunk)
            request.blocks = [self.pool.share(block) for block in held]
            request.computed = len(held) * self.size
            if not self._allocate(request, stop):
                self.pool.release(request.blocks)
                request.blocks, request.computed = [], 0
                break
            self.seen["prefix found"] += bool(held)
            self.seen["resumed as decode"] += request.prompt <= request.computed
            request.index = self.indices.pop()
            self.waiting.remove(request)
            self.running.append(request)
            plan.append((request, stop))
        return plan

    def _cached_prefix(self, request: Request) -> list[int]:
        held = []
        for i in range((len(request.tokens) - 1) // self.size):  # the last token is always computed
            block = self.pool.cached.get(tuple(request.tokens[: (i + 1) * self.size]))
            if block is None:
                break
            held.append(block)
        return held

    def step(self, stalled: bool = False) -> None:
        plan = self._schedule(stalled)
        self.rng.shuffle(plan)
        rows = [Row(r.blocks, r.computed, stop, r.computed < r.prompt, r.index) for r, stop in plan]
        pads = self.rng.randrange(3) if rows else 1
        for _ in range(pads):  # padding rows may keep what was there
            stale = self.rng.choice(rows) if rows else Row([0], 0, 0)
            rows.append(replace(stale, stop=stale.start))
        rings, firsts = assign(self.table, rows, requests=self.v2, slots_unset=pads)
        self._check(plan, rows, rings, firsts)
        self._advance(plan)

    def _advance(self, plan) -> None:
        """After a step: what was computed, and a new token for each request that is through with its own."""
        for request, stop in plan:
            request.computed = stop
            if stop == len(request.tokens):
                # Two letters, so that sequences with one history often stay equal.
                request.tokens.append(self.rng.randrange(2))
                if len(request.tokens) > request.end:
                    self.drop(request, resume=False)
        self.step_no += 1

    def _check(self, plan, rows, rings, firsts) -> None:
        window, used, holders = self.config.window, list(self.last_use), list(self.holder)
        assert all(ring == -1 for ring in rings[len(plan) :]), "padding rows have no ring"
        taken = [ring for ring in rings if ring >= 0]
        assert len(taken) == len(set(taken)), "one ring, two rows"
        for (request, _), ring in zip(plan, rings):
            if ring >= 0:
                self.last_use[ring], self.holder[ring] = self.step_no, request
        for (request, stop), row, ring, first in zip(plan, rows, rings, firsts):
            history = tuple(request.tokens)
            self._check_kept(request, row, ring, first, used)
            if ring < 0:
                continue
            for p in range(max(first, row.start - window, 0), row.start):
                self.seen["entries read"] += 1
                assert self.recorded[ring].get(p % window) == history[: p + 1], (ring, p)
            if first < row.start and holders[ring] is not request:
                self.seen["ring taken over"] += 1
            for p in range(max(row.start, stop - window), stop):
                self.recorded[ring][p % window] = history[: p + 1]
        for (request, _), ring in zip(plan, rings):
            request.ring, request.used = ring, self.step_no

    def _check_kept(self, request, row, ring, first, used) -> None:
        """Rings are kept from step to step, and refused only when all are in use."""
        wants = row.stop >= self.config.min_context
        if ring < 0:
            in_use = [self.step_no - self.lanes < used for used in self.last_use]
            assert not wants or all(in_use), "a ring was left, and none was given"
            self.seen["exhausted"] += wants
            return
        assert wants or first < row.start, "a short sequence took a ring"
        if request.ring >= 0 and request.used == self.step_no - self.lanes:
            if ring != request.ring:
                # Only to a row with the very same history, which V1 cannot tell apart.
                other = self.holder[request.ring]
                assert not self.v2 and other is not request, "a live sequence lost its ring"
                assert other.tokens[: row.start] == request.tokens[: row.start]
                # In one batch the one that decodes wins; a batch in flight does not know of the next.
                old = row.prefilling or other.computed >= other.prompt or other.lane != request.lane
                assert old, "a new twin came before a live one"
                self.seen["lost to a twin"] += 1
        elif first >= row.start:
            assert used[ring] <= self.step_no - self.lanes, "taken from a batch in flight"
            left = [use for use, now in zip(used, self.last_use) if now != self.step_no]
            assert used[ring] <= min(left, default=used[ring]), "a ring unused for longer was left"

    def finish(self) -> None:
        """End everything; then as many new sequences as there are rings get one each."""
        for request in list(self.running):
            self.drop(request, resume=False)
        self.waiting.clear()
        need = self.config.min_context
        for _ in range(self.lanes - 1):
            assign(self.table, [Row([0], 0, 0)])
        blocks = iter(count(1))
        each = -(-need // self.size)
        rows = [Row([next(blocks) for _ in range(each)], 0, need, True, i) for i in range(self.table.rings)]
        if each * self.table.rings < len(self.pool.users):
            rings, _ = assign(self.table, rows, requests=self.v2)
            assert sorted(rings) == list(range(self.table.rings)), "a ring leaked"
            self.seen["all rings found again"] += 1
