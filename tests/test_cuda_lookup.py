"""A batch of the GPU backend that decodes by the index of keys: what rows do, and when maps are learned.

FlashInfer's own code is a mock; MAC's kernels run under Triton's interpreter.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from support.stub_flashinfer import gpu_backend
from vllm_mac import lookup
from vllm_mac.config import MacConfig
from vllm_mac.counters import OPTED_OUT, Count
from vllm_mac.key_index import Maps, encode
from vllm_mac.requests import RowRings
from vllm_mac.state import Geometry, IndexRule, IndexState

pytestmark = pytest.mark.cpu
HEADS, KV_HEADS, SIZE, PAGE, CHUNK = 6, 2, 64, 16, 96
LENGTHS = (500, 300, 400)  # two rows that decode, and one whose last CHUNK tokens are prefilled


@pytest.fixture
def case(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    cuda = gpu_backend()
    monkeypatch.setattr(cuda, "executing", lambda: True)
    rule = IndexRule(1.5, 64, 16, 128, SIZE**-0.5)
    geometry = Geometry(4, HEADS, KV_HEADS, SIZE, PAGE, 32, torch.float32, 64, 16, SIZE**-0.5)
    decoder = cuda.LookupDecoder(geometry, rule, None, torch.device("cpu"))
    layout = decoder.layout
    used = [-(-n // PAGE) for n in LENGTHS]
    raw = torch.full((sum(used) + 1, layout.padded_bytes // 4), torch.nan)
    kv = raw[:, : layout.kv_bytes // 4].unflatten(1, (KV_HEADS, PAGE, 2 * SIZE))
    table, page = torch.zeros(3, 32, dtype=torch.int32), 1
    for row, (n, pages) in enumerate(zip(LENGTHS, used, strict=True)):
        table[row, :pages] = torch.arange(page, page + pages)
        for i in range(pages):
            some = min(PAGE, n - i * PAGE)
            kv[page + i, :, :some] = torch.randn(KV_HEADS, some, 2 * SIZE, generator=draw)
        page += pages
    index = IndexState(
        Maps.allocate(KV_HEADS, SIZE, layout.directions, torch.float32, "cpu"),
        torch.zeros(len(Count), dtype=torch.int64),
    )
    layer = SimpleNamespace(name="layer", state=None, index=index, served=True)
    rings = np.array([-1, OPTED_OUT, -1], dtype=np.int32)

    def common(mixed: bool) -> CommonAttentionMetadata:
        rows, counts = (3, [1, 1, CHUNK]) if mixed else (2, [1, 1])
        begin, lengths = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(LENGTHS[:rows], dtype=torch.int32)
        no = np.zeros(rows, bool)
        monkeypatch.setattr(cuda, "row_rings", lambda _: RowRings(rings[:rows], no, no, np.ones(rows, np.float32), no))
        return CommonAttentionMetadata(
            query_start_loc=begin, query_start_loc_cpu=begin, seq_lens=lengths, num_reqs=rows, num_actual_tokens=sum(counts),
            max_query_len=max(counts), max_seq_len=500, block_table_tensor=table[:rows],
            slot_mapping=torch.zeros(sum(counts), dtype=torch.int64), seq_lens_cpu_upper_bound=lengths,
            is_prefilling=torch.tensor([False, False, True])[:rows],
        )  # fmt: skip

    builder = object.__new__(cuda.MacCUDAMetadataBuilder)
    vars(builder).update(
        decoder=decoder, config=MacConfig(min_context=128, band=64), all_served=True, served=[layer],
        _planned=MagicMock(), _facts={}, device=torch.device("cpu"), _written={"ring": decoder.ring.clone().numpy()},
        cache_config=MagicMock(), q_data_type_prefill=torch.float32, q_data_type_decode=torch.float32,
        group=MagicMock(decoder=decoder),
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(kv_cache=kv)},
        )),
    )  # fmt: skip
    base = lambda builder, prefix, common, fast: cuda.FlashInferMetadata(
        num_actual_tokens=CHUNK + 2, slot_mapping=common.slot_mapping, q_data_type_prefill=torch.float32, kv_cache_layout="NHD",
        q_data_type_decode=torch.float32, num_decodes=2, num_decode_tokens=2, num_prefills=1, num_prefill_tokens=CHUNK,
        causal=True, prefill=None, decode=None,
    )  # fmt: skip
    monkeypatch.setattr(cuda.FlashInferMetadataBuilder, "build", base)
    monkeypatch.setattr(cuda.FlashInferImpl, "forward", lambda impl, layer, query, *rest: rest[-1].fill_(7))
    impl = object.__new__(cuda.MacCUDAImpl)
    impl.mac = layer
    query = torch.randn(CHUNK + 2, HEADS, SIZE, generator=draw)
    return SimpleNamespace(
        cuda=cuda,
        builder=builder,
        decoder=decoder,
        impl=impl,
        common=common,
        index=index,
        kv=kv,
        table=table,
        query=query,
        rule=rule,
    )


def decoded(case) -> torch.Tensor:
    """What the oracle gives the two rows."""
    position, exact = torch.tensor([499, 299]), torch.tensor([False, True])
    found = lookup.decode(
        position, exact, case.query[:2], case.kv, case.table, case.decoder.layout, case.index.maps, case.rule
    )
    return found.out


def test_maps_are_learned_from_a_prefilled_row_and_rows_are_looked_up(case):
    metadata = case.builder._build(case.common(True), False, capture=False)
    step = metadata.step
    assert (step.learning.begin, step.learning.end, step.learning.length) == (2, CHUNK + 2, 400)
    out = torch.full_like(case.query, torch.nan)
    case.impl.forward(None, case.query, None, None, case.kv, metadata, out)
    assert (out[2:] == 7).all() and case.index.maps.ready.item() == 1 and case.decoder.learned == 400
    torch.testing.assert_close(out[:2], decoded(case), rtol=1e-4, atol=1e-4)
    whole = case.index.counts[Count.REQUEST].item()
    assert whole == HEADS and case.index.counts[Count.HIT] == HEADS and case.index.counts[Count.SKIPPED] > 0
    codes, _ = case.decoder.layout.views(case.kv)
    page = int(case.table[0, 3])
    want, _ = encode(*case.kv[page].chunk(2, -1), case.index.maps)
    torch.testing.assert_close(codes[page], want, rtol=0, atol=0)
    # A row no longer than 1.25 times the first teaches nothing new.
    assert case.builder._build(case.common(True), False, capture=False).step.learning is None


def test_rows_are_read_whole_before_maps_are_learned(case):
    metadata = case.builder._build(case.common(False), False, capture=False)
    assert metadata.step.learning is None and metadata.step.rows.position.tolist() == [499, 299]
    out = torch.full_like(case.query[:2], torch.nan)
    case.impl.forward(None, case.query[:2], None, None, case.kv, metadata, out)
    torch.testing.assert_close(out, decoded(case), rtol=1e-5, atol=1e-5)
    assert case.index.counts[Count.SKIPPED] == 0 and case.index.counts[Count.READ] == (500 + 300) * KV_HEADS


def test_a_captured_batch_has_rows_that_do_nothing(case):
    metadata = case.builder.build_for_cudagraph_capture(case.common(False))
    out = torch.full_like(case.query[:2], torch.nan)
    case.impl.forward(None, case.query[:2], None, None, case.kv, metadata, out)
    assert out.isnan().all() and not case.index.counts.any()


@pytest.mark.parametrize("mixed", [True, False])
def test_written_pages_are_indexed(case, monkeypatch, mixed):
    """`do_kv_cache_update` indexes the pages whose last slot it writes; of rows that decode it writes keys and values too."""
    metadata = case.builder._build(case.common(mixed), False, capture=False)
    monkeypatch.setattr(case.cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"layer": metadata}))
    case.index.maps.to_key.normal_(), case.index.maps.shift.normal_()
    case.impl.mac.group = SimpleNamespace(decoder=case.decoder)
    last, part = 2 * PAGE - 1, 3 * PAGE + 4  # of page 1 the last slot, of page 3 another
    expected = case.kv.clone()
    key, value = torch.randn(2, 3, KV_HEADS, SIZE)
    base = []
    monkeypatch.setattr(case.cuda.FlashInferImpl, "do_kv_cache_update", lambda *given: base.append(given))
    if not mixed:
        for page, token, i in ((1, PAGE - 1, 0), (3, 4, 1)):
            expected[page, :, token] = torch.cat((key[i], value[i]), -1)
    case.impl.do_kv_cache_update(None, key, value, case.kv, torch.tensor([last, part, -1]))
    assert len(base) == mixed and torch.equal(case.kv.nan_to_num(), expected.nan_to_num())
    codes, means = case.decoder.layout.views(case.kv)
    want, mean = encode(*case.kv[1].chunk(2, -1), case.index.maps)
    torch.testing.assert_close(codes[1], want, rtol=0, atol=0)
    torch.testing.assert_close(means[1], mean)
    assert means[3].isnan().all()
