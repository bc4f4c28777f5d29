"""From a batch's metadata to what each of its rows does in this step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_mac.audit import Audit
from vllm_mac.layers import mac_layers
from vllm_mac.publisher import publish
from vllm_mac.requests import row_rings
from vllm_mac.ring import RingTable


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row of several tokens, prefilled or verifying speculated ones: tokens `[begin, end)` of the
    batch, from position `start` on, recorded in `ring` (below 0: nowhere)."""

    row: int
    begin: int
    end: int
    start: int
    ring: int


@dataclass(frozen=True, slots=True)
class Step:
    """What the rows of a batch do; tensors `[B]` int64 over the rows of one token.

    row: row of the block table. token: index of the row's token in the batch. position: its
    position. ring: its ring, or below 0 for none, see `requests.RowRings`. first: see `RingTable.assign`.
    slack: `[B]` float32, see `reference.limit`. audited: `[B]` bool, whether the row's hits are.
    chunks: the other rows.
    """

    row: Tensor
    token: Tensor
    position: Tensor
    ring: Tensor
    first: Tensor
    slack: Tensor
    audited: Tensor
    chunks: list[Chunk]


class Group:
    """The layers of one KV-cache group, which share block tables and so ring ownership.

    layers: those whose backend is MAC, served or not.
    decoded: rows decoded so far, one token each. context: KV tokens that full attention reads
        for them (per KV head). windowed: the same within each sliding window of the group.
    """

    def __init__(self, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        self.layers = [layer for layer in mac_layers(vllm_config) if layer.name in layer_names]
        self.decoded, self.context = 0, 0
        self.windowed = {layer.sliding_window: 0 for layer in self.layers if layer.sliding_window}
        for layer in self.layers:
            layer.group = self
        self._device = device
        self._table: RingTable | None = None
        served = [layer for layer in self.layers if layer.audited is not None]
        self._audit = Audit(served[0].config, served) if served else None
        if self.layers:
            publish(mac_layers(vllm_config))

    def begin_decodes(self) -> bool:
        """Whether all rows of the decode step about to be planned are audited; to be called once for each."""
        return self._audit is not None and self._audit.begin_step()

    @property
    def table(self) -> RingTable | None:
        """What the rings hold; None when no layer of the group is served."""
        if self._table is None and any(layer.store is not None for layer in self.layers):
            self._table = self.new_table()
        return self._table

    def new_table(self) -> RingTable:
        """A table of rings that hold nothing; some layer must be served."""
        store = next(layer.store for layer in self.layers if layer.store is not None)
        return RingTable(len(store.query), store.query.shape[2], self._device)

    def step(self, common: CommonAttentionMetadata) -> Step | None:
        """Plan a batch whose metadata is on the CPU; None when no layer of the group is served."""
        rows = common.num_reqs
        begin = common.query_start_loc[: rows + 1].long()
        length = common.seq_lens[:rows].long()
        count = begin.diff()
        start = length - count
        prefilling = common.is_prefilling
        prefilling = count > 1 if prefilling is None else prefilling[:rows]
        decodes = count == 1
        self._tally(length[decodes].numpy())
        if self.table is None:
            return None
        ring, fresh, skips, slack, audited = (torch.from_numpy(x) for x in row_rings(common))
        first = self.table.assign(start, length, ring.long(), fresh, prefilling, skips)
        ring = torch.where(skips, -1, ring.long())
        row = decodes.nonzero()[:, 0]
        chunks = [
            Chunk(r, int(begin[r]), int(begin[r + 1]), int(start[r]), int(ring[r]))
            for r in ((count > 0) & ~decodes).nonzero()[:, 0].tolist()
        ]
        if len(row) and self.begin_decodes():
            audited = torch.ones_like(audited)
        return Step(row, begin[row], start[row], ring[row], first[row], slack[row], audited[row], chunks)

    def tally_host(self, common: CommonAttentionMetadata) -> None:
        """Count a batch from what the CPU knows of it (lengths may be upper bounds)."""
        if common.seq_lens_cpu_upper_bound is None:
            return
        length = common.seq_lens_cpu_upper_bound.numpy()[: common.num_reqs]
        count = np.diff(common.query_start_loc_cpu.numpy()[: len(length) + 1])
        self._tally(length[(count == 1) & (length > 0)])

    def _tally(self, length: np.ndarray) -> None:
        self.decoded += len(length)
        self.context += int(length.sum(dtype=np.int64))
        for window in self.windowed:
            self.windowed[window] += int(np.minimum(length, window).sum(dtype=np.int64))
