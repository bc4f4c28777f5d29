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
from vllm_mac import kv_group, lookup
from vllm_mac.config import MacConfig
from vllm_mac.counters import IN_SMALL_STEP, OPTED_OUT, PREFILLED, Count
from vllm_mac.key_index import FEW, FP8, Lessons, Maps, Scales, encode, numbers
from vllm_mac.requests import RowRings
from vllm_mac.state import Geometry, IndexRule, IndexState, Rows

pytestmark = pytest.mark.cpu
HEADS, KV_HEADS, SIZE, PAGE, CHUNK = 6, 2, 64, 16, 96
LENGTHS = (500, 300, 400)  # two rows that decode, and one whose last CHUNK tokens are prefilled


@pytest.fixture
def case(monkeypatch, request):
    """With a pair as parameter, its scales, the cache is FP8, in bytes as vLLM has it. A number: tokens of a row at most."""
    given = getattr(request, "param", None) or 4
    at_once = given if isinstance(given, int) else 4
    scales = None if isinstance(given, int) else Scales(*map(torch.tensor, given))
    dtype = FP8 if scales else torch.float32
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    cuda = gpu_backend()
    monkeypatch.setattr(cuda, "executing", lambda: True)
    rule = IndexRule(1.5, 64, 16, 128, SIZE**-0.5)
    geometry = Geometry(
        4, HEADS, KV_HEADS, SIZE, PAGE, 32, torch.float32, 64, 16, SIZE**-0.5, at_once=at_once, fp8=bool(scales)
    )
    decoder = cuda.LookupDecoder(geometry, rule, None, torch.device("cpu"))
    layout = decoder.layout
    used = [-(-n // PAGE) for n in LENGTHS]
    raw = torch.full((sum(used) + 1, layout.padded_bytes // dtype.itemsize), torch.nan).to(dtype)
    kv = raw[:, : layout.kv_bytes // dtype.itemsize].unflatten(1, (KV_HEADS, PAGE, 2 * SIZE))
    table, page = torch.zeros(3, 32, dtype=torch.int32), 1
    for row, (n, pages) in enumerate(zip(LENGTHS, used, strict=True)):
        table[row, :pages] = torch.arange(page, page + pages)
        for i in range(pages):
            some = min(PAGE, n - i * PAGE)
            kv[page + i, :, :some] = torch.randn(KV_HEADS, some, 2 * SIZE, generator=draw).to(dtype)
        page += pages
    index = IndexState(
        Maps.allocate(KV_HEADS, SIZE, layout.directions, torch.float32, "cpu", scales),
        torch.zeros(len(Count), dtype=torch.int64),
    )
    kv = kv.view(torch.uint8) if scales else kv
    layer = SimpleNamespace(name="layer", state=None, index=index, by_index=index, served=True, rows=lambda kv: kv)
    rings, begun = np.array([-1, OPTED_OUT, -1], dtype=np.int32), np.zeros(3, bool)

    def common(mixed: bool, counts: tuple = (1, 1, CHUNK)) -> CommonAttentionMetadata:
        """counts: tokens of each row, the last one only if `mixed`; the first two verify what is more than one."""
        rows = 3 if mixed else 2
        counts = counts[:rows]
        begin, lengths = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(LENGTHS[:rows], dtype=torch.int32)
        no, verifies = np.zeros(rows, bool), (np.array(counts) > 1) & (np.arange(rows) < 2)
        found = RowRings(rings[:rows], no, no, np.ones(rows, np.float32), no, verifies, begun[:rows])
        monkeypatch.setattr(cuda, "row_rings", lambda _: found)
        return CommonAttentionMetadata(
            query_start_loc=begin, query_start_loc_cpu=begin, seq_lens=lengths, num_reqs=rows, num_actual_tokens=sum(counts),
            max_query_len=max(counts), max_seq_len=500, block_table_tensor=table[:rows],
            slot_mapping=torch.zeros(sum(counts), dtype=torch.int64), seq_lens_cpu_upper_bound=lengths,
            is_prefilling=torch.tensor([False, False, True])[:rows],
        )  # fmt: skip

    group = kv_group.Group([], SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})), "cpu")
    layer.cache, layer.config, layer.group = numbers(kv), MacConfig(min_context=128, band=64), group
    group.layers, group.decoder = [layer], decoder
    builder = object.__new__(cuda.MacCUDAMetadataBuilder)
    vars(builder).update(
        decoder=decoder, config=layer.config, all_run=True, most=1, served=[layer],
        _planned=MagicMock(), _least=0, _facts={}, device=torch.device("cpu"), _written={"ring": decoder.ring.clone().numpy()},
        cache_config=MagicMock(), q_data_type_prefill=torch.float32, q_data_type_decode=torch.float32,
        group=group,
        vllm_config=SimpleNamespace(compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(kv_cache=kv)},
        )),
    )  # fmt: skip
    base = lambda builder, prefix, common, fast: cuda.FlashInferMetadata(
        num_actual_tokens=common.num_actual_tokens, slot_mapping=common.slot_mapping, q_data_type_prefill=torch.float32,
        q_data_type_decode=torch.float32, num_decodes=2, num_decode_tokens=common.num_actual_tokens - CHUNK, num_prefills=1,
        num_prefill_tokens=CHUNK, kv_cache_layout="NHD", causal=True, prefill=None, decode=None,
    )  # fmt: skip
    monkeypatch.setattr(cuda.FlashInferMetadataBuilder, "build", base)
    monkeypatch.setattr(cuda.FlashInferImpl, "forward", lambda impl, layer, query, *rest: rest[-1].fill_(7))
    impl = object.__new__(cuda.MacCUDAImpl)
    impl.mac = layer
    query = torch.randn(CHUNK + 8, HEADS, SIZE, generator=draw)
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
        begun=begun,
    )


