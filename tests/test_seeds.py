"""Which tokens of a batch the GPU backend records in rings beside decoding, and at which positions."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from support.stub_flashinfer import gpu_backend
from vllm_mac.counters import OPTED_OUT
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
