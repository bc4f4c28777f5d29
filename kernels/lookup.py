"""Decode by the index of keys. `lookup.decode` is the oracle; see there for the rule.

Three launches. `weigh_kernel` estimates what all tokens weigh, by a sample. `look_kernel` estimates them one by one,
lists those that weigh enough, reads them, and adds the others by the mean values of their pages. `merge_kernel`
merges. The spans of `SPAN` tokens of a (row, KV head) pair go round among its `ns` programs of `look_kernel`. Tokens
are the rows of blocks and heads their columns: Hopper's tensor cores take 64 rows at once, and 8 columns.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac import counters, key_index, lookup
from vllm_mac.counters import Count
from vllm_mac.kernels.entry import INTERPRETED
from vllm_mac.kernels.launch import power_of_two
from vllm_mac.kernels.lookup_work import DOT_TYPES, LookupWork, narrow_width
from vllm_mac.kernels.partial import LOG2_E
from vllm_mac.key_index import Maps, PageLayout
from vllm_mac.lookup import TILE as TILE_TOKENS
from vllm_mac.state import IndexRule, Rows

OPTED_OUT = tl.constexpr(counters.OPTED_OUT)
# Device code reads no enumeration.
HIT, NO_MAPS = tl.constexpr(Count.HIT.value), tl.constexpr(Count.NO_MAPS.value)
SHORT_CONTEXT, REQUEST = tl.constexpr(Count.SHORT_CONTEXT.value), tl.constexpr(Count.REQUEST.value)
READ, SKIPPED = tl.constexpr(Count.READ.value), tl.constexpr(Count.SKIPPED.value)
TILE, PIECE, SAMPLE = tl.constexpr(TILE_TOKENS), tl.constexpr(lookup.PIECE), tl.constexpr(lookup.SAMPLE)
HALF_LEVEL = tl.constexpr(key_index.HALF_LEVEL)


@triton.jit
def _indexed_end(m, ring, ready, BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr):
    """Where the indexed tokens of a row at position `m` end, which begin at `BEGIN`: at once where it is read whole."""
    n = m + 1
    end = tl.maximum((n - BAND) // TILE * TILE, BEGIN)
    return tl.where((n >= MIN_CONTEXT) & (ring != OPTED_OUT) & (ready != 0), end, BEGIN)


@triton.jit
def _sampled(end):
    """How many of the tokens `[0, end)` the sample has."""
    return end // (PIECE * SAMPLE) * PIECE + tl.minimum(end % (PIECE * SAMPLE), PIECE)


@triton.jit
def _narrow(q, low, high, mean, log2_scale):
    """A group's queries `[BD, BQ]` as codes are multiplied with: `(low_1, low_0, high_1, high_0, factor, constant, base)`.

    low, high: `[BD, BN]`, maps to the two halves of the directions. mean: `[BD]`, the mean key.

    The first four: `[BN, BQ]` int8, the upper and the lower bytes of 16 bits, for the two halves of the directions. A
    score is `factor` `[BQ]` times the product of 16 bits with the codes, plus `constant` `[BQ]`. base: `[BQ]`, to
    subtract from scores before `exp2`. It lies half-way between the mean key's score, near which many are, and the
    highest that codes can give, or higher, so that no sum overflows.
    """
    if INTERPRETED:  # see `partial.attend`
        q, low, high = q.to(tl.float32), low.to(tl.float32), high.to(tl.float32)
    q_low = tl.dot(tl.trans(low), q, input_precision="ieee")
    q_high = tl.dot(tl.trans(high), q, input_precision="ieee")
    largest = tl.maximum(tl.max(tl.abs(q_low), 0), tl.max(tl.abs(q_high), 0))
    unit = tl.maximum(largest, 1e-20) / 32512.0  # 127 * 256: what two signed bytes hold
    low_i = tl.floor(q_low / unit[None, :] + 0.5).to(tl.int32)
    high_i = tl.floor(q_high / unit[None, :] + 0.5).to(tl.int32)
    middle, factor = tl.sum(q.to(tl.float32) * mean[:, None], 0) * log2_scale, unit * log2_scale
    reach = HALF_LEVEL * factor * (tl.sum(tl.abs(low_i), 0) + tl.sum(tl.abs(high_i), 0)).to(tl.float32)
    constant = middle - HALF_LEVEL * factor * (tl.sum(low_i, 0) + tl.sum(high_i, 0)).to(tl.float32)
    low_1, high_1 = (low_i + 128) >> 8, (high_i + 128) >> 8
    low_0, high_0 = (low_i - low_1 * 256).to(tl.int8), (high_i - high_1 * 256).to(tl.int8)
    base = middle + tl.maximum(reach * 0.5, reach - 100.0)
    return low_1.to(tl.int8), low_0, high_1.to(tl.int8), high_0, factor, constant, base


@triton.jit
def _estimated(low_1, low_0, high_1, high_0, factor, constant, codes):
    """Estimated scores `[BT, BQ]`, scaled and base 2, of codes `[BT, BN]` int8. Other arguments: of `_narrow`.

    The products are of integers: codes of 4 bits with the two bytes of each query, 64 of them at most.
    """
    if INTERPRETED:
        low, high = codes & 15, (codes >> 4) & 15
    else:  # four codes an instruction
        low = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )  # fmt: skip
        high = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }", "=r,r", [codes],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    product = tl.dot(low, low_1, out_dtype=tl.int32)
    product = tl.dot(high, high_1, product, out_dtype=tl.int32) * 256
    product = tl.dot(low, low_0, product, out_dtype=tl.int32)
    product = tl.dot(high, high_0, product, out_dtype=tl.int32)
    return product.to(tl.float32) * factor[None, :] + constant[None, :]


@triton.jit
def _own(token, i_s, ns, SPAN: tl.constexpr):
    """How many of the tokens `[0, token)` are in the spans of program `i_s`."""
    span = token // SPAN
    whole = (span - i_s + ns - 1) // ns  # of its spans so many end there, for `i_s < ns`
    return whole * SPAN + tl.where(span % ns == i_s, token % SPAN, 0)


@triton.jit
def _add_both(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit(do_not_specialize=("s_table_row", "nw"))
def weigh_kernel(
    p_query, p_position, p_ring, p_ready, p_table, p_kv, p_codes, p_to_query, p_mean, p_lse2, p_narrow, p_scale,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, nw, log2_scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the base-2 LSE `[G]` of its tokens, exact for near ones, estimated for the others.

    The first one leaves what `_narrow` gives to `look_kernel`: `p_narrow` `[pairs, 4, BN, BQ]`, `p_scale` `[pairs, 2, BQ]`.
    """
    # Maps are there before the kernel in front ends, which may have rotated the query.
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = N // 2
    o_q, o_d, o_n, o_t = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, PIECE)
    m_q, m_d, m_n = o_q < G, o_d < D, o_n < HALF
    m_dq, m_dn = m_d[:, None] & m_q[None, :], m_d[:, None] & m_n[None, :]
    p_direction = p_to_query + i_k * D * N + o_d[:, None] * N + o_n[None, :]
    low = tl.load(p_direction, mask=m_dn, other=0.0)  # [BD, BN]
    high = tl.load(p_direction + HALF, mask=m_dn, other=0.0)  # [BD, BN]
    mean = tl.load(p_mean + i_k * D + o_d, mask=m_d, other=0.0)  # [BD]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.load(p_position + i_row).to(tl.int32)
    end = _indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    if end <= BEGIN:
        return
    p_group_query = p_query + i_row * s_query_row + i_k * G * s_query_head
    p_row_table = p_table + i_row * s_table_row
    p_head_codes = p_codes + i_k * PAGE * HALF
    q = tl.load(p_group_query + (o_q * s_query_head)[None, :] + o_d[:, None], mask=m_dq, other=0.0)  # [BD, BQ]
    low_1, low_0, high_1, high_0, factor, constant, base = _narrow(q, low, high, mean, log2_scale)
    if i_s == 0:
        p_pair = p_narrow + (i_row * K + i_k) * (4 * BN * BQ) + o_n[:, None] * BQ + o_q[None, :]
        tl.store(p_pair, low_1)
        tl.store(p_pair + BN * BQ, low_0)
        tl.store(p_pair + 2 * BN * BQ, high_1)
        tl.store(p_pair + 3 * BN * BQ, high_0)
        p_pair_scale = p_scale + (i_row * K + i_k) * (2 * BQ) + o_q
        tl.store(p_pair_scale, factor)
        tl.store(p_pair_scale + BQ, constant)
    total = tl.zeros([PIECE, BQ], tl.float32)
    for t in tl.range(i_s * PIECE * SAMPLE, end, nw * PIECE * SAMPLE, num_stages=STAGES):
        token = t + o_t
        m_t = (token >= BEGIN) & (token < end)
        page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [PIECE]
        p_code = p_head_codes + (page * s_code_page + token % PAGE * HALF)[:, None] + o_n[None, :]
        codes = tl.load(p_code, mask=m_t[:, None] & m_n[None, :], other=0)  # [PIECE, BN]
        score = _estimated(low_1, low_0, high_1, high_0, factor, constant - base, codes)
        total += tl.where(m_t[:, None], tl.exp2(score), 0.0)
    sampled = tl.maximum(_sampled(end) - _sampled(tl.full((), BEGIN, tl.int32)), 1)
    total = tl.sum(total, 0) * ((end - BEGIN).to(tl.float32) / sampled.to(tl.float32))
    # Where estimates reach far, all that were sampled may be lost below `base`; near tokens never are.
    sample_lse2 = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    # Near tiles: [0, BEGIN), then [end, n). The last programs have the first ones, since the first have pieces of the sample.
    n = m + 1
    peak, total = sample_lse2, tl.where(total > 0, 1.0, 0.0)
    o_tile = tl.arange(0, TILE)
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    for i in range(nw - 1 - i_s, tl.cdiv(n - end, TILE) + BEGIN // TILE, nw):
        token = tl.where(i < BEGIN // TILE, i * TILE, end + (i - BEGIN // TILE) * TILE) + o_tile
        m_t = token < n
        page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [TILE]
        p_key = p_head_kv + (page * s_kv_page + token % PAGE * s_kv_token)[:, None] + o_d[None, :]
        key = tl.load(p_key, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [TILE, BD]
        near_q = q
        if INTERPRETED:
            key, near_q = key.to(tl.float32), q.to(tl.float32)
        score = tl.where(m_t[:, None], tl.dot(key, near_q, input_precision="ieee") * log2_scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))  # finite: each tile has a token
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(score - new_peak[None, :]), 0)
        peak = new_peak
    lse2 = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(p_lse2 + ((i_row * K + i_k) * nw + i_s) * G + o_q, lse2, mask=m_q)


@triton.jit(do_not_specialize=("s_table_row", "room", "s_weight", "ns", "nw"))
def look_kernel(
    p_query, p_position, p_ring, p_ready, p_table, p_kv, p_codes, p_means, p_lse2, p_narrow, p_scale,
    p_tokens, p_weight, p_part, p_part_acc, p_read,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page, s_weight,
    room, ns, nw, log2_scale, log2_tolerance,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, SPAN: tl.constexpr,
    BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BNW: tl.constexpr,
    LIST_STAGES: tl.constexpr, READ_STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the partial result over its tokens, see `partial`, and how many of them it read.

    Its tokens are those of its spans, and where the row is looked up a share of the near ones instead of those in its
    spans. room: 1/16 of the tokens that a program's list in `p_tokens` holds; where they are not enough, its spans are
    read whole. nw: programs of `weigh_kernel`. p_weight: `[pairs, spans, BQ]`, what a page of a span weighs without
    what is listed, as a share of all.
    """
    # 1. The row. What `weigh_kernel` did not write may be read before it ends.
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    end = _indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    HALF: tl.constexpr = N // 2
    n = m + 1
    o_q, o_d, o_n = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN)
    m_q, m_d = o_q < G, o_d < D
    m_dq = m_d[:, None] & m_q[None, :]
    i_bk = i_row * K + i_k
    i_part = i_bk * ns + i_s
    p_row_table = p_table + i_row * s_table_row
    p_list = p_tokens + i_part * room * 16
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if m < 0:
        return

    # 2. List its tokens to read, and note what else its pages weigh.
    looked = end > BEGIN
    lse2 = tl.zeros([BQ], tl.float32)
    listed_count = tl.zeros((), tl.int32)
    if looked:
        p_pair = p_narrow + i_bk * (4 * BN * BQ) + o_n[:, None] * BQ + o_q[None, :]
        low_1, low_0 = tl.load(p_pair), tl.load(p_pair + BN * BQ)
        high_1, high_0 = tl.load(p_pair + 2 * BN * BQ), tl.load(p_pair + 3 * BN * BQ)
        factor, constant = tl.load(p_scale + i_bk * (2 * BQ) + o_q), tl.load(p_scale + i_bk * (2 * BQ) + BQ + o_q)
        o_nw = tl.arange(0, BNW)
        p_parts = p_lse2 + (i_bk * nw + o_nw[:, None]) * G + o_q[None, :]
        parts = tl.load(p_parts, mask=(o_nw < nw)[:, None] & m_q[None, :], other=float("-inf"))  # [BNW, BQ]
        lse2 = tl.where(m_q, tl.max(parts, 0), 0.0)
        lse2 += tl.log2(tl.where(m_q, tl.sum(tl.exp2(parts - lse2[None, :]), 0), 1.0))
        threshold = tl.where(m_q, lse2 + log2_tolerance - tl.log2(n.to(tl.float32)), float("inf"))  # [BQ]
        o_t = tl.arange(0, SPAN)
        p_head_codes = p_codes + i_k * PAGE * HALF
        for t in tl.range(i_s * SPAN, end, ns * SPAN, num_stages=LIST_STAGES):
            token = t + o_t
            m_t = (token >= BEGIN) & (token < end)
            page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [SPAN]
            p_code = p_head_codes + (page * s_code_page + token % PAGE * HALF)[:, None] + o_n[None, :]
            codes = tl.load(p_code, mask=m_t[:, None] & (o_n < HALF)[None, :], other=0)  # [SPAN, BN]
            score = _estimated(low_1, low_0, high_1, high_0, factor, constant, codes)
            score = tl.where(m_t[:, None], score, float("-inf"))
            listed = tl.max((score >= threshold[None, :]).to(tl.int32), 1)
            at = listed_count + tl.cumsum(listed, 0) - 1
            tl.store(p_list + at, token, mask=(listed != 0) & (at < room * 16))
            left = tl.where((listed == 0)[:, None], tl.exp2(score - lse2[None, :]), 0.0)  # [SPAN, BQ]
            # One reduction waits for the other warps once.
            weight, number = tl.reduce((left, listed[:, None] + tl.zeros([SPAN, BQ], tl.int32)), 0, _add_both)
            listed_count += tl.max(number, 0)
            # Of each of the span's pages, as if they weighed alike.
            pages = tl.maximum(tl.minimum(t + SPAN, end) - tl.maximum(t, BEGIN), PAGE) // PAGE
            weight = (weight / pages.to(tl.float32)).to(p_weight.dtype.element_ty)
            tl.store(p_weight + i_bk * s_weight + t // SPAN * BQ + o_q, weight)
        tl.debug_barrier()  # what threads listed, others read
    # Where a list does not hold them, all tokens of its spans that are not near; of a row read whole, all.
    fits = looked & (listed_count <= room * 16)
    far, far_begin, far_end = listed_count, BEGIN, end
    if not looked:
        far_begin, far_end = 0, n
    if not fits:
        far = tl.maximum(tl.cdiv(tl.cdiv(far_end, SPAN) - i_s, ns), 0) * SPAN
        listed_count = _own(far_end, i_s, ns, SPAN) - _own(far_begin, i_s, ns, SPAN)
    of_list = tl.where(fits, far, 0)
    near = tl.where(looked, BEGIN + n - end, 0)
    near_begin, near_end = near * i_s // ns, near * (i_s + 1) // ns

    # 3. Attend to the tokens.
    p_group_query = p_query + i_row * s_query_row + i_k * G * s_query_head
    q = tl.load(p_group_query + (o_q * s_query_head)[None, :] + o_d[:, None], mask=m_dq, other=0.0).to(DOT)  # [BD, BQ]
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    o_j = tl.arange(0, BT)
    peak = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BT, BQ], tl.float32)  # added up over the tokens at the end only
    acc = tl.zeros([BD, BQ], tl.float32)
    for j in tl.range(0, far + near_end - near_begin, BT, num_stages=READ_STAGES):
        place = j + o_j
        token = tl.load(p_list + place, mask=place < of_list, other=0)  # [BT]
        token = tl.where(fits, token, (place // SPAN * ns + i_s) * SPAN + place % SPAN)
        m_far = (place < far) & (token >= far_begin) & (token < far_end)
        i_near = near_begin + place - far
        token = tl.where(place < far, token, tl.where(i_near < BEGIN, i_near, i_near - BEGIN + end))
        m_t = m_far | ((place >= far) & (i_near < near_end))
        page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [BT]
        p_token = p_head_kv + page * s_kv_page + token % PAGE * s_kv_token  # [BT]
        m_td = m_t[:, None] & m_d[None, :]
        key = tl.load(p_token[:, None] + o_d[None, :], mask=m_td, other=0.0)  # [BT, BD]
        value = tl.load(p_token[:, None] + D + o_d[None, :], mask=m_td, other=0.0)  # [BT, BD]
        score = tl.dot(key.to(DOT), q, input_precision="ieee") * log2_scale  # [BT, BQ]
        score = tl.where(m_t[:, None], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - base[None, :])
        shrink = tl.exp2(peak - base)
        total = total * shrink[None, :] + weight
        weight = weight.to(value.dtype).to(DOT)
        acc = tl.dot(tl.trans(value.to(DOT)), weight, acc * shrink[None, :], input_precision="ieee")  # [BD, BQ]
        peak = new_peak
    total = tl.sum(total, 0)  # [BQ]

    # 4. Add the rest of its spans, page by page.
    if fits:
        o_p = tl.arange(0, BP)
        new_peak = tl.maximum(peak, lse2)
        shrink = tl.exp2(peak - new_peak)
        peak, total, acc = new_peak, total * shrink, acc * shrink[None, :]
        grow = tl.exp2(lse2 - peak)
        rest, rest_acc = tl.zeros([BP, BQ], tl.float32), tl.zeros([BD, BQ], tl.float32)
        first = BEGIN // SPAN  # spans before it are all near
        first += (i_s - first % ns + ns) % ns
        OF_SPAN: tl.constexpr = SPAN // PAGE  # pages
        pages = tl.cdiv(tl.maximum(tl.cdiv(end, SPAN) - first, 0), ns) * OF_SPAN
        for p in tl.range(0, pages, BP, num_stages=READ_STAGES):
            o_page = p + o_p
            span = first + o_page // OF_SPAN * ns
            i_page = span * OF_SPAN + o_page % OF_SPAN
            m_p = (i_page >= BEGIN // PAGE) & (i_page < end // PAGE) & (o_page < pages)
            page = tl.load(p_row_table + i_page, mask=m_p, other=0).to(tl.int64)  # [BP]
            p_w = p_weight + i_bk * s_weight + span[:, None] * BQ + o_q[None, :]
            weight = tl.load(p_w, mask=m_p[:, None] & (o_q < BQ)[None, :], other=0.0)  # [BP, BQ]
            p_mean = p_means + (page * s_mean_page + i_k * D)[:, None] + o_d[None, :]
            mean = tl.load(p_mean, mask=m_p[:, None] & m_d[None, :], other=0.0)  # [BP, BD]
            rest += weight.to(tl.float32)
            rest_acc = tl.dot(tl.trans(mean.to(DOT)), weight.to(DOT), rest_acc, input_precision="ieee")
        total += tl.sum(rest, 0) * grow
        acc += rest_acc * grow[None, :]

    # 5. Leave the result to `merge_kernel`.
    tl.store(p_part + (i_part * G + o_q) * 2, peak, mask=m_q)
    tl.store(p_part + (i_part * G + o_q) * 2 + 1, total, mask=m_q)
    tl.store(p_part_acc + (i_part * G + o_q)[None, :] * D + o_d[:, None], acc, mask=m_dq)
    tl.store(p_read + i_part, listed_count + near_end - near_begin)


@triton.jit(do_not_specialize=("ns",))
def merge_kernel(
    p_position, p_ring, p_ready, p_out, p_counters, p_part, p_part_acc, p_read, s_out_row, s_out_head, ns,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    INDEX_BYTES: tl.constexpr, KV_BYTES: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, BNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_h, i_row)`: the output of a head of the results of its group's programs, `BI` at once; counts."""
    if PDL:
        gdc_wait()
    i_h, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    if m < 0:
        return
    i_bk, i_g = i_row * K + i_h // G, i_h % G
    o_d, o_i, o_ns = tl.arange(0, BD), tl.arange(0, BI), tl.arange(0, BNS)
    p_peak = p_part + (i_bk * ns * G + i_g) * 2
    peaks = tl.load(p_peak + o_ns * G * 2, mask=o_ns < ns, other=float("-inf"))  # [BNS]
    totals = tl.load(p_peak + o_ns * G * 2 + 1, mask=o_ns < ns, other=0.0)  # [BNS]
    peak = tl.max(peaks, 0)
    total = tl.sum(tl.exp2(peaks - peak) * totals, 0)
    acc = tl.zeros([BD], tl.float32)
    for i in range(0, ns, BI):
        o_part = i + o_i
        m_i = o_part < ns
        weight = tl.exp2(tl.load(p_peak + o_part * G * 2, mask=m_i, other=float("-inf")) - peak)  # [BI]
        p_acc = p_part_acc + ((i_bk * ns + o_part) * G + i_g)[:, None] * D + o_d[None, :]
        part = tl.load(p_acc, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)  # [BI, BD]
        acc += tl.sum(weight[:, None] * part, 0)
    tl.store(p_out + i_row * s_out_row + i_h * s_out_head + o_d, (acc / total).to(p_out.dtype.element_ty), mask=o_d < D)
    if i_g == 0:  # The index counts as the tokens that have as many bytes.
        n = m + 1
        ring, ready = tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready)
        end = _indexed_end(m, ring, ready, BAND, BEGIN, MIN_CONTEXT)
        exact = tl.where(n < MIN_CONTEXT, SHORT_CONTEXT, tl.where(ready != 0, HIT, NO_MAPS))
        kind = tl.where(ring == OPTED_OUT, REQUEST, exact)
        read = tl.sum(tl.load(p_read + i_bk * ns + o_ns, mask=o_ns < ns, other=0), 0).to(tl.int64)
        read += (end - BEGIN).to(tl.int64) * INDEX_BYTES // KV_BYTES
        tl.atomic_add(p_counters + kind, tl.full((), G, tl.int64), sem="relaxed")
        tl.atomic_add(p_counters + READ, read, sem="relaxed")
        tl.atomic_add(p_counters + SKIPPED, tl.maximum(n.to(tl.int64) - read, 0), sem="relaxed")


def look_up(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Decode one token of each row. Arguments: of `launches`. Allocates nothing and waits for nothing."""
    for _ in launches(rows, query, kv, layout, maps, rule, work, result):
        pass


def launches(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> Iterator[str]:  # fmt: skip
    """Launch the kernels one by one: each has been launched when its name is yielded.

    rows: position, ring (`OPTED_OUT` for a row that is read whole) and block_table are read; int32. query: `[B, H, D]`
    after RoPE, last dimension contiguous. kv: `[blocks, K, PAGE, 2 D]` with its index. result: out `[B, H, D]`, written,
    and counts `[len(Count)]` int64, added to.
    """
    out, counts = result
    count, heads, d = query.shape
    kv_heads, page, tuning = layout.kv_heads, layout.page, work.tuning
    group, ns = heads // kv_heads, work.splits(count * kv_heads)
    nw = work.weigh_splits(count * kv_heads)
    codes, means = layout.views(kv)
    s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
    begin = -(-rule.sink // TILE_TOKENS) * TILE_TOKENS
    everywhere = dict(
        p_query=query, p_position=rows.position, p_ring=rows.ring, p_ready=maps.ready, p_table=rows.block_table,
        p_kv=kv, p_codes=codes.view(torch.int8), p_lse2=work.lse2, p_narrow=work.narrow, p_scale=work.scale,
        s_query_row=s_query[0], s_query_head=s_query[1], s_table_row=rows.block_table.stride(0),
        s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_code_page=codes.stride(0),
        log2_scale=rule.scale * LOG2_E.value, K=kv_heads, G=group, D=d, N=layout.directions, PAGE=page,
        BAND=rule.band, BEGIN=begin, MIN_CONTEXT=rule.min_context, nw=nw,
        BQ=work.width, BD=power_of_two(d), BN=narrow_width(layout.directions), PDL=work.pdl,
        **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
    wider = 1 if work.width * power_of_two(d) <= 1024 else 2
    parts = dict(p_part=work.part, p_part_acc=work.part_acc, p_read=work.read)
    weigh_kernel[(nw, kv_heads, count)](
        **everywhere, p_to_query=maps.to_query, p_mean=maps.mean, STAGES=tuning.weigh_stages, num_warps=4 * wider,
    )  # fmt: skip
    yield "weigh"
    look_kernel[(ns, kv_heads, count)](
        **everywhere, **parts, p_means=means, p_tokens=work.tokens, p_weight=work.weight,
        s_mean_page=means.stride(0), s_weight=work.weight.stride(0), ns=ns, SPAN=tuning.span,
        room=work.tokens.numel() // (count * kv_heads * ns) // 16,
        log2_tolerance=math.log2(rule.tolerance) if rule.tolerance > 0 else -1e9,  # 0 reads every token
        BT=tuning.block if d <= 128 else tuning.block // 2, BP=tuning.pages, BNW=power_of_two(tuning.most),
        LIST_STAGES=tuning.list_stages, READ_STAGES=tuning.read_stages,
        num_warps=tuning.warps * wider if work.pdl else 8,
        maxnreg=tuning.registers if d <= 128 else None,  # with fewer warps, or without a limit, it spills before sm90
        DOT=tl.float32 if triton.knobs.runtime.interpret else DOT_TYPES[query.dtype],
    )  # fmt: skip
    yield "look"
    shared = "p_position p_ring p_ready K G D BAND BEGIN MIN_CONTEXT BD PDL launch_pdl".split()
    merge_kernel[(heads, count)](
        **{name: everywhere[name] for name in shared if name in everywhere}, **parts, ns=ns, p_out=out, p_counters=counts,
        s_out_row=s_out[0], s_out_head=s_out[1], INDEX_BYTES=layout.index_bytes, KV_BYTES=layout.kv_bytes,
        BI=32, BNS=power_of_two(tuning.most), num_warps=4,
    )  # fmt: skip
    yield "merge"
