"""The layers of one KV-cache group: what their rings hold, which of their steps are audited, and, on CPUs, what
each row of a batch does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_mac import cpu_lookup, maps_file
from vllm_mac.audit import Audit
from vllm_mac.key_index import Lessons, PageLayout, learn
from vllm_mac.layers import MacLayer, mac_layers
from vllm_mac.learning import choose, warn_of_none
from vllm_mac.publisher import publish
from vllm_mac.requests import executing, held_blocks, row_rings
from vllm_mac.ring import RingTable
from vllm_mac.state import Chunk, Learning, Rows

logger = init_logger("vllm.mac")

# `(layer, slots, cache)`: indexes the pages of a layer's cache of which `slots` `[n]` int64 are the last; None: all pages.
Write = Callable[[MacLayer, Tensor | None, Tensor], None]


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """One row of several tokens that is attended to exactly, prefilled or verifying speculated ones: tokens `[begin, end)`
    of the batch."""

    begin: int
    end: int
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Step:
    """What the rows of a batch do.

    token: `[N]` int64, of each token of the rows that decode its index in the batch. rows: what they do, int64; one token
    each, or by index those that verify speculated tokens too. audited: `[B]` bool, whether the row's hits are audited. chunks:
    the other rows. learning: the row that maps of the index are learned from, if any.
    """

    token: Tensor
    rows: Rows
    audited: Tensor
    chunks: list[ChunkRow]
    learning: Learning | None = None


class Group:
    """The layers of one KV-cache group, which share block tables and so ring ownership.

    layers: those whose backend is MAC, exact ones included.
    decoded: tokens decoded so far. context: KV tokens that full attention reads for them (per KV head), once for all
        tokens of a row. windowed: the same within each sliding window of the group.
    """

    def __init__(self, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        self.layers = [layer for layer in mac_layers(vllm_config) if layer.name in layer_names]
        self.decoded, self.context = 0, 0
        self.windowed = {layer.sliding_window: 0 for layer in self.layers if layer.sliding_window}
        for layer in self.layers:
            layer.group = self
        self.decoder = None  # on GPUs, what decodes for these layers
        # What maps of the index were learned from: on GPUs until there is a decoder, which has it then.
        kept = [layer.kept for layer in self.layers if layer.index is not None]
        # Layers learn together: where some have nothing to begin with, all begin anew, and the others' maps stay meanwhile.
        self.lessons = kept[0][1] if kept and all(kept) else Lessons()
        self.learning: Learning | None = None  # of the step before
        self.begun: Tensor | None = None  # slots that `index_begun` noted in the step before
        self._device = device
        self._table: RingTable | None = None
        audited = {layer.name: layer.state for layer in self.layers if layer.audited is not None}
        self._audit = Audit(audited) if audited else None
        if self.layers:
            publish(mac_layers(vllm_config))

    def begin_decodes(self) -> bool:
        """Whether all rows of the decode step about to be planned are audited; to be called once for each."""
        return self._audit is not None and self._audit.begin_step()

    def learn_anew(self, layer: MacLayer) -> None:
        """Have maps of the index be learned anew, from the next long row on; `layer` has other weights. Of a group's
        layers the first one counts."""
        if layer is next(one for one in self.layers if one.index is not None):
            self.learning = None
            self._holder.lessons = Lessons(longest=self.taught.longest)

    def make_maps(self, write: Write) -> None:
        """Have the layers learn what the step before noted. Where maps are made of it, all the group's pages are indexed anew.

        Between steps, so that the layers of one need not wait for the device, each for its own.
        """
        learning, self.learning = self.learning, None
        if learning is None:
            return
        layers = [layer for layer in self.layers if layer.name in learning.moments]
        making = learning.before.makes(learning.length)
        moments = [learning.moments[layer.name] for layer in layers]
        weight = learning.before.weight(learning.length)
        learned = learn([layer.index.maps for layer in layers], moments, making, weight)
        slots = self._own_slots() if making else None
        for layer, one in zip(layers, learned, strict=True):
            if one and making:
                write(layer, slots, layer.cache)
        if not learned or not all(learned):  # another row does
            self._holder.lessons = learning.before
            logger.warning_once(
                "MAC learns nothing from a prompt whose queries or keys are not finite numbers, or too large or small"
            )
        elif making and layers[0].config.maps is not None:
            keep_maps(layers[0].vllm_config, layers[0].config.maps)

    def _own_slots(self) -> Tensor | None:
        """The last slots `[n]` int64 of the pages of the group's own blocks; None where nobody knows them. In others lie states
        of other layers, indexes of other maps, or nothing yet: an engine that has just begun has little to index."""
        layer = next(layer for layer in self.layers if layer.index is not None)
        found = held_blocks(layer.name)
        if found is None:
            return None
        (blocks, count), cache = found, layer.cache
        several = len(cache) // count
        pages = (blocks[:, None] * several + torch.arange(several)).flatten()
        return _last_slots(pages, cache.shape[2]).to(cache.device)

    @property
    def taught(self) -> Lessons:
        """What maps of the index were learned from."""
        return self._holder.lessons

    @property
    def _holder(self) -> Any:
        """What has `lessons`."""
        return self if self.decoder is None else self.decoder

    def index_begun(
        self, begun: np.ndarray, begin: np.ndarray, length: np.ndarray, block_table: Tensor, write: Write
    ) -> None:
        """Index the pages of rows that began in the step before, and note those of rows that begin in this one.

        A KV connector may have written them, so they may have no index, or one of other maps. While a step is planned
        it may still write, and where a whole step is one CUDA graph nothing of MAC's runs between its last write and
        the first attention. So such a row is read whole in its first step, and indexed before the second.

        begun: `[B]` bool, see `RowRings`. begin, length: as `learning.choose` takes them. block_table: `[B, *]`.
        """
        layers = [layer for layer in self.layers if layer.index is not None]
        if self.begun is not None:
            for layer in layers:
                write(layer, self.begun, layer.cache)
            self.begun = None
        rows = np.flatnonzero(begun).tolist()
        if not rows:
            return
        page = layers[0].cache.shape[2]
        pages = torch.cat([block_table[row, : int(length[row]) // page] for row in rows]).long()
        self.begun = _last_slots(pages, page)
        if not self.taught.longest:
            warn_of_none(begin, length, rows, layers[0].config.min_context)

    @property
    def table(self) -> RingTable | None:
        """What the rings hold; None where all layers of the group are exact."""
        if self._table is None and any(layer.state is not None for layer in self.layers):
            self._table = self.new_table()
        return self._table

    def new_table(self) -> RingTable:
        """A table of rings that hold nothing; some layer must have rings."""
        store = next(layer.state.store for layer in self.layers if layer.state is not None)
        return RingTable(store.rings, store.window, self._device)

    def step(self, common: CommonAttentionMetadata, block_table: Tensor) -> Step | None:
        """Plan a batch whose metadata is on the CPU; None where all layers of the group are exact.

        block_table: `[num_reqs, *]`.
        """
        rows = common.num_reqs
        begin = common.query_start_loc[: rows + 1].long()
        length = common.seq_lens[:rows].long()
        count = begin.diff()
        start = length - count
        prefilling = common.is_prefilling
        prefilling = count > 1 if prefilling is None else prefilling[:rows]
        rings = row_rings(common)
        ring, fresh, skips, slack, audited, verifies, _ = (torch.from_numpy(x) for x in rings)
        index = next((layer for layer in self.layers if layer.index is not None), None)
        decodes = (count == 1) | (verifies & (count > 1) & (index is not None))
        self._tally(length[decodes].numpy(), count[decodes].numpy())
        if self.table is None and index is None:
            return None
        first, learning = torch.full_like(start, -1), None
        if self.table is not None:
            first = self.table.assign(start, length, ring.long(), fresh, prefilling, skips)
        elif executing():
            self.make_maps(_write)
            self.index_begun(rings.begun, begin.numpy(), length.numpy(), block_table, _write)
            many = (count > 1).numpy() & ~rings.verifies
            least = index.config.min_context
            learning, self.lessons = choose(begin.numpy(), length.numpy(), many, block_table, self.lessons, least)
            self.learning = learning
        ring = torch.where(skips, -1, ring.long())
        row = decodes.nonzero()[:, 0]
        chunks = [
            ChunkRow(int(begin[r]), int(begin[r + 1]), Chunk(int(start[r]), int(ring[r]), block_table[r]))
            for r in ((count > 0) & ~decodes).nonzero()[:, 0].tolist()
        ]
        if len(row) and self.begin_decodes():
            audited = torch.ones_like(audited)
        many = count[row]
        of_row = torch.cat((many.new_zeros(1), many.cumsum(0)))  # where its tokens begin among those that decode
        token = torch.arange(int(of_row[-1])) + (begin[row] - of_row[:-1]).repeat_interleave(many)
        several = of_row if bool((many > 1).any()) else None
        decoded = Rows(start[row], ring[row], first[row], slack[row], block_table[row], several)
        return Step(token, decoded, audited[row], chunks, learning)

    def tally_host(self, common: CommonAttentionMetadata, most: int = 1) -> None:
        """Count a batch from what the CPU knows of it (lengths may be upper bounds). most: tokens of a row that decodes."""
        if common.seq_lens_cpu_upper_bound is None:
            return
        length = common.seq_lens_cpu_upper_bound.numpy()[: common.num_reqs]
        if common.max_query_len == 1:  # rows of no token are padding, of length 0
            self._tally(length, np.minimum(length, 1))
            return
        count = np.diff(common.query_start_loc_cpu.numpy()[: len(length) + 1])
        decodes = (count > 0) & (count <= most) & (length > 0)
        self._tally(length[decodes], count[decodes])

    def _tally(self, length: np.ndarray, count: np.ndarray) -> None:
        self.decoded += int(count.sum(dtype=np.int64))
        self.context += int(length.sum(dtype=np.int64))
        for window in self.windowed:
            self.windowed[window] += int(np.minimum(length, window).sum(dtype=np.int64))


def keep_maps(vllm_config: VllmConfig, location: str) -> None:
    """Write what all layers of this worker have learned from into its file. Those that are about to learn are none of them."""
    able = [layer for layer in mac_layers(vllm_config) if layer.index is not None and layer.group.learning is None]
    learned = [layer for layer in able if layer.index.maps.ready.item()]
    path = maps_file.own_path(vllm_config, location)
    try:
        kept = {layer.name: (layer.index.maps.moments, layer.group.taught) for layer in learned}
        maps_file.write(path, maps_file.model_of(vllm_config), kept)
    except OSError as error:
        logger.warning_once("MAC cannot keep in %s what maps were learned from: %s", path, error)


def _last_slots(pages: Tensor, page: int) -> Tensor:
    """Of pages of so many tokens the last slot of each."""
    return pages * page + page - 1


def _write(layer: MacLayer, slots: Tensor | None, cache: Tensor) -> None:
    cpu_lookup.write(layer.index, slots, cache, PageLayout.of(cache, layer.index.maps))