def decoded(case, counts: tuple = (1, 1), whole: tuple = (1,)) -> torch.Tensor:
    """What the oracle gives the first rows. counts: tokens of each. whole: the rows that are read whole."""
    begin = torch.tensor((0, *counts)).cumsum(0)
    position = torch.tensor(LENGTHS[: len(counts)]) - torch.tensor(counts)
    ring = torch.tensor([OPTED_OUT if row in whole else -1 for row in range(len(counts))])
    rows = Rows(position, ring, position, position, case.table, begin)
    query = case.query[: begin[-1]]
    return lookup.decode(rows, query, numbers(case.kv), case.decoder.layout, case.index.maps, case.rule).out


SCALES = (0.5, 3.0)


@pytest.mark.parametrize("case", [None, SCALES], indirect=True)
def test_maps_are_learned_from_a_prefilled_row_and_rows_are_looked_up(case):
    metadata = case.builder._build(case.common(True), False, capture=False)
    step = metadata.step
    assert (step.learning.begin, step.learning.end, step.learning.length) == (2, CHUNK + 2, 400)
    out = torch.full_like(case.query[: CHUNK + 2], torch.nan)
    case.impl.forward(None, case.query[: CHUNK + 2], None, None, case.kv, metadata, out)
    assert (out[2:] == 7).all() and case.decoder.lessons == Lessons(1, 400, 400)
    # With FP8 weights are float16, so off by 2^-11 of themselves at most; values reach 12.
    off = 12 * 2**-11 if case.index.maps.scales else 1e-4
    # Until the next step everything is read.
    assert not case.index.maps.ready and case.index.counts[Count.NO_MAPS] == HEADS
    torch.testing.assert_close(out[:2], decoded(case), rtol=1e-4, atol=off)
    metadata = case.builder._build(case.common(False), False, capture=False)
    assert case.index.maps.ready.item() == 1
    case.index.counts.zero_()
    out = out[:2].fill_(torch.nan)
    case.impl.forward(None, case.query[:2], None, None, case.kv, metadata, out)
    torch.testing.assert_close(out, decoded(case), rtol=1e-4, atol=off)
    whole = case.index.counts[Count.REQUEST].item()
    assert whole == HEADS and case.index.counts[Count.HIT] == HEADS and case.index.counts[Count.SKIPPED] > 0
    kv = numbers(case.kv)
    codes, _ = case.decoder.layout.views(kv)
    page = int(case.table[0, 3])
    want, _ = encode(*kv[page].chunk(2, -1), case.index.maps)
    torch.testing.assert_close(codes[page], want, rtol=0, atol=0)
    # As the second text it is learned from, and makes no maps. After many texts it teaches nothing new.
    made, moments = case.index.maps.to_key.clone(), case.index.maps.moments.mean.clone()
    teach(case)
    assert case.decoder.lessons == Lessons(2, 800, 400) and torch.equal(case.index.maps.to_key, made)
    torch.testing.assert_close(case.index.maps.moments.mean, moments)  # the text is the same
    case.decoder.lessons = Lessons(FEW, 800, 400)
    assert case.builder._build(case.common(True), False, capture=False).step.learning is None


