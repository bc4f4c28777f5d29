"""What all tokens of a row weigh, by a sample: the first of the three launches of `lookup`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac import lookup
from vllm_mac.kernels.entry import INTERPRETED
from vllm_mac.kernels.estimate import codes_of, first_rows, narrow, narrow_at, pages_of, scores_of, shares_of
from vllm_mac.kernels.lookup_merge import indexed_end, query_at, seen, tokens_of
from vllm_mac.kernels.scales import scaled

SAMPLE = tl.constexpr(lookup.SAMPLE)


@triton.jit
def _sampled(end, SPAN: tl.constexpr):
    """How many of the tokens `[0, end)` the sample has."""
    return end // (SPAN * SAMPLE) * SPAN + tl.minimum(end % (SPAN * SAMPLE), SPAN)


@triton.jit(do_not_specialize=("s_table_row", "nw"))
def weigh_kernel(
    p_query, p_position, p_begin, p_ring, p_ready, p_table, p_kv, p_codes, p_to_query, p_mean, p_lse2, p_narrow, p_scale,
    p_key_scale, s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, nw, log2_scale,
    K: tl.constexpr, G: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr,
    BQ: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the base-2 LSE `[G T]` of its tokens, exact for near ones, estimated for the others.

    The first one leaves what `narrow` gives to `look_kernel`: `p_narrow` `[pairs, 2, 2 BQ, BN]`, `p_scale` `[pairs, 2, BQ]`.
    """
    # The row and the maps are there before the kernel in front ends, which may have rotated the query. What writes them
    # has ended before: no kernel but those of a decode step lets the next one begin early.
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    end = indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    HALF: tl.constexpr = N // 2
    o_q, o_d, o_n, o_r = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, BR)
    m_d, m_n = o_d < D, o_n < HALF
    m_map = o_d < tl.where(end > BEGIN, D, 0)  # a row read whole needs no maps
    m_dn = m_map[:, None] & m_n[None, :]
    p_direction = p_to_query + i_k * D * N + o_d[:, None] * N + o_n[None, :]
    low = tl.load(p_direction, mask=m_dn, other=0.0)  # [BD, BN]
    high = tl.load(p_direction + HALF, mask=m_dn, other=0.0)  # [BD, BN]
    mean = tl.load(p_mean + i_k * D + o_d, mask=m_map, other=0.0)  # [BD]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if end <= BEGIN:
        return
    first, count = tokens_of(p_begin, i_row)
    m_q = o_q < G * count
    p_own_lse2 = p_lse2 + ((i_row * K + i_k) * nw + i_s) * (G * T) + o_q
    # Near tokens, in blocks: [0, BEGIN), then [end, last). The first programs have spans of the sample, so the last ones begin.
    last, first_block = m + count, nw - 1 - i_s
    blocks = tl.cdiv(last - end, BT) + BEGIN // BT
    spans = tl.cdiv(end, SPAN * SAMPLE)
    if (i_s >= spans) & (first_block >= blocks):  # no work
        tl.store(p_own_lse2, tl.full([BQ], float("-inf"), tl.float32), mask=m_q)
        return
    p_group_query = p_query + first * s_query_row + i_k * G * s_query_head
    p_row_table = p_table + i_row // PARTS * s_table_row
    p_head_codes = p_codes + i_k * PAGE * HALF
    next_page = pages_of(p_row_table, i_s * (SPAN * SAMPLE), end, PAGE, SPAN)  # early, as reads wait for it
    o_query = query_at(o_q, s_query_row, s_query_head, G, T)
    q = tl.load(
        p_group_query + o_query[None, :] + o_d[:, None], mask=m_d[:, None] & m_q[None, :], other=0.0
    )  # [BD, BQ]
    narrow_low, narrow_high, factor, constant, base = narrow(q, low, high, mean, log2_scale)
    narrow_low, narrow_high = tl.trans(narrow_low), tl.trans(narrow_high)
    if i_s == 0:
        p_low, p_high = narrow_at(p_narrow, i_row * K + i_k, BQ, BN)
        tl.store(p_low, narrow_low)
        tl.store(p_high, narrow_high)
        p_pair_scale = p_scale + (i_row * K + i_k) * (2 * BQ) + o_q
        tl.store(p_pair_scale, factor)
        tl.store(p_pair_scale + BQ, constant)
    total = tl.zeros([BQ, 4], tl.float32)  # as threads hold tokens, see `look_kernel`
    constant -= base
    for i in tl.range(i_s, spans, nw, num_stages=STAGES):
        t, page = i * (SPAN * SAMPLE), next_page
        next_page = pages_of(p_row_table, (i + nw) * (SPAN * SAMPLE), end, PAGE, SPAN)
        codes = codes_of(page, p_head_codes, t, end, s_code_page, HALF, PAGE, SPAN, BN)
        weight = tl.exp2(shares_of(scores_of(narrow_low, narrow_high, codes), factor, constant, t, BEGIN, end, PAGE))
        total += tl.sum(tl.sum(tl.reshape(weight, (BQ, SPAN // 8, 4, 2)), 3), 1)
    sampled = tl.maximum(_sampled(end, SPAN) - _sampled(tl.full((), BEGIN, tl.int32), SPAN), 1)
    total = tl.sum(total, 1) * ((end - BEGIN).to(tl.float32) / sampled.to(tl.float32))
    # Where estimates reach far, all that were sampled may be lost below `base`; near tokens never are.
    sample_lse2 = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    peak, total = sample_lse2, tl.where(total > 0, 1.0, 0.0)
    o_block = tl.arange(0, BT)
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    log2_scale = scaled(log2_scale, p_key_scale)
    near_q = tl.load(
        p_group_query + query_at(o_r, s_query_row, s_query_head, G, T)[:, None] + o_d[None, :],
        mask=(o_r < G * count)[:, None] & m_d[None, :],
        other=0.0,
    )  # [BR, BD]
    for i in range(first_block, blocks, nw):
        token = tl.where(i < BEGIN // BT, i * BT, end + (i - BEGIN // BT) * BT) + o_block
        m_t = token < last
        page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [BT]
        p_key = p_head_kv + (page * s_kv_page + token % PAGE * s_kv_token)[:, None] + o_d[None, :]
        key = tl.load(p_key, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [BT, BD]
        some_q = near_q
        if INTERPRETED:
            key, some_q = key.to(tl.float32), near_q.to(tl.float32)
        score = first_rows(tl.dot(some_q, tl.trans(key.to(some_q.dtype)), input_precision="ieee"), BQ) * log2_scale
        score = tl.where(tl.trans(seen(m_t, token, m, o_q, G, T)), score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        least = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - least) + tl.sum(tl.exp2(score - least[:, None]), 1)
        peak = new_peak
    lse2 = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(p_own_lse2, lse2, mask=m_q)


@triton.jit
def least_score(
    p_pair_lse2, nw, m, log2_tolerance, o_q, m_q, G: tl.constexpr, T: tl.constexpr, BNW: tl.constexpr
):  # fmt: skip
    """The score `[BQ]`, base 2, from which tokens are read: `tolerance / n` of what the `nw` programs of `weigh_kernel` found."""
    o_nw = tl.arange(0, BNW)
    mask = (o_nw < nw)[:, None] & m_q[None, :]
    parts = tl.load(p_pair_lse2 + o_nw[:, None] * (G * T) + o_q[None, :], mask=mask, other=float("-inf"))  # [BNW, BQ]
    peak = tl.where(m_q, tl.max(parts, 0), 0.0)
    lse2 = peak + tl.log2(tl.where(m_q, tl.sum(tl.exp2(parts - peak[None, :]), 0), 1.0))
    n = m + 1 if T == 1 else m + 1 + o_q // G
    return lse2 + log2_tolerance - tl.log2(n.to(tl.float32))
