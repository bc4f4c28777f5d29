"""What the GPU backend's builder makes of a batch: which rings its rows read, which tokens are recorded in rings beside
decoding, and at which positions."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from support.stub_flashinfer import gpu_backend
from vllm_mac.counters import OPTED_OUT
from vllm_mac.requests import RowRings
from vllm_mac.ring import RingTable
from vllm_mac.state import Geometry

pytestmark = pytest.mark.cpu
PAGE, WINDOW, BAND = 16, 32, 16


@pytest.fixture
def builder(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    return object.__new__(gpu_backend().MacCUDAMetadataBuilder)


@pytest.fixture
def seeds(builder):
    """`plan(common, decodes, rings)`, and the mock of FlashInfer's wrapper that it plans with."""
    geometry = Geometry(8, 8, 2, 64, PAGE, 20, torch.bfloat16, BAND, 0, 1.0)
    planner = gpu_backend().SeedPlanner(geometry, WINDOW, (None, None), MagicMock())
    planner._wrapper = MagicMock()
    return SimpleNamespace(
        planner=planner,
        plan=lambda common, decodes, rings: planner.plan(common, decodes, rings, torch.from_numpy(rings).int()),
        wrapper=planner._wrapper,
    )


def batch(counts: list[int], lengths: list[int], believed: list[int]) -> CommonAttentionMetadata:
    """Rows of so many tokens, which end at `lengths` on the device, and at `believed` by the host."""
    begin = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ints = lambda values: torch.tensor(values, dtype=torch.int32)
    table = torch.arange(len(counts) * 20, dtype=torch.int32).view(len(counts), 20)
    return CommonAttentionMetadata(
        query_start_loc=begin, query_start_loc_cpu=begin, seq_lens=ints(lengths), num_reqs=len(counts),
        num_actual_tokens=sum(counts), max_query_len=max(counts), max_seq_len=max(believed), block_table_tensor=table,
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64), seq_lens_cpu_upper_bound=ints(believed),
    )  # fmt: skip


def test_chunks_with_a_ring_are_recorded_at_the_device_s_positions(seeds):
    """A decoding row, a chunk longer than the window, one without a ring, one that verifies speculated tokens."""
    common = batch([1, 40, 9, 4], [90, 100, 70, 150], [90, 102, 70, 153])
    found = seeds.plan(common, 1, np.array([0, 3, -1, -1])).seeds
    assert set(found.row.tolist()) == {1} and found.ring.tolist() == [0, 3, -1, -1]
    assert found.token.tolist() == list(range(1 + 40 - WINDOW, 1 + 40))
    assert found.position.tolist() == list(range(100 - WINDOW, 100))
    assert all(x.dtype == torch.int32 for x in (found.token, found.row, found.position))
    queries, pages, *_ = seeds.wrapper.plan.call_args.args
    # Rows that record nothing bring no query, and as little of a cache as FlashInfer takes.
    assert queries.tolist() == [0, WINDOW, WINDOW, WINDOW] and pages.diff().tolist()[1:] == [1, 1]


def test_nothing_is_attended_to_where_nothing_is_recorded(seeds):
    common = batch([1, 9, 4, 8], [90, 70, 150, 80], [90, 70, 153, 80])
    assert seeds.plan(common, 1, np.array([0, -1, -1, OPTED_OUT])) is None
    seeds.wrapper.plan.assert_not_called()


def test_what_rows_ask_for_is_copied_only_when_it_changes(builder):
    """Also where the batch grows and shrinks; the buffers are those that graphs read."""
    slack, spared = torch.ones(6), torch.full((6,), -1, dtype=torch.int32)
    written = {"slack": slack.clone().numpy(), "spared": spared.clone().numpy()}
    vars(builder).update(decoder=SimpleNamespace(slack=slack, spared=spared), _written=written)
    copied, rows = [], lambda *values: np.array(values, dtype=np.float32)
    copy = torch.Tensor.copy_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda to, x, **more: copied.append(x.tolist()) or copy(to, x))
        for values in (rows(1, 1), rows(1, 1, 1, 1), rows(1, 0.25, 1), rows(1), rows(1, 0.25), rows(1, 0.25, 1, 1)):
            builder._write("slack", values)
            assert slack[: len(values)].tolist() == values.tolist()
        builder._write("slack", rows(1, 1, 0.5))
        builder._write("spared", np.array([-1, -1], dtype=np.int32))
    assert copied == [[1, 0.25, 1], [1, 1, 0.5]] and slack.tolist() == [1, 1, 0.5, 1, 1, 1]


