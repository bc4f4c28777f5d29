"""A batch of the GPU backend, from its metadata to the kernels: which rows decode, what FlashInfer is left, what rings record.

FlashInfer's own code is a mock; MAC's kernels run under Triton's interpreter.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from support.hit_batches import Batch, Case, config
from support.stub_flashinfer import gpu_backend
from vllm_mac.requests import RowRings
from vllm_mac.ring import RingTable

pytestmark = pytest.mark.cpu
CHUNK = 40  # tokens of the row that is prefilled
NAME = "model.layers.0.self_attn.attn"


@pytest.fixture
def case(monkeypatch):
    """Three rows: two that decode, the second without a ring, and one that is prefilled or, without `mixed`, absent."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    cuda = gpu_backend()
    monkeypatch.setattr(cuda, "executing", lambda: True)
    batch = Batch(Case((200, 131, 90), "all", ringless=(1,)), config(miss_engine="triton", audit=0.0), "cpu")
    decoder = batch.decoder()
    layer = SimpleNamespace(name=NAME, state=batch.layer(), index=None, by_index=None, served=True, rows=lambda kv: kv)
    rings = batch.ring.numpy()

    def common(mixed: bool) -> CommonAttentionMetadata:
        rows, counts = (3, [1, 1, CHUNK]) if mixed else (2, [1, 1])
        begin = torch.tensor([0, *counts]).cumsum(0).int()
        lengths = (batch.position + 1)[:rows]
        monkeypatch.setattr(cuda, "row_rings", lambda _: RowRings(
            rings[:rows], *np.zeros((2, rows), bool), np.ones(rows, np.float32), *np.zeros((3, rows), bool),
        ))  # fmt: skip
        return CommonAttentionMetadata(
            query_start_loc=begin, query_start_loc_cpu=begin, seq_lens=lengths, num_reqs=rows, num_actual_tokens=sum(counts),
            max_query_len=max(counts), max_seq_len=200, block_table_tensor=batch.table[:rows],
            slot_mapping=torch.zeros(sum(counts), dtype=torch.int64), seq_lens_cpu_upper_bound=lengths,
            is_prefilling=torch.tensor([False, False, True])[:rows],
        )  # fmt: skip

    table = RingTable(batch.store.rings, batch.store.window, "cpu")
    for i, ring in enumerate(rings):
        start = int(batch.position[i]) - (CHUNK - 1 if i == 2 else 0)
        table.first[ring], table.last[ring] = max(0, start - batch.store.window), start - 1
    planner = cuda.SeedPlanner(decoder.geometry, batch.store.window, (None, None), MagicMock())
    planner._wrapper = MagicMock()
    planner._wrapper.run = lambda query, parts, return_lse: (
        torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf),
    )  # fmt: skip
    builder = object.__new__(cuda.MacCUDAMetadataBuilder)
    vars(builder).update(
        decoder=decoder, config=batch.config, all_run=True, most=1, served=[layer], _planned=MagicMock(), _seeds=planner,
        _rows=[torch.zeros_like(decoder.position) for _ in range(3)], _facts={}, device=torch.device("cpu"),
        _written={"slack": decoder.slack.clone().numpy()}, cache_config=MagicMock(), q_data_type_prefill=torch.float32,
        q_data_type_decode=torch.float32, group=MagicMock(table=table, begin_decodes=lambda: False),
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(
            static_forward_context={NAME: SimpleNamespace(kv_cache=batch.kv)},
        )),
    )  # fmt: skip
    impl = object.__new__(cuda.MacCUDAImpl)
    impl.mac = layer
    return SimpleNamespace(cuda=cuda, batch=batch, builder=builder, impl=impl, common=common, monkeypatch=monkeypatch)


def expected(batch: Batch, rows: int) -> torch.Tensor:
    """What the reference gives the first rows, in float64."""
    steps, _ = batch.oracle()
    heads = [torch.cat([steps[i, k].out for k in range(batch.case.kv_heads)]) for i in range(rows)]
    return torch.stack(heads)


def test_a_batch_that_only_decodes_is_the_decoder_s(case):
    batch, query = case.batch, case.batch.query[:2].clone()
    want = expected(batch, 2)
    metadata = case.builder._build(case.common(False), False, capture=False)
    assert metadata.step.rest is None and metadata.step.seeding is None and metadata.num_decodes == 2
    assert metadata.step.rows.ring.tolist() == [int(batch.ring[0]), -1]
    out = torch.full_like(query, torch.nan)
    assert case.impl.forward(None, query, None, None, batch.kv, metadata, out) is out
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_a_prefilled_row_is_flashinfer_s_and_its_end_is_recorded(case):
    batch, cuda = case.batch, case.cuda
    want, seen = expected(batch, 2), []
    base = lambda builder, prefix, common, fast: cuda.FlashInferMetadata(
        num_actual_tokens=CHUNK + 2, slot_mapping=common.slot_mapping, q_data_type_prefill=torch.float32, kv_cache_layout="NHD",
        q_data_type_decode=torch.float32, num_decodes=2, num_decode_tokens=2, num_prefills=1, num_prefill_tokens=CHUNK,
        causal=True, prefill=None, decode=None,
    )  # fmt: skip
    case.monkeypatch.setattr(cuda.FlashInferMetadataBuilder, "build", base)
    case.monkeypatch.setattr(
        cuda.FlashInferImpl,
        "forward",
        lambda impl, layer, query, *rest: seen.append((query, *rest)) or rest[-1].fill_(7),
    )
    metadata = case.builder._build(case.common(True), False, capture=False)
    query = torch.cat((batch.query[:2], torch.randn(CHUNK, *batch.query.shape[1:])))
    out = torch.full_like(query, torch.nan)
    batch.store.chain.fill_(5)
    case.impl.forward(None, query, None, None, batch.kv, metadata, out)
    ((given, _, _, _, rest, _),) = seen
    assert torch.equal(given, query[2:]) and (rest.num_decodes, rest.num_actual_tokens) == (0, CHUNK)
    assert (out[2:] == 7).all()
    torch.testing.assert_close(out[:2].double(), want, rtol=1e-5, atol=1e-5)
    # The last `window` positions of the chunk, which is longer.
    assert (batch.store.chain[int(batch.ring[2])] == 0).all()
    decoded = batch.store.chain[int(batch.ring[0]), :, 199 % batch.store.window]
    assert (decoded != 5).all() and (batch.store.chain[int(batch.ring[0])] == 5).sum() == 8 * (batch.store.window - 1)


def test_a_captured_batch_has_rows_that_do_nothing(case):
    """Rings and counters stay as they are, and no output is written."""
    batch = case.batch
    before = [getattr(batch.store, name).clone() for name in ("query", "out", "lse", "chain")]
    metadata = case.builder.build_for_cudagraph_capture(case.common(False))
    out = torch.full_like(batch.query[:2], torch.nan)
    case.impl.forward(None, batch.query[:2], None, None, batch.kv, metadata, out)
    assert out.isnan().all() and not batch.counters.any() and metadata.step.rows.position.tolist() == [-1, -1]
    for name, old in zip(("query", "out", "lse", "chain"), before, strict=True):
        torch.testing.assert_close(getattr(batch.store, name), old, rtol=0, atol=0, equal_nan=True)
