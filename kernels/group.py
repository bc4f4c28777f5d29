"""The kernel that `hit` launches: match, amend and complete of the KV groups that hit.

`paged.decode` is the oracle.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vllm_mac import counters
from vllm_mac.counters import Count
from vllm_mac.kernels.amend import LOG2_E, attend, combine, finish, unfinish
from vllm_mac.kernels.match import LAST, NO_KEY, narrow, scan, unrotate

OPTED_OUT = tl.constexpr(counters.OPTED_OUT)
# Device code reads no enumeration.
HIT, MISS = tl.constexpr(Count.HIT.value), tl.constexpr(Count.MISS.value)
SHORT_CONTEXT, NO_RING = tl.constexpr(Count.SHORT_CONTEXT.value), tl.constexpr(Count.NO_RING.value)
OVER_BUDGET, REQUEST = tl.constexpr(Count.OVER_BUDGET.value), tl.constexpr(Count.REQUEST.value)
READ, SKIPPED = tl.constexpr(Count.READ.value), tl.constexpr(Count.SKIPPED.value)


@triton.jit
def exact_kind(ring, m, MIN_CONTEXT: tl.constexpr):
    """The counter of heads that may not try, at position `m`."""
    return tl.where(ring == OPTED_OUT, REQUEST, tl.where(m + 1 < MIN_CONTEXT, SHORT_CONTEXT, NO_RING))


@triton.jit(do_not_specialize=("s_table",))  # as wide as the longest sequence may be
def hit_kernel(
    p_query, p_cos_sin, p_position, p_ring, p_first, p_slack, p_table, p_kv,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    p_out, p_source, p_hit, p_counters, p_key, p_key_lse, p_band_acc, p_band_sum, p_part_out, p_part_lse,
    p_arrived, p_paused,
    s_query_row, s_query_head, s_table, s_block, s_head, s_token, s_out_row, s_out_head,
    log2_scale, bound, loosest, strict, lag_weight, mass_floor,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, SINK: tl.constexpr, WHOLE: tl.constexpr, MIN_CONTEXT: tl.constexpr, MAX_CHAIN: tl.constexpr,
    LAGGED: tl.constexpr, RELATIVE: tl.constexpr, ANCHORED: tl.constexpr, WEIGHED: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
    S: tl.constexpr, BW: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr,
    SCAN_STAGES: tl.constexpr,
    NB: tl.constexpr, BB: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    MP: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
    TP: tl.constexpr, BAND_STAGES: tl.constexpr, NEAR_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_part, i_k, i_row)`: of the `NB + G * S` programs of a group the first `NB` attend to a part of
    band and sink each, the others scan a part of one head's ring, and the last to arrive does all the rest."""
    if PDL:
        # Without `gdc_launch_dependents`: where a model's weights are read before and after, programs of `prefix.prefix_kernel`
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
    # A row without a ring has nothing to record: an engine for misses that completes reads its band too.
    whole = False
    if WHOLE:
        whole = ring < 0
        if SINK == 0:
            if whole:
                if i_part == 0:
                    o_w = tl.arange(0, M)
                    tl.store(p_source + i_row * H + i_k * G + o_w, tl.full((M,), -1, tl.int32), mask=o_w < G)
                    tl.store(p_hit + i_row * K + i_k, 0)
                    if i_k == 0:
                        kind = exact_kind(ring, m, MIN_CONTEXT)
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
    o_d = tl.arange(0, DP)
    m_d = o_d < D
    # The matrix unit wants MP >= 16 rows; those past the group's heads see no token.
    o_r = tl.arange(0, MP)
    m_r = o_r < G
    p_group_query = p_query + i_row * s_query_row + i_k * G * s_query_head
    p_q = p_group_query + (o_r * s_query_head)[:, None] + o_d[None, :]
    m_q = m_r[:, None] & m_d[None, :]
    p_row_table = p_table + i_row * s_table
    p_head_kv = p_kv + i_k.to(tl.int64) * s_head

    # The pages before the band, wherever the match will be: one trip to memory less after it.
    page = tl.maximum(m + 1 - BAND - W, 0) // PAGE
    o_p = page + tl.arange(0, TP)
    pages = tl.load(p_row_table + o_p, mask=o_p <= m // PAGE, other=0)  # [TP]

    if i_part < NB:
        # Band and sink, one after the other: token i of them is band_start+i, or else a sink token.
        q = tl.load(p_q, mask=m_q, other=0.0)  # [MP, DP]
        band = m + 1 - band_start
        stop = tl.minimum((i_part + 1) * CHUNK, band + sink_end)
        peak = tl.full((MP,), float("-inf"), tl.float32)
        total = tl.zeros((MP,), tl.float32)
        acc = tl.zeros((MP, DP), tl.float32)
        for i in tl.range(i_part * CHUNK, stop, BB, num_stages=BAND_STAGES):
            o_i = i + tl.arange(0, BB)
            m_i = o_i < stop
            token = tl.where(o_i < band, band_start + o_i, o_i - band)
            block = tl.load(p_row_table + token // PAGE, mask=m_i, other=0)
            peak, total, acc = attend(
                q, peak, total, acc, token, block, m_i, m_r[:, None] & m_i[None, :],
                p_head_kv, s_block, s_token,
                log2_scale, o_d, m_d, D, PAGE,
            )  # fmt: skip
        o_part = ((i_row * K + i_k) * NB + i_part) * G + o_r
        tl.store(p_band_sum + o_part * 2, peak, mask=m_r)
        tl.store(p_band_sum + o_part * 2 + 1, total, mask=m_r)
        tl.store(p_band_acc + o_part[:, None] * D + o_d[None, :], acc, mask=m_q)
    else:
        i_scan = i_part - NB
        i_h = i_k * G + i_scan // S
        i_s = i_scan % S
        o_ring = (ring * H + i_h) * W
        key, lse = scan(
            p_group_query + (i_scan // S) * s_query_head, p_cos_sin,
            p_ring_query + o_ring * D, p_ring_chain + o_ring, p_ring_lse + o_ring, m, first,
            i_s * SPAN, tl.minimum((i_s + 1) * SPAN, W), bound, strict, lag_weight,
            D, DP, ROTARY, NEOX, W, BAND, SINK, MAX_CHAIN, LAGGED, RELATIVE, WEIGHED,
            BW, SPAN, HALVES, SCAN_STAGES,
        )  # fmt: skip
        tl.store(p_key + (i_row * H + i_h) * S + i_s, key)
        tl.store(p_key_lse + (i_row * H + i_h) * S + i_s, lse)

    # Everything above must be visible before this program counts as arrived.
    tl.debug_barrier()
    p_count = p_arrived + i_row * K + i_k
    arrived = tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu")
    if arrived != tl.where(matching, NB + G * S, NB) - 1:
        return
    tl.store(p_count, 0)  # for the next step

    o_g = tl.arange(0, M)
    m_g = o_g < G
    m_gd = m_g[:, None] & m_d[None, :]
    o_h = i_k * G + o_g
    # Loads that need not wait for the match.
    q = tl.load(p_q, mask=m_q, other=0.0)  # [MP, DP]
    rest = tl.full((M,), float("-inf"), tl.float32)
    rest_total = tl.zeros((M,), tl.float32)
    rest_acc = tl.zeros((M, DP), tl.float32)
    for i in tl.static_range(NB):
        o_part = ((i_row * K + i_k) * NB + i) * G + o_g
        peak = tl.load(p_band_sum + o_part * 2, mask=m_g, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(p_band_sum + o_part * 2 + 1, mask=m_g, other=0.0, cache_modifier=".cg")
        acc = tl.load(
            p_band_acc + o_part[:, None] * D + o_d[None, :],
            mask=m_gd,
            other=0.0,
            cache_modifier=".cg",
        )
        rest, rest_total, rest_acc = combine(rest, rest_total, rest_acc, peak, total, acc)

    o_s = tl.arange(0, SP)
    o_key = ((i_row * H + o_h) * S)[:, None] + o_s[None, :]
    m_key = (o_g < tl.where(matching, G, 0))[:, None] & (o_s < S)[None, :]
    keys = tl.load(p_key + o_key, mask=m_key, other=NO_KEY, cache_modifier=".cg")
    lses = tl.load(p_key_lse + o_key, mask=m_key, other=float("-inf"), cache_modifier=".cg")
    key = tl.min(keys, 1)
    ring_lse = tl.max(tl.where((keys == key[:, None]) & (keys < NO_KEY), lses, float("-inf")), 1)
    source = tl.where(key < NO_KEY, -(key & LAST).to(tl.int32) + LAST, -1)
    if WEIGHED:
        # `scan` let in what a summary without mass may be off by, and gave the part of it that it is.
        part = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if LAGGED:  # those under the strict limit come out as less than they are, and are accepted in any case
            part -= lag_weight
        mass = 1.0 / (1.0 + tl.exp2(rest + tl.log2(rest_total) - ring_lse * LOG2_E))
        allowed = mass_floor / (mass + mass_floor)
        source = tl.where(part < allowed * allowed, source, -1)
    hit = tl.min(tl.where(m_g, source, 0), 0) >= 0
    o_head = i_row * H + o_h
    tl.store(p_source + o_head, source, mask=m_g)
    tl.store(p_hit + i_row * K + i_k, hit.to(tl.int32))

    # On a hit each head amends from its own match on; on a miss all read to the first whole page.
    m_reuse = o_g < tl.where(hit, G, 0)
    lo = tl.minimum((SINK + PAGE - 1) // PAGE * PAGE, band_start)
    begin = tl.where(hit, source + 1 - BAND, sink_end)
    stop = tl.where(hit, band_start, lo)
    least = tl.min(tl.where(m_g, begin, stop), 0)

    if not hit:
        page = sink_end // PAGE
        pages = tl.load(p_row_table + page + tl.zeros((TP,), tl.int32))

    # Loads that the amendment need not wait for.
    o_match = (ring * H + o_h) * W + source % W
    o_match_d = o_match[:, None] * D + o_d[None, :]
    m_reuse_d = m_reuse[:, None] & m_d[None, :]
    ring_out = tl.load(p_ring_out + o_match_d, mask=m_reuse_d, other=0.0)
    chain = tl.load(p_ring_chain + o_match, mask=m_reuse, other=0) + 1
    if ANCHORED:
        kept = tl.load(p_ring_query + o_match_d, mask=m_reuse_d, other=0.0)

    near = tl.full((MP,), float("-inf"), tl.float32)
    near_total = tl.zeros((MP,), tl.float32)
    near_acc = tl.zeros((MP, DP), tl.float32)
    begin = tl.sum(tl.where(o_r[:, None] == o_g[None, :], begin[None, :], 0), 1)  # [MP]
    # From 0: Triton 3.7 to 3.9 can lose the alignment of addresses in a loop that begins at a computed value, and then
    # read KV one element at a time.
    for i in tl.range(0, stop - least, BT, num_stages=NEAR_STAGES):
        token = least + i + tl.arange(0, BT)
        m_i = token < stop
        block = tl.gather(pages, tl.where(m_i, token // PAGE - page, 0), 0)
        seen = m_r[:, None] & m_i[None, :] & (token[None, :] >= begin[:, None])
        near, near_total, near_acc = attend(
            q, near, near_total, near_acc, token, block, m_i, seen, p_head_kv, s_block, s_token,
            log2_scale, o_d, m_d, D, PAGE,
        )  # fmt: skip
    # From MP to M rows; the others are empty.
    near = tl.max(tl.reshape(near, (MP // M, M)), 0)
    near_total = tl.sum(tl.reshape(near_total, (MP // M, M)), 0)
    near_acc = tl.sum(tl.reshape(near_acc, (MP // M, M, DP)), 0)

    if hit:
        peak, total, acc = unfinish(ring_out, ring_lse)
        near, near_total, near_acc = combine(near, near_total, near_acc, peak, total, acc)
        near_out, near_lse = finish(near, near_total, near_acc)
        peak, total, acc = combine(near, near_total, near_acc, rest, rest_total, rest_acc)
        out, _ = finish(peak, total, acc)
        p_o = p_out + i_row * s_out_row + (o_h * s_out_head)[:, None] + o_d[None, :]
        tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_gd)
        # The entry written may be the one matched: position m-W has the slot of m.
        tl.debug_barrier()
        o_entry = (ring * H + o_h) * W + m % W
        o_entry_d = o_entry[:, None] * D + o_d[None, :]
        if ANCHORED:
            tl.store(p_ring_query + o_entry_d, kept, mask=m_gd)
        else:
            p_g = p_group_query + (o_g * s_query_head)[:, None]
            pre = unrotate(p_g, p_cos_sin, m, o_d[None, :], m_gd, ROTARY, NEOX)
            tl.store(p_ring_query + o_entry_d, narrow(pre, p_ring_query), mask=m_gd)
        tl.store(p_ring_out + o_entry_d, near_out.to(p_ring_out.dtype.element_ty), mask=m_gd)
        tl.store(p_ring_lse + o_entry, near_lse, mask=m_g)
        tl.store(p_ring_chain + o_entry, chain, mask=m_g)
    else:
        near_out, near_lse = finish(near, near_total, near_acc)
        rest_out, rest_lse = finish(rest, rest_total, rest_acc)
        o_part = o_head * 2
        tl.store(p_part_lse + o_part, near_lse, mask=m_g)
        tl.store(p_part_lse + o_part + 1, rest_lse, mask=m_g)
        tl.store(p_part_out + o_part[:, None] * D + o_d[None, :], near_out, mask=m_gd)
        tl.store(p_part_out + (o_part[:, None] + 1) * D + o_d[None, :], rest_out, mask=m_gd)

    kind = tl.where(hit, HIT, tl.where(matching, MISS, exact_kind(ring, m, MIN_CONTEXT)))
    if p_paused is not None:
        kind = tl.where(able & (not matching), OVER_BUDGET, kind)
    read = tl.where(hit, m + 1 - least + sink_end, m + 1)
    tl.atomic_add(p_counters + kind, tl.full((), G, tl.int64), sem="relaxed")
    tl.atomic_add(p_counters + READ, read.to(tl.int64), sem="relaxed")
    tl.atomic_add(p_counters + SKIPPED, (m + 1 - read).to(tl.int64), sem="relaxed")