def test_rows_are_read_whole_before_maps_are_learned(case):
    metadata = case.builder._build(case.common(False), False, capture=False)
    assert metadata.step.learning is None and metadata.step.rows.position.tolist() == [499, 299]
    out = torch.full_like(case.query[:2], torch.nan)
    case.impl.forward(None, case.query[:2], None, None, case.kv, metadata, out)
    torch.testing.assert_close(out, decoded(case), rtol=1e-5, atol=1e-5)
    assert case.index.counts[Count.SKIPPED] == 0 and case.index.counts[Count.READ] == (500 + 300) * KV_HEADS


def test_a_draft_s_layer_reads_everything(case, monkeypatch):
    """In the batch of the model's own layers, which verifies, and in batches of its own, while no requests are executed."""
    case.index.maps.ready.fill_(0)
    draft = SimpleNamespace(name="draft", state=None, index=None, by_index=case.index, served=False, rows=lambda kv: kv)
    case.impl.mac, case.builder.most = draft, 4
    counts = (3, 1, CHUNK)
    metadata = case.builder._build(case.common(True, counts), False, capture=False)
    out = torch.full_like(case.query[: sum(counts)], torch.nan)
    metadata.num_decodes, metadata.num_decode_tokens = 2, 4
    case.impl.forward(None, case.query[: sum(counts)], None, None, case.kv, metadata, out)
    assert metadata.step.learning is not None and not metadata.step.learning.moments and (out[4:] == 7).all()
    torch.testing.assert_close(out[:4], decoded(case, counts[:2], whole=(0, 1)), rtol=1e-5, atol=1e-5)

    case.builder.served = []
    monkeypatch.setattr(case.cuda, "executing", lambda: False)
    common = case.common(False)
    monkeypatch.setattr(case.cuda, "row_rings", None)  # no request's rows are known
    case.builder._build(common, False, capture=True)
    assert case.decoder.position.tolist() == [-1] * 4
    common.seq_lens -= 1
    metadata = case.builder._build(common, False, capture=False)
    assert metadata.step.rows.position.tolist() == [498, 298] and metadata.step.learning is None
    common.seq_lens += 1  # vLLM's own step
    case.builder.update_draft_decode_metadata(metadata)
    assert metadata.step.rows.position.tolist() == [499, 299]
    out = torch.full_like(case.query[:2], torch.nan)
    case.impl.forward(None, case.query[:2], None, None, case.kv, metadata, out)
    torch.testing.assert_close(out, decoded(case, whole=(0, 1)), rtol=1e-5, atol=1e-5)
    assert case.index.counts[Count.SKIPPED] == 0


