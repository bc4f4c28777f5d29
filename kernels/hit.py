"""One kernel for match, amend and complete of the KV groups that hit.

The programs of a (row, KV head) pair are independent of one another: some attend to the band
and the sink, the others each scan a part of one head's ring. The last of them to finish reads what
all of them found, decides, attends to the tokens that the match leaves to read, merges and records. So the
step is one launch, and the last part of one group overlaps the first parts of the others.

`paged.decode` is the oracle.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from vllm_mac import counters, limits
from vllm_mac.counters import Count
from vllm_mac.kernels.amend import add_bands, amend, attend_band
from vllm_mac.kernels.launch import REGISTER_LIMITS, launch, power_of_two
from vllm_mac.kernels.match import choose, scan
from vllm_mac.kernels.merge import complete_hit, leave_miss
from vllm_mac.kernels.partial import LOG2_E
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.state import LayerState, Rows

OPTED_OUT = tl.constexpr(counters.OPTED_OUT)
# Device code reads no enumeration.
HIT, MISS = tl.constexpr(Count.HIT.value), tl.constexpr(Count.MISS.value)
SHORT_CONTEXT, NO_RING = tl.constexpr(Count.SHORT_CONTEXT.value), tl.constexpr(Count.NO_RING.value)
OVER_BUDGET, REQUEST = tl.constexpr(Count.OVER_BUDGET.value), tl.constexpr(Count.REQUEST.value)
READ, SKIPPED = tl.constexpr(Count.READ.value), tl.constexpr(Count.SKIPPED.value)


@triton.jit
def _exact_kind(ring, m, MIN_CONTEXT: tl.constexpr):
    """The counter of heads that may not try to match, at position `m`."""
    return tl.where(ring == OPTED_OUT, REQUEST, tl.where(m + 1 < MIN_CONTEXT, SHORT_CONTEXT, NO_RING))


@triton.jit(do_not_specialize=("s_table_row",))  # as wide as the longest sequence may be
def hit_kernel(
    p_query, p_cos_sin, p_position, p_ring, p_first, p_slack, p_table, p_kv,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    p_out, p_source, p_hit, p_counters, p_key, p_key_lse, p_band_acc, p_band_sum, p_part_out, p_part_lse,
    p_arrived, p_paused,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_out_row, s_out_head,
    log2_scale, bound, loosest, strict, lag_weight, mass_floor,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, SINK: tl.constexpr, WHOLE: tl.constexpr, MIN_CONTEXT: tl.constexpr, MAX_CHAIN: tl.constexpr,
    LAGGED: tl.constexpr, RELATIVE: tl.constexpr, ANCHORED: tl.constexpr, WEIGHED: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
    NS: tl.constexpr, BW: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    NB: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    BQ: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BNS: tl.constexpr,
    BP: tl.constexpr, BAND_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_part, i_k, i_row)` of a group's `NB + G * NS`: the first `NB` attend to a part of band and sink each,
    the others scan a part of one head's ring. The last of them to finish does everything from phase 4 on."""
    # 1. Which row, and whether it may match.
    if PDL:
        # Without `gdc_launch_dependents`: where a model's weights are read before and after, programs of `exact.prefix_kernel`
        # that wait beside these cost more than an early start saves (batch 1, all missed, 32K tokens: 68 us instead of 58).
        gdc_wait()
    i_part, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    H: tl.constexpr = K * G
    m = tl.load(p_position + i_row).to(tl.int32)
    ring = tl.load(p_ring + i_row).to(tl.int64)
    first = tl.load(p_first + i_row).to(tl.int32)
    # What the layer allows at most, or the row's request where it asked for less.
    bound = tl.minimum(bound, loosest * tl.load(p_slack + i_row))
    if m < 0:
        return
    # A row without a ring has nothing to record: an engine that completes the misses reads its band too.
    whole = False
    if WHOLE:
        whole = ring < 0
        if SINK == 0:
            if whole:
                if i_part == 0:
                    o_g = tl.arange(0, BG)
                    tl.store(p_source + i_row * H + i_k * G + o_g, tl.full((BG,), -1, tl.int32), mask=o_g < G)
                    tl.store(p_hit + i_row * K + i_k, 0)
                    if i_k == 0:
                        kind = _exact_kind(ring, m, MIN_CONTEXT)
                        tl.atomic_add(p_counters + kind, tl.full((), H, tl.int64), sem="relaxed")
                        tl.atomic_add(p_counters + READ, K * (m + 1).to(tl.int64), sem="relaxed")
                return
    able = (ring >= 0) & (m + 1 >= MIN_CONTEXT)
    matching = able
    if p_paused is not None:
        matching = able & (tl.load(p_paused) == 0)
    if (i_part >= NB) & (not matching):
        return

    sink_end = tl.minimum(m + 1, SINK)
    band_start = tl.where(whole, m + 1, tl.maximum(m + 1 - BAND, sink_end))
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    # `tl.dot` takes 16 rows or more; those past the group's heads attend to no token.
    o_q = tl.arange(0, BQ)
    m_q = o_q < G
    p_group_query = p_query + i_row * s_query_row + i_k * G * s_query_head
    p_q = p_group_query + (o_q * s_query_head)[:, None] + o_d[None, :]
    m_qd = m_q[:, None] & m_d[None, :]
    p_row_table = p_table + i_row * s_table_row
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head

    # The block table before the band, wherever the match will be: one access to memory less after it.
    column = tl.maximum(m + 1 - BAND - W, 0) // PAGE
    o_p = column + tl.arange(0, BP)
    columns = tl.load(p_row_table + o_p, mask=o_p <= m // PAGE, other=0)  # [BP]

    # 2. This program's part: of band and sink, or of a head's ring.
    if i_part < NB:
        q = tl.load(p_q, mask=m_qd, other=0.0)  # [BQ, BD]
        band = m + 1 - band_start
        stop = tl.minimum((i_part + 1) * CHUNK, band + sink_end)
        peak, total, acc = attend_band(
            q, i_part, band_start, band, stop, p_row_table, p_head_kv, s_kv_page, s_kv_token, log2_scale, m_q, o_d, m_d,
            D, PAGE, BQ, BD, BN, CHUNK, BAND_STAGES,
        )  # fmt: skip
        o_part = ((i_row * K + i_k) * NB + i_part) * G + o_q
        tl.store(p_band_sum + o_part * 2, peak, mask=m_q)
        tl.store(p_band_sum + o_part * 2 + 1, total, mask=m_q)
        tl.store(p_band_acc + o_part[:, None] * D + o_d[None, :], acc, mask=m_qd)
    else:
        i_scan = i_part - NB
        i_h = i_k * G + i_scan // NS
        i_s = i_scan % NS
        o_ring = (ring * H + i_h) * W
        key, lse = scan(
            p_group_query + (i_scan // NS) * s_query_head, p_cos_sin,
            p_ring_query + o_ring * D, p_ring_chain + o_ring, p_ring_lse + o_ring, m, first,
            i_s * SPAN, tl.minimum((i_s + 1) * SPAN, W), bound, strict, lag_weight,
            D, BD, ROTARY, NEOX, W, BAND, SINK, MAX_CHAIN, LAGGED, RELATIVE, WEIGHED,
            BW, SPAN, HALVES, SCAN_STAGES,
        )  # fmt: skip
        tl.store(p_key + (i_row * H + i_h) * NS + i_s, key)
        tl.store(p_key_lse + (i_row * H + i_h) * NS + i_s, lse)

    # 3. The last of the group's programs goes on, the others end.
    # Everything above must be visible before this program counts as arrived.
    tl.debug_barrier()
    p_count = p_arrived + i_row * K + i_k
    arrived = tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu")
    if arrived != tl.where(matching, NB + G * NS, NB) - 1:
        return
    tl.store(p_count, 0)  # for the next step

    # 4. Merge the parts: attention over band and sink, and the entry that each head matches.
    o_g = tl.arange(0, BG)
    m_g = o_g < G
    m_gd = m_g[:, None] & m_d[None, :]
    o_h = i_k * G + o_g
    # A load that need not wait for the match.
    q = tl.load(p_q, mask=m_qd, other=0.0)  # [BQ, BD]
    i_bk = i_row * K + i_k
    rest, rest_total, rest_acc = add_bands(p_band_acc, p_band_sum, i_bk, o_g, o_d, m_g, m_gd, G, D, NB, BG, BD)
    source, ring_lse = choose(
        p_key, p_key_lse, i_row, o_h, o_g, matching, rest, rest_total, lag_weight, mass_floor,
        H, G, NS, BNS, LAGGED, WEIGHED,
    )  # fmt: skip
    hit = tl.min(tl.where(m_g, source, 0), 0) >= 0
    o_head = i_row * H + o_h
    tl.store(p_source + o_head, source, mask=m_g)
    tl.store(p_hit + i_row * K + i_k, hit.to(tl.int32))

    # 5. Amend: on a hit each head reads from its own match to the band, on a miss all read to the first whole page.
    m_reuse = o_g < tl.where(hit, G, 0)
    whole_page = tl.minimum((SINK + PAGE - 1) // PAGE * PAGE, band_start)
    begin = tl.where(hit, source + 1 - BAND, sink_end)
    stop = tl.where(hit, band_start, whole_page)
    start = tl.min(tl.where(m_g, begin, stop), 0)
    if not hit:
        column = sink_end // PAGE
        columns = tl.load(p_row_table + column + tl.zeros((BP,), tl.int32))
    # Loads that the amendment need not wait for.
    o_match = (ring * H + o_h) * W + source % W
    o_match_d = o_match[:, None] * D + o_d[None, :]
    m_reuse_d = m_reuse[:, None] & m_d[None, :]
    ring_out = tl.load(p_ring_out + o_match_d, mask=m_reuse_d, other=0.0)  # [BG, BD]
    chain = tl.load(p_ring_chain + o_match, mask=m_reuse, other=0) + 1
    kept = None
    if ANCHORED:
        kept = tl.load(p_ring_query + o_match_d, mask=m_reuse_d, other=0.0)  # [BG, BD]
    begin = tl.sum(tl.where(o_q[:, None] == o_g[None, :], begin[None, :], 0), 1)  # [BQ]
    near, near_total, near_acc = amend(
        q, begin, start, stop, columns, column, p_head_kv, s_kv_page, s_kv_token, log2_scale, m_q, o_d, m_d,
        D, PAGE, BQ, BG, BD, BT, NEAR_STAGES,
    )  # fmt: skip

    # 6. Complete a group that hit; of one that missed, leave what does not depend on its prefix.
    if hit:
        complete_hit(
            near, near_total, near_acc, rest, rest_total, rest_acc, kept, ring_out, ring_lse, chain,
            p_group_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
            i_row, m, ring, o_h, s_query_head, s_out_row, s_out_head, o_g, o_d, m_g, m_gd,
            H, D, W, ROTARY, NEOX,
        )  # fmt: skip
    else:
        leave_miss(
            p_part_out, p_part_lse, o_head, near, near_total, near_acc, rest, rest_total, rest_acc, o_d, m_g, m_gd, D
        )

    # 7. Count.
    kind = tl.where(hit, HIT, tl.where(matching, MISS, _exact_kind(ring, m, MIN_CONTEXT)))
    if p_paused is not None:
        kind = tl.where(able & (not matching), OVER_BUDGET, kind)
    read = tl.where(hit, m + 1 - start + sink_end, m + 1)
    tl.atomic_add(p_counters + kind, tl.full((), G, tl.int64), sem="relaxed")
    tl.atomic_add(p_counters + READ, read.to(tl.int64), sem="relaxed")
    tl.atomic_add(p_counters + SKIPPED, (m + 1 - read).to(tl.int64), sem="relaxed")


# Launch options by the number of registers that a thread should have; None leaves it to ptxas.
OPTIONS = {wanted: [{"maxnreg": limit} for limit in REGISTER_LIMITS if limit >= wanted] for wanted in REGISTER_LIMITS}
OPTIONS[None] = [{"maxnreg": None}]


def decode_hits(layer: LayerState, rows: Rows, query: Tensor, kv: Tensor, work: Workspace, out: Tensor) -> None:
    """Match all heads; decode and record the KV groups that hit; prepare those that missed.

    Args:
        layer: all of it is used. `store` is contiguous; `counts` is added to. The threshold is not compiled in:
            layers may differ in it.
        rows: position, ring and first are int32 or int64.
        query: `[B, H, D]` bf16, fp16 or fp32, after RoPE; last dimension contiguous.
        kv: `[blocks, K, PAGE, 2 D]` in query's dtype, any strides but 1 in the last dimension.
        work: allocated for `B` rows or more. Its `hit` and `source` are written, and `part_out` and `part_lse` of
            missed groups, for the miss engine.
        out: `[B, H, D]` in query's dtype, last dimension contiguous; written for groups that hit.
    """
    count, heads, d = query.shape
    kv_heads, page = kv.shape[1], kv.shape[2]
    store, config, cos_sin = layer.store, layer.config, layer.rotary.cos_sin
    group, window = heads // kv_heads, store.window
    tune = work.tune or _tune(count, heads, kv_heads, work.slots, d, window, store.query.dtype.itemsize)
    splits = max(1, min(tune["splits"], work.MAX_SPLITS, -(-window // 16)))
    bn = tune["bn"]
    tail = -(-(config.band + config.sink) // bn)
    bands = max(1, min(tune["bands"], work.MAX_BANDS, tail))
    span = -(-window // splits)
    relative = config.distance == "relative"
    # Of the query's own squared norm, where the kernel measures by that.
    loosest = limits.loosest(1 if relative else d, config)
    relief = limits.relief(0.0, config)
    s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
    pointers = dict(
        p_query=query, p_cos_sin=cos_sin, p_position=rows.position, p_ring=rows.ring, p_first=rows.first,
        p_slack=rows.slack, p_table=rows.block_table, p_kv=kv,
        p_ring_query=store.query, p_ring_out=store.out, p_ring_lse=store.lse, p_ring_chain=store.chain,
        p_out=out, p_counters=layer.counts, p_paused=layer.paused,
    )  # fmt: skip
    sizes = dict(
        s_query_row=s_query[0], s_query_head=s_query[1],
        s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_out_row=s_out[0], s_out_head=s_out[1],
    )  # fmt: skip
    others = dict(
        p_source=work.source, p_hit=work.hit, p_key=work.key, p_key_lse=work.key_lse,
        p_band_acc=work.band_acc, p_band_sum=work.band_sum, p_part_out=work.part_out, p_part_lse=work.part_lse,
        p_arrived=work.arrived, s_table_row=rows.block_table.stride(0),
        log2_scale=work.scale * LOG2_E.value, bound=loosest * limits.tightness(config.threshold), loosest=loosest,
        strict=1.0 / relief, lag_weight=config.lag_weight / relief, mass_floor=config.mass_floor or 0.0,
    )  # fmt: skip
    constants = dict(
        K=kv_heads, G=group, D=d, W=window, PAGE=page,
        BAND=config.band, SINK=config.sink, WHOLE=work.whole, MIN_CONTEXT=config.min_context,
        MAX_CHAIN=config.max_chain or 0,
        LAGGED=config.lag_weight > 0, RELATIVE=relative, ANCHORED=config.reuse == "anchored",
        WEIGHED=config.mass_floor is not None,
        ROTARY=0 if cos_sin is None else cos_sin.shape[-1], NEOX=layer.rotary.is_neox,
        NS=splits, BW=min(tune["bw"], power_of_two(span)), SPAN=span,
        HALVES=tune["halves"], SCAN_STAGES=tune["scan_stages"],
        NB=bands, BN=bn, CHUNK=-(-tail // bands) * bn, BT=tune["bt"],
        BQ=max(16, power_of_two(group)), BG=power_of_two(group),
        BD=power_of_two(d), BNS=power_of_two(splits),
        BP=power_of_two(window // page + 2),
        BAND_STAGES=tune["stages"], NEAR_STAGES=tune["near_stages"],
        PDL=work.pdl, num_warps=tune["warps"], **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
    grid = (bands + group * splits, kv_heads, count)
    launch(hit_kernel, grid, pointers, sizes, others, constants, OPTIONS[tune["registers"]], work.options)


def _tune(rows: int, heads: int, kv_heads: int, slots: int, d: int, window: int, entry_bytes: int) -> dict:
    """How the work is split, as measured on an H200 with 32/8 and 32/4 heads, D 128, window 512.

    Small batches want many programs with little to do one after the other; large ones want the
    fewest instructions, and enough bytes in flight per program.

    splits, bands: programs per head's ring, and for band and sink. bw: ring entries loaded at once.
    bn, bt: tokens loaded at once, of band and sink and of the amendment. halves: see `match.scan`.
    scan_stages, stages, near_stages: depth of the software pipelines of the three loops.
    registers: the least limit per thread to try, see `OPTIONS`.
    """
    dp = power_of_two(d)
    # Up to `slots` programs run at once; a few more than that would cost as much as twice as many.
    splits = max(1, min(8, slots * 3 // 4 // (rows * heads)))
    splits = 1 << splits.bit_length() - 1
    bands = max(1, min(4, (slots - rows * heads * splits) // (rows * kv_heads)))
    group = heads // kv_heads
    # Where programs queue, an SM should run a fourth one.
    tight = group > 8 or (rows * (heads * splits + kv_heads * bands) > slots and group & (group - 1) == 0)
    few, usual, most = REGISTER_LIMITS
    tokens = 32 if dp > 128 else 64
    return {
        "splits": splits,
        "bands": bands,
        "bw": max(16, min(128, 16384 // (dp * entry_bytes))),
        "bn": tokens,
        "bt": tokens // 2,
        "halves": splits == 1 and dp >= 64,
        "scan_stages": 3 if window >= 256 * splits else 1,
        "stages": 2 if splits == 1 else 1,
        "near_stages": 3,
        "warps": 4 if group <= 8 else 8,
        "registers": most if dp > 128 else few if tight else usual,
    }