@pytest.fixture
def building(builder, seeds, monkeypatch):
    """`building(common, rings, executing=True, capture=False)` builds for a batch of which `requests` says `rings`; FlashInfer's
    backend, below, only says which rows decode."""
    cuda = gpu_backend()
    base = cuda.FlashInferMetadataBuilder
    monkeypatch.setattr(base, "build", lambda self, _, common, fast_build: cuda.FlashInferMetadata(
        **dict.fromkeys(set(cuda.FlashInferMetadata.__dataclass_fields__))
        | dict(num_actual_tokens=common.num_actual_tokens, num_decodes=common.decodes, num_decode_tokens=common.decodes,
               num_prefills=common.num_reqs - common.decodes)
    ))  # fmt: skip
    buffers = lambda: torch.full((8,), -77, dtype=torch.int32)
    builder.decoder = SimpleNamespace(
        position=buffers(), ring=buffers(), first=buffers(), slack=torch.ones(8), rows=MagicMock(), begin_step=MagicMock(),
    )  # fmt: skip
    layer = SimpleNamespace(name="layer")
    context = {"layer": SimpleNamespace(kv_cache=torch.zeros(0))}
    vars(builder).update(
        all_run=False, most=1, served=[layer], group=MagicMock(), _planned=MagicMock(), _facts={}, _rows=[buffers() for _ in range(3)],
        _written={"slack": np.ones(8, dtype=np.float32)}, _seeds=seeds.planner, config=SimpleNamespace(audit=0.0), device="cpu",
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context)),
    )  # fmt: skip
    builder.group.table = RingTable(5, WINDOW, "cpu")

    def build(common, rings, executing=True, capture=False):
        monkeypatch.setattr(cuda, "executing", lambda: executing)
        monkeypatch.setattr(cuda, "row_rings", lambda _: rings)
        return builder.build_for_cudagraph_capture(common) if capture else builder.build(0, common)

    return build


def rows_of(rings, fresh=(), skips=()) -> RowRings:
    """fresh, skips: the rows that are."""
    n = len(rings)
    among = lambda chosen: np.isin(np.arange(n), list(chosen))
    return RowRings(
        np.array(rings, dtype=np.int32),
        among(fresh),
        among(skips),
        np.ones(n, dtype=np.float32),
        among(()),
        among(skips),
        among(()),
    )


def prepared(counts, lengths, prefilling, decodes) -> CommonAttentionMetadata:
    common = batch(counts, lengths, lengths)
    common.is_prefilling, common.decodes = torch.tensor(prefilling), decodes
    return common


def holding(table: RingTable, spans) -> None:
    for ring, (first, last) in enumerate(spans):
        table.first[ring], table.last[ring] = first, last


def test_rows_read_what_their_requests_may(builder, building):
    """Of rings that all hold what would fit: a row that was just given its ring reads none of it, nor one that still
    reads its prompt, nor one that verifies speculated tokens, which records nothing either."""
    table, decoder = builder.group.table, builder.decoder
    holding(table, [(70, 89), (60, 99), (40, 69), (50, 79), (90, 119)])
    common = prepared([1, 1, 1, 1, 9, 4], [91, 101, 71, 81, 80, 124], [False, False, True, False, True], 4)
    # The host believes that drafts were accepted; the device knows.
    common.seq_lens_cpu_upper_bound = torch.tensor([93, 103, 71, 83, 80, 126], dtype=torch.int32)
    metadata = building(common, rows_of([0, 1, 2, -1, 3, 4], fresh=(1,), skips=(5,)))
    for buffer, expected in (
        (decoder.position, [90, 100, 70, 80]), (decoder.ring, [0, 1, 2, -1]), (decoder.first, [70, 100, 71, 81]),
    ):  # fmt: skip
        assert buffer.tolist() == expected + [-77] * 4
    recorded = metadata.step.seeding.seeds
    assert metadata.step.decoder is decoder and recorded.row.unique().tolist() == [4]
    assert recorded.ring[:6].tolist() == builder._rows[1][:6].tolist() == [0, 1, 2, -1, 3, -1]
    assert table.first[:5].tolist() == [70, 100, 40, 50, 90] and table.last[:5].tolist() == [90, 100, 70, 79, 119]


def test_steps_that_only_decode_write_what_graphs_read(builder, building):
    """In whatever order rows come, and with padding after them."""
    table, decoder = builder.group.table, builder.decoder
    builder.all_run = True
    vars(builder).update(cache_config=MagicMock(), q_data_type_prefill=None, q_data_type_decode=None)
    holding(table, [(70, 89), (60, 99), (0, 0), (0, 0), (0, 0)])
    building(prepared([1, 1, 0], [91, 101, 0], [False, False], 3), rows_of([0, 1, -1]))
    assert (decoder.ring[:3].tolist(), decoder.first[:3].tolist()) == ([0, 1, -1], [70, 68, 0])
    building(prepared([1, 1, 0], [102, 92, 0], [False, False], 3), rows_of([1, 0, -1]))
    assert (decoder.ring[:3].tolist(), decoder.first[:3].tolist()) == ([1, 0, -1], [69, 70, 0])
    assert decoder.position[:3].tolist() == [101, 91, -1]


@pytest.mark.parametrize("executing, capture", [(False, False), (True, True), (False, True)])
def test_a_batch_of_no_requests_reads_and_records_nothing(builder, building, executing, capture):
    table, decoder = builder.group.table, builder.decoder
    holding(table, [(70, 89)] * 5)
    before = table.first.clone(), table.last.clone()
    building(prepared([1, 1], [91, 101], [False, False], 2), rows_of([0, 1]), executing, capture)
    assert set(decoder.position.tolist()) == set(decoder.ring.tolist()) == {-1}
    assert torch.equal(table.first, before[0]) and torch.equal(table.last, before[1])


def test_what_only_a_draft_model_reads_counts_for_no_ring(builder, building):
    table = builder.group.table
    holding(table, [(70, 89)] * 5)
    common = prepared([1, 1], [91, 101], [False, False], 2)
    building(common, rows_of([0, 1]))
    before = table.first.clone(), table.last.clone(), builder.decoder.position.clone()
    assert not hasattr(builder.build_for_drafting(common, 0), "step")
    now = table.first, table.last, builder.decoder.position
    assert all(torch.equal(x, y) for x, y in zip(before, now, strict=True))