def test_rows_that_began_are_indexed_before_the_next_step(case):
    """A KV connector may have written their pages; one may be captured, or a dummy batch run, between the two steps."""
    case.decoder.lessons = Lessons(FEW, 500, 500)  # so that this batch teaches nothing, which would index all pages
    case.index.maps.to_key.normal_(), case.index.maps.shift.normal_()
    codes, means = case.decoder.layout.views(case.kv)
    codes.zero_()
    case.begun[:] = [False, True, True]
    case.builder._build(case.common(True), False, capture=False)
    case.builder.build_for_cudagraph_capture(case.common(False))
    assert not codes.any()
    case.begun[:] = False
    case.builder._build(case.common(False), False, capture=False)
    for row, tokens in enumerate(LENGTHS):
        for page in case.table[row, : tokens // PAGE].tolist():
            want, mean = encode(*case.kv[page].chunk(2, -1), case.index.maps)
            torch.testing.assert_close(codes[page], want if row else torch.zeros_like(want), rtol=0, atol=0)
            assert row == 0 or torch.allclose(means[page], mean)
        assert not codes[case.table[row, tokens // PAGE]].any()


@pytest.mark.parametrize("counts", [(1, 1), (4, 4)])
def test_a_captured_batch_has_rows_that_do_nothing(case, counts):
    case.builder.most = 4
    metadata = case.builder.build_for_cudagraph_capture(case.common(False, counts))
    assert (metadata.step.rows.begin is None) == (counts == (1, 1))
    out = torch.full_like(case.query[:8], torch.nan)
    case.impl.forward(None, case.query[:8], None, None, case.kv, metadata, out)
    assert out.isnan().all() and not case.index.counts.any()


def teach(case) -> None:
    """Have the third row, prefilled, teach maps, and count from nought."""
    metadata = case.builder._build(case.common(True), False, capture=False)
    tokens = case.query[: CHUNK + 2]
    case.impl.forward(None, tokens, None, None, case.kv, metadata, torch.empty_like(tokens))
    case.builder._build(case.common(False), False, capture=False)  # the next step
    case.index.counts.zero_()


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_that_verify_speculated_tokens_are_looked_up(case, mixed):
    """As many tokens as each has; the second row's request opted out. Prefilled tokens stay FlashInfer's."""
    teach(case)
    case.builder.most = 4
    metadata = case.builder._build(case.common(mixed, (3, 2, CHUNK)), False, capture=False)
    rows = metadata.step.rows
    assert (
        rows.begin.tolist() == [0, 3, 5]
        and rows.position.tolist() == [497, 298]
        and rows.ring.tolist() == [-1, OPTED_OUT]
    )
    assert (metadata.step.rest is not None) == mixed
    tokens = 5 + CHUNK * mixed
    out = torch.full_like(case.query[:tokens], torch.nan)
    case.impl.forward(None, case.query[:tokens], None, None, case.kv, metadata, out)
    assert (out[5:] == 7).all()
    torch.testing.assert_close(out[:5], decoded(case, (3, 2)), rtol=1e-4, atol=1e-4)
    counts = case.index.counts
    assert counts[Count.HIT] == 3 * HEADS and counts[Count.REQUEST] == 2 * HEADS and counts[Count.SKIPPED] > 0
    assert counts[Count.READ] + counts[Count.SKIPPED] == (500 + 300) * KV_HEADS


@pytest.mark.parametrize("case", [12], indirect=True)
@pytest.mark.parametrize("counts, begin, position", [
    ((8, 3), [0, 6, 8, 11, 11], [492, 498, 297, -1]), ((12, 1), [0, 6, 12, 13, 13], [488, 494, 299, -1]),
])  # fmt: skip
def test_rows_of_more_tokens_than_a_program_holds_take_two_parts(case, counts, begin, position):
    """Programs hold six tokens of three heads here, of the twelve that a row may decode."""
    teach(case)
    case.builder.most, decoder = 12, case.decoder
    lasting = {x.data_ptr() for x in decoder.lasting().values()}
    for tensor in [x for x in vars(decoder).values() if isinstance(x, torch.Tensor) and x.data_ptr() not in lasting]:
        tensor.fill_(7)  # as a deep sleep leaves what it does not keep
    metadata = case.builder._build(case.common(False, counts), False, capture=False)
    rows = metadata.step.rows
    assert (rows.begin.tolist(), rows.position.tolist()) == (begin, position)
    assert rows.ring.tolist() == [-1, -1, OPTED_OUT, OPTED_OUT] and len(rows.block_table) == 2
    tokens = sum(counts)
    out = torch.full_like(case.query[:tokens], torch.nan)
    case.impl.forward(None, case.query[:tokens], None, None, case.kv, metadata, out)
    own = lookup.decode(
        Rows(*[torch.tensor(x) for x in (position, [-1, -1, OPTED_OUT, OPTED_OUT], position, position)],
             case.table[:2], torch.tensor(begin)),
        case.query[:tokens], numbers(case.kv), case.decoder.layout, case.index.maps, case.rule,
    )  # fmt: skip
    torch.testing.assert_close(out, own.out, rtol=1e-4, atol=1e-4)
    found, read = case.index.counts, own.read.unflatten(0, (2, 2)).sum(1)  # [requests, K]
    assert found[Count.HIT] == counts[0] * HEADS and found[Count.REQUEST] == counts[1] * HEADS
    assert abs(found[Count.READ] - read.sum()) <= 4  # shares within rounding of the threshold
    assert abs(found[Count.SKIPPED] - (torch.tensor([[500], [300]]) - read).clamp(min=0).sum()) <= 4


def test_a_few_tokens_of_a_prompt_beside_rows_that_verify_are_exact(case):
    teach(case)
    case.builder.most = 4
    metadata = case.builder._build(case.common(True, (4, 1, 3)), False, capture=False)
    rows = metadata.step.rows
    assert (
        metadata.step.rest is None and rows.begin.tolist() == [0, 4, 5, 8] and rows.position.tolist() == [496, 299, 397]
    )
    assert rows.ring.tolist() == [-1, OPTED_OUT, PREFILLED]
    out = torch.full_like(case.query[:8], torch.nan)
    case.impl.forward(None, case.query[:8], None, None, case.kv, metadata, out)
    torch.testing.assert_close(out, decoded(case, (4, 1, 3), whole=(1, 2)), rtol=1e-4, atol=1e-4)
    assert case.index.counts[Count.HIT] == 4 * HEADS and case.index.counts[Count.REQUEST] == HEADS


@pytest.mark.parametrize("counts, least, looked", [
    ((1, 1), 500, True), ((1, 1), 501, False), ((4, 3), 250, True), ((4, 3), 251, False), ((4, 3), 0, True),
])  # fmt: skip
def test_a_small_step_is_read_whole(case, counts, least, looked):
    """Row 1 opted out, so row 0's 500 tokens are all that there is to look up: enough for twice as few where it decodes
    four. The next step may have more."""
    teach(case)
    case.builder.most, case.builder._least = 4, least
    tokens = sum(counts)
    metadata = case.builder._build(case.common(False, counts), False, capture=False)
    assert metadata.step.rows.ring.tolist() == [-1 if looked else IN_SMALL_STEP, OPTED_OUT]
    out = torch.full_like(case.query[:tokens], torch.nan)
    case.impl.forward(None, case.query[:tokens], None, None, case.kv, metadata, out)
    whole = (1,) if looked else (0, 1)
    torch.testing.assert_close(out, decoded(case, counts, whole), rtol=1e-4, atol=1e-4)
    found = case.index.counts
    assert (
        found[Count.HIT if looked else Count.SMALL_STEP] == counts[0] * HEADS and (found[Count.SKIPPED] > 0) == looked
    )
    case.builder._least = 250
    again = case.builder._build(case.common(False, counts), False, capture=False)
    assert again.step.rows.ring.tolist() == [-1, OPTED_OUT]


@pytest.mark.parametrize("least, marked", [(400, False), (401, True)])
def test_short_rows_are_none_of_a_small_step(case, least, marked):
    """They count neither for it nor as of it: of 400, 100 and 300 tokens the second is below `min_context`, 128."""
    case.builder._least = least
    ring = case.builder._worth(np.array([-1, -1, OPTED_OUT]), np.array([400, 100, 300]), 1)
    assert ring.tolist() == [IN_SMALL_STEP if marked else -1, -1, OPTED_OUT]


def test_least_tokens_of_a_step_that_is_looked_up():
    """`min_step_mib` of a layer's keys and values: 2 KV heads of 128 numbers of 2 bytes, so 1 KiB a token."""
    cuda = gpu_backend()
    geometry = lambda **kinds: Geometry(4, 12, 2, 128, 16, 32, torch.bfloat16, 64, 16, 0.1, **kinds)
    assert cuda.least_tokens(48, geometry()) == 48 * 1024
    assert cuda.least_tokens(48, geometry(fp8=True)) == 96 * 1024
    assert cuda.least_tokens(0, geometry()) == 0


def test_rows_of_padding_decode_nothing(case):
    """As a graph has them behind its rows: without tokens, and of length 0."""
    teach(case)
    case.builder.most = 4
    common = case.common(True, (4, 3, 0))
    common.seq_lens, common.seq_lens_cpu_upper_bound = (torch.tensor([500, 300, 0], dtype=torch.int32) for _ in "ab")
    metadata = case.builder._build(common, False, capture=False)
    assert metadata.step.rows.position.tolist() == [496, 297, -1]
    out = torch.full_like(case.query[:8], torch.nan)
    case.impl.forward(None, case.query[:8], None, None, case.kv, metadata, out)
    assert out[7].isnan().all() and not out[:7].isnan().any()


@pytest.mark.parametrize(
    "served, most, base, support",
    [
        ((True, True), (4, 4), "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH"),
        ((True, True), (4, 1), "UNIFORM_BATCH", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ((True, False), (4, 1), "UNIFORM_BATCH", "UNIFORM_BATCH"),
        ((True, False), (4, 4), "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ((True, False), (4, 4), "ALWAYS", "UNIFORM_BATCH"),
        ((False, False), (4, 4), "UNIFORM_BATCH", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ((True, "draft"), (4, 4), "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH"),
        ((True, "apart"), (4, 1), "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH"),
        ((True, "draft", False), (4, 4, 1), "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_SINGLE_TOKEN_DECODE"),
    ],
)
def test_which_steps_are_in_graphs(case, monkeypatch, served, most, base, support):
    """served: of each layer whether MAC serves it, runs it for a draft, or a draft's steps are no part of graphs. most: tokens of a row that MAC decodes at once in
    each. base: what FlashInfer's own builder says."""
    cuda, drafting = case.cuda, {"draft": case.index}
    layers = [SimpleNamespace(served=of is True, drafting=drafting.get(of), apart=of == "apart") for of in served]
    monkeypatch.setattr(cuda, "mac_layers", lambda _: layers)
    monkeypatch.setattr(cuda, "at_once", lambda layer: most[[layer is one for one in layers].index(True)])
    levels = cuda.AttentionCGSupport
    monkeypatch.setattr(cuda.FlashInferMetadataBuilder, "get_cudagraph_support", lambda *_: levels[base])
    assert cuda.MacCUDAMetadataBuilder.get_cudagraph_support(None, None) is levels[support]


@pytest.mark.parametrize("case", [None, SCALES], indirect=True)
@pytest.mark.parametrize("mixed, counts", [(True, (1, 1, CHUNK)), (False, (1, 1)), (False, (2, 1))])
def test_written_pages_are_indexed(case, monkeypatch, mixed, counts):
    """`do_kv_cache_update` indexes the pages whose last slot it writes; where all rows decode it writes keys and values too,
    of which two of a row may lie in one page. Else FlashInfer writes them first."""
    case.builder.most = 4
    metadata = case.builder._build(case.common(mixed, counts), False, capture=False)
    monkeypatch.setattr(case.cuda, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"layer": metadata}))
    case.index.maps.to_key.normal_(), case.index.maps.shift.normal_()
    case.impl.mac.group = SimpleNamespace(decoder=case.decoder)
    last, part = 2 * PAGE - 1, 3 * PAGE + 4  # of page 1 the last slot, of page 3 another
    slots = [last - 1, last, part] if counts == (2, 1) else [last, part, -1]
    kv, scales = numbers(case.kv), case.index.maps.scales
    expected = kv.float().clone()
    key, value = torch.randn(2, 3, KV_HEADS, SIZE)
    base = []
    monkeypatch.setattr(case.cuda.FlashInferImpl, "do_kv_cache_update", lambda *given: base.append(given))
    for i, slot in enumerate(slots * (not mixed)):
        if slot >= 0:
            pair = (key[i] / scales.key, value[i] / scales.value) if scales else (key[i], value[i])
            expected[slot // PAGE, :, slot % PAGE] = torch.cat(pair, -1).to(kv.dtype).float()
    case.impl.do_kv_cache_update(None, key, value, case.kv, torch.tensor(slots))
    assert len(base) == mixed and torch.equal(kv.float().nan_to_num(), expected.nan_to_num())
    assert not base or base[0][4] is case.kv  # bytes, where it has those
    codes, means = case.decoder.layout.views(kv)
    want, mean = encode(*kv[1].chunk(2, -1), case.index.maps)
    torch.testing.assert_close(codes[1], want, rtol=0, atol=0)
    torch.testing.assert_close(means[1], mean.to(means.dtype))
    assert means[3].isnan().all()
