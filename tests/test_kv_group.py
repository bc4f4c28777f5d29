"""What the rows of a batch do on a CPU: which rings they read and are recorded in."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from vllm_mac import cpu, kv_group, learning
from vllm_mac.config import MacConfig
from vllm_mac.key_index import FEW, Lessons
from vllm_mac.learning import choose
from vllm_mac.requests import RowRings
from vllm_mac.ring import RingTable
from vllm_mac.state import Learning

pytestmark = pytest.mark.cpu
WINDOW = 32


def test_rows_read_what_their_requests_may(monkeypatch):
    """Of rings that all hold what would fit: a row that was just given its ring reads none of it, nor one that still
    reads its prompt, nor one that verifies speculated tokens, which records nothing either."""
    group = kv_group.Group([], SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})), "cpu")
    group._table = table = RingTable(5, WINDOW, "cpu")
    table.first[:5], table.last[:5] = torch.tensor([70, 60, 40, 50, 90]), torch.tensor([89, 99, 69, 79, 119])
    among = lambda *rows: np.isin(np.arange(6), rows)
    rings = RowRings(
        np.array([0, 1, 2, -1, 3, 4], dtype=np.int32),
        among(1),
        among(5),
        np.ones(6, np.float32),
        among(),
        among(5),
        among(),
    )
    monkeypatch.setattr(kv_group, "row_rings", lambda _: rings)
    counts, lengths = torch.tensor([1, 1, 1, 1, 9, 4]), torch.tensor([91, 101, 71, 81, 80, 124])
    begin = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    step = group.step(SimpleNamespace(
        num_reqs=6, query_start_loc=begin, seq_lens=lengths,
        is_prefilling=torch.tensor([False, False, True, False, True, False]),
    ), torch.arange(6)[:, None])  # fmt: skip
    assert step.token.tolist() == [0, 1, 2, 3] and step.rows.position.tolist() == [90, 100, 70, 80]
    assert step.rows.ring.tolist() == [0, 1, 2, -1] and step.rows.first.tolist() == [70, 100, 71, 81]
    assert step.rows.block_table[:, 0].tolist() == [0, 1, 2, 3]
    chunks = [(x.begin, x.end, x.chunk.start, x.chunk.ring, int(x.chunk.blocks)) for x in step.chunks]
    assert chunks == [(4, 13, 71, 3, 4), (13, 17, 120, -1, 5)]
    assert table.first[:5].tolist() == [70, 100, 40, 50, 90] and table.last[:5].tolist() == [90, 100, 70, 79, 119]


@pytest.mark.parametrize("counts, row", [((9, 80, 70), 1), ((9, 10, 70), 2), ((9, 10, 11), None), ((64, 80, 70), 0)])
def test_maps_are_learned_from_the_longest_row_that_has_queries_enough(counts, row):
    """A longer row of which this step reads, or verifies, a few tokens hides no other."""
    begin = np.concatenate(([0], np.cumsum(counts)))
    table = torch.arange(3)[:, None]
    found = choose(begin, np.array([500, 400, 300]), np.ones(3, bool), table, Lessons(), 256)[0]
    assert (found and found.blocks.item()) == row
    if row is not None:
        assert (found.begin, found.end) == (begin[row], begin[row + 1])


@pytest.mark.parametrize(
    "prompts, row", [((1000, 400, 300), 1), ((564, 400, 300), 1), ((563, 400, 300), 0), ((1000,) * 3, None)]
)
def test_a_row_teaches_in_the_last_step_that_has_queries_enough_of_its_prompt(monkeypatch, prompts, row):
    monkeypatch.setattr(learning, "prompt_lengths", lambda rows: (np.array(prompts[:rows]), np.zeros(rows, int)))
    begin = np.array([0, 100, 200, 300])
    found = choose(begin, np.array([500, 400, 300]), np.ones(3, bool), torch.arange(3)[:, None], Lessons(), 256)[0]
    assert (found and found.blocks.item()) == row


@pytest.mark.parametrize(
    "count, length, prompt, cached, texts, teaches",
    [
        (100, 500, 500, 0, 1, True),
        (100, 500, 564, 0, 1, False),  # another step has 64 tokens of it, too
        (200, 500, 400, 0, 1, True),  # computed anew, with 100 tokens of the reply
        (100, 500, 430, 0, 1, False),  # the step before had 64 of the prompt's last tokens
        (100, 500, 500, 250, 1, True),
        (100, 500, 500, 251, 1, False),  # most of it was there
        (100, 500, 500, 400, 0, True),  # there are no maps yet
    ],
)
def test_a_prompt_teaches_once_and_if_most_of_it_is_new(monkeypatch, count, length, prompt, cached, texts, teaches):
    monkeypatch.setattr(learning, "prompt_lengths", lambda rows: (np.array([prompt]), np.array([cached])))
    lessons = Lessons(texts, 1000 * texts, 1000 * texts)
    found, after = choose(np.array([0, count]), np.array([length]), np.ones(1, bool), torch.zeros(1, 1), lessons, 256)
    assert (found is not None) == teaches and after == (lessons.after(length) if teaches else lessons)


def test_of_many_texts_every_sixteenth_teaches():
    """What comes between is counted, and teaches nothing; a step with nothing to learn from is none."""
    lessons, taught, begin = Lessons(), [], np.array([0, 70])
    for i in range(60):
        found, lessons = choose(begin, np.array([300]), np.ones(1, bool), torch.zeros(1, 1), lessons, 256)
        taught += [i] if found else []
        assert choose(begin, np.array([255]), np.ones(1, bool), torch.zeros(1, 1), lessons, 256) == (None, lessons)
    assert taught == [*range(16), 31, 47] and lessons.texts == 18 and lessons.passed == 12


@pytest.mark.parametrize("on_gpu", [False, True])
def test_other_weights_are_learned_by_the_next_row(on_gpu):
    group = kv_group.Group([], SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})), "cpu")
    group.layers = [SimpleNamespace(index=index) for index in (None, object(), object())]
    group.decoder = SimpleNamespace() if on_gpu else None
    holder = group.decoder or group
    holder.lessons, group.learning = Lessons(FEW, 9000, 1000), object()
    for layer in group.layers:
        group.learn_anew(layer)
    assert group.learning is None  # it is of the old weights
    assert holder.lessons.worth(500) and holder.lessons.makes(500) and holder.lessons.tokens == 0
    assert holder.lessons.longest == 1000  # there are maps


def test_a_row_of_which_no_layer_noted_anything_is_no_lesson():
    group = kv_group.Group([], SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})), "cpu")
    group.layers, group.lessons = [SimpleNamespace(index=object(), name="layer")], Lessons(1, 100, 100)
    group.learning = Learning(0, 80, 80, torch.zeros(1), Lessons())
    group.make_maps(None)
    assert group.lessons == Lessons() and group.learning is None


def test_rows_that_began_are_indexed_before_the_next_step(monkeypatch):
    """All their complete pages, by the lengths that they had after the first; the block table changes meanwhile."""
    context = {"model.layers.0.attn": SimpleNamespace(kv_cache=torch.zeros(9, 2, 16, 8))}
    vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    group = kv_group.Group([], vllm_config, "cpu")
    layer = SimpleNamespace(index=object(), cache=context["model.layers.0.attn"].kv_cache, config=MacConfig())
    group.layers, group.lessons = [SimpleNamespace(index=None), layer], Lessons(1, 100, 100)
    table, seen = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0]], dtype=torch.int32), []
    write = lambda layer, slots, cache: seen.append((layer, slots.tolist(), cache))
    begin, length = np.array([0, 1, 2, 42]), np.array([40, 33, 32])
    group.index_begun(np.array([True, False, True]), begin, length, table, write)
    assert not seen
    table.fill_(0)
    group.index_begun(np.array([False, True, False]), begin, length, table, write)
    assert seen == [(layer, [31, 47, 127, 143], layer.cache)]
    group.index_begun(np.zeros(3, bool), begin, length, table, write)
    assert [slots for _, slots, _ in seen[1:]] == [[15, 15]]
    group.index_begun(np.zeros(3, bool), begin, length, table, write)
    assert len(seen) == 2


@pytest.mark.parametrize("learned, length, own, warned", [
    (0, 8192, 63, True), (0, 8192, 64, False), (0, 8191, 1, False), (8192, 9000, 1, False),
])  # fmt: skip
def test_a_prompt_from_a_cache_that_teaches_nothing_is_told_of(monkeypatch, learned, length, own, warned):
    group = kv_group.Group([], SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})), "cpu")
    group.layers = [SimpleNamespace(index=object(), cache=torch.zeros(1, 1, 16, 1), config=MacConfig(min_context=8192))]
    group.decoder, said = SimpleNamespace(lessons=Lessons(longest=learned)), []
    monkeypatch.setattr("vllm_mac.learning.logger.warning_once", lambda text, *values: said.append(text % values))
    table = torch.zeros(1, 1000, dtype=torch.int32)
    group.index_begun(np.ones(1, bool), np.array([0, own]), np.array([length]), table, lambda *_: None)
    assert bool(said) == warned and all("64 tokens or more" in text for text in said)


def test_what_only_a_draft_model_reads_counts_for_no_ring(monkeypatch):
    builder, plain = object.__new__(cpu.MacCPUMetadataBuilder), SimpleNamespace()
    builder.group = MagicMock()
    monkeypatch.setattr(cpu.CPUAttentionMetadataBuilder, "build", lambda *_, **__: plain)
    assert builder.build_for_drafting(SimpleNamespace(), 0) is plain and not builder.group.step.called
