"""Which request holds which ring.

A ring may be read only by the request whose queries it holds, or by one with the same history.
vLLM's scheduler names the requests of every step, so ownership follows requests, not the content
of KV blocks: vLLM changes blocks in ways that attention metadata does not show. These are the
ways of vLLM 0.32 and 0.33, and why none of them can put a ring into the wrong hands:

    written through `slot_mapping`          by the request that holds the ring, or by one that has
                                            just been given the block
    copied (copy-on-write of a partial      the target was given to the request in the same step; a
    prefix hit, hybrid models)              request that starts inside a block takes over no ring
    copied between Mamba blocks             not a block of attention
    zeroed (`new_block_ids_to_zero`)        given to a request in the same step
    shared through the prefix cache         see `RingOwners`: only where the ended request itself
                                            wrote the last shared block, and nobody has had it since
    freed, evicted, given to another        `_writer` notes to whom; a ring is kept by its request's
                                            arrival, which never comes again
    preempted, resumed, prefix cache reset  the request arrives anew, with an empty ring or with its
                                            old one, taken over as above
    swapped out, loaded by a KV connector   refused (`connectors.refused`): what was loaded
                                            would look like a prefix that was found
    draft tokens rejected                   the same request; `RingTable` goes by device lengths
    discarded by sleep                      vLLM preempts all requests and clears the prefix cache: they
                                            arrive anew, and find no prefix
    request index, batch row reused         neither is looked at
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Arrival(NamedTuple):
    """A request that begins, or begins again after a preemption.

    computed: tokens found in the prefix cache. blocks: for each of `block_sizes` its blocks, those
    found first.
    """

    request: str
    computed: int
    blocks: tuple[list[int], ...]


class Growth(NamedTuple):
    """Blocks given to a request that goes on, for each of `block_sizes`."""

    request: str
    blocks: tuple[list[int], ...]


class RingOwners:
    """Hands `rings` rings to requests: plain host code, once a step, for all layers of a worker.

    A request is given a ring in the step that takes it to `min_context` tokens, and holds it until it
    ends. Matching begins there; to record what leads up to it would cost a growing request the
    reading of its band apart, for reuse that is worth little at that length.

    The ring of an ended request is kept until another request needs one, longest unused first. A
    request that arrives with a prefix takes it over, with what it holds of that prefix, if the
    ended request wrote the prefix's last block. vLLM shares a block only where the whole history up
    to its end is equal, adapters and multimodal input included.

    Where all rings are held, one is taken from a request that has not been scheduled for
    `idle_steps` steps, or the request that needs it goes without.
    """

    def __init__(self, rings: int, min_context: int, block_sizes: tuple[int, ...], idle_steps: int = 1):
        """block_sizes: of the KV-cache groups whose blocks are looked at, in the scheduler's units.
        idle_steps: batches that are in flight at once."""
        self.rings, self.min_context, self.block_sizes, self.idle_steps = rings, min_context, block_sizes, idle_steps
        self._writer = [np.zeros(0, dtype=np.int64) for _ in block_sizes]  # arrival that a block was given to
        self._step = 0
        self._arrivals = 0
        self._arrival: dict[str, int] = {}  # of each running request, its number
        self._ring: dict[str, int] = {}  # of each running request that holds one
        self._fresh: set[str] = set()
        self._kept: dict[int, int] = {}  # by the arrival of an ended request, the ring it left
        self._free = list(range(self.rings))[::-1]
        self._used = [0] * self.rings  # the step that a ring was last used in

    def begin_step(
        self, ended: Iterable[str], arrived: Iterable[Arrival], grown: Iterable[Growth], lengths: Mapping[str, int]
    ) -> None:
        """Note what a step changes, in the scheduler's words, and give rings to those who need one.

        ended: requests that are finished or preempted. lengths: tokens of each scheduled request after
        the step; upper bounds will do. A request that is to hold no ring is left out of it, and only of it: blocks
        are its own like any other's.
        """
        self._step += 1
        arrived = list(arrived)
        for request in (*ended, *(x.request for x in arrived)):
            self._end(request)
        for request, computed, blocks in arrived:
            self._arrivals += 1
            self._arrival[request] = self._arrivals
            for i, size in enumerate(self.block_sizes):
                self._give(request, i, blocks[i][computed // size :])
        for request, blocks in grown:
            for i in range(len(self.block_sizes)):
                self._give(request, i, blocks[i])
        # Only now: a block found in the cache may have been given to another request in this step.
        found = {x.request: x for x in arrived}
        self._fresh.clear()
        for request in lengths:
            if request in self._ring:
                self._used[self._ring[request]] = self._step
        for request, length in lengths.items():
            if length >= self.min_context and request not in self._ring:
                self._take(request, found.get(request))

    def ring(self, request: str) -> tuple[int, bool]:
        """The request's ring, -1 for none, and whether it was given in this step with nothing in it."""
        return self._ring.get(request, -1), request in self._fresh

    def states(self) -> dict[str, int]:
        """Rings by state: used in the latest step, idle (kept from an earlier one), free."""
        active = self._used.count(self._step) if self._step else 0
        free = len(self._free)
        return {"active": active, "idle": self.rings - active - free, "free": free}

    def _end(self, request: str) -> None:
        arrival, ring = self._arrival.pop(request, None), self._ring.pop(request, None)
        if ring is not None:
            self._kept[arrival] = ring

    def _give(self, request: str, group: int, blocks: list[int]) -> None:
        if not blocks:
            return
        writer, most = self._writer[group], max(blocks)
        if most >= len(writer):
            self._writer[group] = writer = np.concatenate((writer, np.zeros(most + 1, dtype=np.int64)))
        writer[blocks] = self._arrival[request]

    def _take(self, request: str, found: Arrival | None) -> None:
        ring = self._kept.pop(self._heritage(found), None)
        if ring is None:
            ring = self._unused()
            if ring is None:
                return
            self._fresh.add(request)
        self._ring[request] = ring
        self._used[ring] = self._step

    def _heritage(self, found: Arrival | None) -> int:
        """The arrival that wrote the last block of the prefix that a request found, 0 for none."""
        if found is None or not found.computed:
            return 0
        writers = set()
        for writer, size, blocks in zip(self._writer, self.block_sizes, found.blocks, strict=True):
            if found.computed % size:
                return 0
            block = blocks[found.computed // size - 1]
            writers.add(int(writer[block]) if block < len(writer) else 0)
        return writers.pop() if len(writers) == 1 else 0

    def _unused(self) -> int | None:
        """A free ring, or one that its request has not used for long; None if there is none."""
        if self._free:
            return self._free.pop()
        if self._kept:
            return self._kept.pop(min(self._kept, key=lambda arrival: self._used[self._kept[arrival]]))
        request = min(self._ring, key=lambda request: self._used[self._ring[request]], default=None)
        if request is None or self._used[self._ring[request]] > self._step - self.idle_steps:
            return None
        return self._ring.pop(request)
