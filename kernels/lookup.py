"""Decode by the index of keys. `lookup.decode` is the oracle; see there for the rule.

Three launches. `weigh_kernel` estimates what all tokens weigh, by a sample. `look_kernel` estimates them one by one, marks
those that weigh enough, adds the others by the mean values of their pages, lists what is marked and reads it.
`merge_kernel` in `lookup_merge` merges. The spans of `SPAN` tokens of a (row, KV head) pair go round among its `ns`
programs of `look_kernel`, those of them that have work. Tokens are the rows of blocks and heads their columns: Hopper's
tensor cores take 64 rows at once, and 8 columns. A row that decodes several tokens has the heads of each as columns.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac import key_index, lookup
from vllm_mac.kernels.entry import INTERPRETED
from vllm_mac.kernels.launch import by_kind, launch, power_of_two
from vllm_mac.kernels.lookup_merge import indexed_end, merge_kernel, programs_of, query_at, seen, tokens_of
from vllm_mac.kernels.lookup_work import DOT_TYPES, LookupWork, narrow_width
from vllm_mac.kernels.partial import LOG2_E
from vllm_mac.kernels.scales import scaled
from vllm_mac.key_index import Maps, PageLayout
from vllm_mac.lookup import SPAN
from vllm_mac.lookup import TILE as TILE_TOKENS
from vllm_mac.state import IndexRule, Rows

TILE, PIECE, SAMPLE = tl.constexpr(TILE_TOKENS), tl.constexpr(lookup.PIECE), tl.constexpr(lookup.SAMPLE)
HALF_LEVEL = tl.constexpr(key_index.HALF_LEVEL)
MERGED = 32  # numbers of an output that one program merges
RUN = tl.constexpr(16)  # tokens, the rows of a warp in Hopper's products; every page size is a multiple


@triton.jit
def _sampled(end):
    """How many of the tokens `[0, end)` the sample has."""
    return end // (PIECE * SAMPLE) * PIECE + tl.minimum(end % (PIECE * SAMPLE), PIECE)


@triton.jit
def _narrow(q, low, high, mean, log2_scale):
    """A group's queries `[BD, BQ]` as codes are multiplied with: `(narrow_low, narrow_high, factor, constant, base)`.

    low, high: `[BD, BN]`, maps to the two halves of the directions. mean: `[BD]`, the mean key.

    The first two: `_two_bytes`, for the two halves of the directions. A score is `factor` `[BQ]` times the product of
    16 bits with the codes, plus `constant` `[BQ]`. base: `[BQ]`, to subtract from scores before `exp2`. It lies half-way
    between the mean key's score, near which many are, and the highest that codes can give, or higher, so that no sum
    overflows.
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
    base = middle + tl.maximum(reach * 0.5, reach - 100.0)
    return _two_bytes(low_i), _two_bytes(high_i), factor, constant, base


@triton.jit
def _two_bytes(x):
    """Numbers of 16 bits, `[BN, BQ]` int32, as `[BN, 2 BQ]` int8: the upper bytes, then the lower ones."""
    upper = (x + 128) >> 8
    both = tl.join(upper, x - upper * 256)  # [BN, BQ, 2]
    return tl.reshape(tl.permute(both, (0, 2, 1)), (x.shape[0], 2 * x.shape[1])).to(tl.int8)


@triton.jit
def _estimated(narrow_low, narrow_high, factor, constant, codes):
    """Estimated scores `[BT, BQ]`, scaled and base 2, of codes `[BT, BN]` int8. Other arguments: of `_narrow`.

    The products are of integers: codes of 4 bits with the two bytes of each query, 128 of them at most.
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
    product = tl.dot(low, narrow_low, out_dtype=tl.int32)
    product = tl.dot(high, narrow_high, product, out_dtype=tl.int32)  # [BT, 2 BQ]
    both = tl.reshape(product, (codes.shape[0], 2, factor.shape[0]))
    upper, lower = tl.split(tl.permute(both, (0, 2, 1)))
    return (upper * 256 + lower).to(tl.float32) * factor[None, :] + constant[None, :]


@triton.jit
def _words(marked, RUN: tl.constexpr):
    """Bits of a span's tokens, `[SPAN]` int32 of 0 and 1, in words of 32 that each have two runs: see `_place`."""
    SPAN: tl.constexpr = marked.shape[0]
    o_t = tl.arange(0, SPAN)
    bit = marked << (o_t // (4 * RUN) % 2 * RUN + o_t % RUN)
    bit = tl.permute(tl.reshape(bit, (SPAN // (8 * RUN), 2, 4, RUN)), (0, 2, 1, 3))
    return tl.sum(tl.reshape(bit, (SPAN // (2 * RUN), 2 * RUN)), 1)


@triton.jit
def _place(word, bit, RUN: tl.constexpr):
    """Which of a span's tokens a bit of a word stands for. The runs of a word are four apart, as a warp's rows are."""
    return word // 4 * (8 * RUN) + bit // RUN * (4 * RUN) + word % 4 * RUN + bit % RUN


@triton.jit(do_not_specialize=("s_table_row", "nw"))
def weigh_kernel(
    p_query, p_position, p_begin, p_ring, p_ready, p_table, p_kv, p_codes, p_to_query, p_mean, p_lse2, p_narrow, p_scale,
    p_key_scale, s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, nw, log2_scale,
    K: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the base-2 LSE `[G T]` of its tokens, exact for near ones, estimated for the others.

    The first one leaves what `_narrow` gives to `look_kernel`: `p_narrow` `[pairs, 2, BN, 2 BQ]`, `p_scale` `[pairs, 2, BQ]`.
    """
    # Maps are there before the kernel in front ends, which may have rotated the query.
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = N // 2
    o_q, o_d, o_n, o_t = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, PIECE)
    m_d, m_n = o_d < D, o_n < HALF
    m_dn = m_d[:, None] & m_n[None, :]
    p_direction = p_to_query + i_k * D * N + o_d[:, None] * N + o_n[None, :]
    low = tl.load(p_direction, mask=m_dn, other=0.0)  # [BD, BN]
    high = tl.load(p_direction + HALF, mask=m_dn, other=0.0)  # [BD, BN]
    mean = tl.load(p_mean + i_k * D + o_d, mask=m_d, other=0.0)  # [BD]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.load(p_position + i_row).to(tl.int32)
    end = indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    if end <= BEGIN:
        return
    first, count = tokens_of(p_begin, i_row, T)
    m_q = o_q < G * count
    p_own_lse2 = p_lse2 + ((i_row * K + i_k) * nw + i_s) * (G * T) + o_q
    # Near tiles: [0, BEGIN), then [end, last). The first programs have pieces of the sample, so the last ones begin.
    last, first_tile = m + count, nw - 1 - i_s
    tiles = tl.cdiv(last - end, TILE) + BEGIN // TILE
    if (i_s * PIECE * SAMPLE >= end) & (first_tile >= tiles):  # no work
        tl.store(p_own_lse2, tl.full([BQ], float("-inf"), tl.float32), mask=m_q)
        return
    m_dq = m_d[:, None] & m_q[None, :]
    p_group_query = p_query + first * s_query_row + i_k * G * s_query_head
    p_row_table = p_table + i_row * s_table_row
    p_head_codes = p_codes + i_k * PAGE * HALF
    o_query = query_at(o_q, s_query_row, s_query_head, G, T)
    q = tl.load(p_group_query + o_query[None, :] + o_d[:, None], mask=m_dq, other=0.0)  # [BD, BQ]
    narrow_low, narrow_high, factor, constant, base = _narrow(q, low, high, mean, log2_scale)
    if i_s == 0:
        p_pair = p_narrow + (i_row * K + i_k) * (4 * BN * BQ) + o_n[:, None] * (2 * BQ) + tl.arange(0, 2 * BQ)[None, :]
        tl.store(p_pair, narrow_low)
        tl.store(p_pair + 2 * BN * BQ, narrow_high)
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
        score = _estimated(narrow_low, narrow_high, factor, constant - base, codes)
        total += tl.where(m_t[:, None], tl.exp2(score), 0.0)
    sampled = tl.maximum(_sampled(end) - _sampled(tl.full((), BEGIN, tl.int32)), 1)
    total = tl.sum(total, 0) * ((end - BEGIN).to(tl.float32) / sampled.to(tl.float32))
    # Where estimates reach far, all that were sampled may be lost below `base`; near tokens never are.
    sample_lse2 = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    peak, total = sample_lse2, tl.where(total > 0, 1.0, 0.0)
    o_tile = tl.arange(0, TILE)
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    log2_scale = scaled(log2_scale, p_key_scale)
    for i in range(first_tile, tiles, nw):
        token = tl.where(i < BEGIN // TILE, i * TILE, end + (i - BEGIN // TILE) * TILE) + o_tile
        m_t = token < last
        page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [TILE]
        p_key = p_head_kv + (page * s_kv_page + token % PAGE * s_kv_token)[:, None] + o_d[None, :]
        key = tl.load(p_key, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [TILE, BD]
        near_q = q
        if INTERPRETED:
            key, near_q = key.to(tl.float32), q.to(tl.float32)
        score = tl.dot(key.to(near_q.dtype), near_q, input_precision="ieee") * log2_scale
        score = tl.where(seen(m_t, token, m, o_q, G, T), score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))  # finite with one token a row: each tile has one that it sees
        least = new_peak if T == 1 else tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - least) + tl.sum(tl.exp2(score - least[None, :]), 0)
        peak = new_peak
    lse2 = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(p_own_lse2, lse2, mask=m_q)


@triton.jit
def _least(
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


@triton.jit
def _attend(q, key, value, mask, log2_scale, peak, total, acc, DOT: tl.constexpr):
    """A partial result with the tokens of a block: key, value `[BT, BD]`, those of `mask`. q: `[BD, BQ]`. total: `[BT, BQ]`."""
    score = tl.dot(key.to(DOT), q, input_precision="ieee") * log2_scale  # [BT, BQ]
    score = tl.where(mask, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 0))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(score - base[None, :])
    shrink = tl.exp2(peak - base)
    total = total * shrink[None, :] + weight
    weight = weight.to(tl.float16 if value.dtype.is_fp8() else value.dtype).to(DOT)
    acc = tl.dot(tl.trans(value.to(DOT)), weight, acc * shrink[None, :], input_precision="ieee")  # [BD, BQ]
    return new_peak, total, acc


@triton.jit(do_not_specialize=("s_table_row", "s_words", "ns", "nw"))
def look_kernel(
    p_query, p_position, p_begin, p_ring, p_ready, p_table, p_kv, p_codes, p_means, p_lse2, p_narrow, p_scale,
    p_slots, p_words, p_part, p_part_acc, p_read, p_key_scale, p_value_scale,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page, s_words,
    ns, nw, log2_scale, log2_tolerance,
    K: tl.constexpr, G: tl.constexpr, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, SPAN: tl.constexpr,
    ROOM: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BNW: tl.constexpr,
    LIST_STAGES: tl.constexpr, READ_STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the partial result over its tokens, see `partial`, and how many of them it read.

    Its tokens are those of its spans, and a share of the near ones; of a row read whole all are near. ROOM: slots that
    its list in `p_slots` holds. nw: programs of `weigh_kernel`. p_words: `[pairs, spans, SPAN / 32]`, bits of the tokens
    to read.
    """
    # 1. The row. What `weigh_kernel` did not write may be read before it ends.
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    end = indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    first_query, count = tokens_of(p_begin, i_row, T)
    HALF: tl.constexpr = N // 2
    C: tl.constexpr = G * T
    last = m + count
    o_q, o_d, o_n = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN)
    m_q, m_d = o_q < G * count, o_d < D
    m_dq = m_d[:, None] & m_q[None, :]
    i_bk = i_row * K + i_k
    i_part = i_bk * ns + i_s
    p_row_table = p_table + i_row * s_table_row
    p_list = p_slots + i_part * ROOM
    p_pair_words = p_words + i_bk * s_words
    p_pair_lse2 = p_lse2 + i_bk * nw * C
    looked, ns = end > BEGIN, programs_of(ns, end, last, BEGIN, SPAN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if (m < 0) | (i_s >= ns):
        return

    # 2. Mark its tokens to read, and add up what the others weigh. Sums over `RUN` tokens stay within a warp.
    rest, rest_acc = tl.zeros([4, BQ], tl.float32), tl.zeros([BD, BQ], tl.float32)
    if looked:
        p_pair = p_narrow + i_bk * (4 * BN * BQ) + o_n[:, None] * (2 * BQ) + tl.arange(0, 2 * BQ)[None, :]
        narrow_low, narrow_high = tl.load(p_pair), tl.load(p_pair + 2 * BN * BQ)
        factor, constant = tl.load(p_scale + i_bk * (2 * BQ) + o_q), tl.load(p_scale + i_bk * (2 * BQ) + BQ + o_q)
        # Shares are relative to those from which tokens are listed; no column without a query lists any.
        least = _least(p_pair_lse2, nw, m, log2_tolerance, o_q, m_q, G, T, BNW)
        constant = tl.where(m_q, constant - least, float("-inf"))
        o_t, o_r, o_w = tl.arange(0, SPAN), tl.arange(0, SPAN // RUN), tl.arange(0, SPAN // 32)
        p_head_codes = p_codes + i_k * PAGE * HALF
        for t in tl.range(i_s * SPAN, end, ns * SPAN, num_stages=LIST_STAGES):
            token = t + o_t
            m_t = token < end
            page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [SPAN]
            p_code = p_head_codes + (page * s_code_page + token % PAGE * HALF)[:, None] + o_n[None, :]
            codes = tl.load(p_code, mask=m_t[:, None] & (o_n < HALF)[None, :], other=0)  # [SPAN, BN]
            run = t + o_r * RUN
            m_r = run < end
            run_page = tl.load(p_row_table + run // PAGE, mask=m_r, other=0).to(tl.int64)  # [SPAN / RUN]
            p_mean = p_means + (run_page * s_mean_page + i_k * D)[:, None] + o_d[None, :]
            mean = tl.load(p_mean, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [SPAN / RUN, BD]
            share = _estimated(narrow_low, narrow_high, factor, constant, codes)  # log2
            share = tl.where((m_t & (token >= BEGIN))[:, None], share, float("-inf"))
            listed = (tl.max(share, 1) >= 0).to(tl.int32)
            tl.store(p_pair_words + t // 32 + o_w, _words(listed, RUN))
            left = tl.exp2(tl.where((listed == 0)[:, None], share, float("-inf")))  # [SPAN, BQ]
            weight = tl.sum(tl.reshape(left, (SPAN // RUN, RUN, BQ)), 1)
            rest += tl.sum(tl.reshape(weight, (SPAN // RUN // 4, 4, BQ)), 0)  # the runs of each of a product's warps
            weight = weight.to(mean.dtype).to(DOT)
            rest_acc = tl.dot(tl.trans(mean.to(DOT)), weight, rest_acc, input_precision="ieee")  # [BD, BQ]
        tl.debug_barrier()  # what threads marked, others read

    # 3. Read what is marked: list the slots of as many as the list holds, `BW` words at once, and attend to them.
    p_group_query = p_query + first_query * s_query_row + i_k * G * s_query_head
    o_query = query_at(o_q, s_query_row, s_query_head, G, T)
    q = tl.load(p_group_query + o_query[None, :] + o_d[:, None], mask=m_dq, other=0.0).to(DOT)  # [BD, BQ]
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    near = tl.where(looked, BEGIN + last - end, last)  # of a row read whole all tokens are near
    near_begin, near_end = near * i_s // ns, near * (i_s + 1) // ns
    read = near_end - near_begin
    o_j, o_bit = tl.arange(0, BT), tl.arange(0, 32)
    # The result begins with the others, page by page. `total` is added up over tokens at the end only.
    peak = tl.full([BQ], float("-inf"), tl.float32)
    if looked:  # anew, since registers are scarce before
        peak = _least(p_pair_lse2, nw, m, log2_tolerance, o_q, m_q, G, T, BNW)
    total = tl.where((o_j == 0)[:, None], tl.sum(rest, 0)[None, :], 0.0)  # [BT, BQ]
    acc = rest_acc  # [BD, BQ]
    log2_scale = scaled(log2_scale, p_key_scale)
    OF_SPAN: tl.constexpr = SPAN // 32  # words
    w, words = 0, tl.maximum(tl.cdiv(tl.cdiv(end, SPAN) - i_s, ns), 0) * OF_SPAN
    going_on = looked
    while going_on:
        listed_count = tl.zeros((), tl.int32)
        while (w < words) & (listed_count <= ROOM - BW * 32):
            i_word = w + tl.arange(0, BW)
            first = (i_word // OF_SPAN * ns + i_s) * SPAN
            word = tl.load(p_pair_words + first // 32 + i_word % OF_SPAN, mask=i_word < words, other=0)
            marked = tl.reshape((word[:, None] >> o_bit[None, :]) & 1, (BW * 32,))
            token = first[:, None] + _place(i_word[:, None] % OF_SPAN, o_bit[None, :], RUN)
            token = tl.reshape(token, (BW * 32,))
            page = tl.load(p_row_table + token // PAGE, mask=marked != 0, other=0)
            at = listed_count + tl.cumsum(marked, 0) - 1
            tl.store(p_list + at, page * PAGE + token % PAGE, mask=marked != 0)
            listed_count += tl.sum(marked, 0)
            w += BW
        read += listed_count
        going_on = w < words
        # Near ones too, in the last turn, where all columns see them.
        if (T == 1) & (w >= words) & (listed_count + near_end - near_begin <= ROOM):
            for i in tl.range(near_begin, near_end, BW * 32, num_stages=1):
                i_near = i + tl.arange(0, BW * 32)
                token = tl.where(i_near < BEGIN, i_near, i_near - BEGIN + end)
                page = tl.load(p_row_table + token // PAGE, mask=i_near < near_end, other=0)
                p_at = p_list + listed_count + i_near - near_begin
                tl.store(p_at, page * PAGE + token % PAGE, mask=i_near < near_end)
            listed_count += near_end - near_begin
            near_begin = near_end
        tl.debug_barrier()  # what threads listed, others read
        for j in tl.range(0, listed_count, BT, num_stages=READ_STAGES):
            m_t = j + o_j < listed_count
            slot = tl.load(p_list + j + o_j, mask=m_t, other=0)  # [BT]
            p_token = p_head_kv + (slot // PAGE).to(tl.int64) * s_kv_page + slot % PAGE * s_kv_token
            m_td = m_t[:, None] & m_d[None, :]
            key = tl.load(p_token[:, None] + o_d[None, :], mask=m_td, other=0.0)  # [BT, BD]
            value = tl.load(p_token[:, None] + D + o_d[None, :], mask=m_td, other=0.0)  # [BT, BD]
            peak, total, acc = _attend(q, key, value, m_t[:, None], log2_scale, peak, total, acc, DOT)
        tl.debug_barrier()  # before they list others

    # 4. Attend to near tokens.
    for j in tl.range(near_begin, near_end, BT, num_stages=READ_STAGES):
        m_t = j + o_j < near_end
        token = tl.where(j + o_j < BEGIN, j + o_j, j + o_j - BEGIN + end)
        page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [BT]
        p_token = p_head_kv + page * s_kv_page + token % PAGE * s_kv_token  # [BT]
        m_td = m_t[:, None] & m_d[None, :]
        key = tl.load(p_token[:, None] + o_d[None, :], mask=m_td, other=0.0)  # [BT, BD]
        value = tl.load(p_token[:, None] + D + o_d[None, :], mask=m_td, other=0.0)  # [BT, BD]
        m_seen = seen(m_t, token, m, o_q, G, T)
        peak, total, acc = _attend(q, key, value, m_seen, log2_scale, peak, total, acc, DOT)
    total = tl.sum(total, 0)  # [BQ]

    # 5. Leave the result to `merge_kernel`.
    tl.store(p_part + (i_part * C + o_q) * 2, peak, mask=m_q)
    tl.store(p_part + (i_part * C + o_q) * 2 + 1, total, mask=m_q)
    tl.store(p_part_acc + (i_part * C + o_q)[None, :] * D + o_d[:, None], scaled(acc, p_value_scale), mask=m_dq)
    tl.store(p_read + i_part, read)


def look_up(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Decode the tokens of each row. Arguments: of `launches`. Allocates nothing and waits for nothing."""
    for _ in launches(rows, query, kv, layout, maps, rule, work, result):
        pass


def launches(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> Iterator[str]:  # fmt: skip
    """Launch the kernels one by one: each has been launched when its name is yielded.

    rows: position, ring (`OPTED_OUT` or less for a row that is read whole), block_table and begin are read; int32. query:
    `[N, H, D]` after RoPE, last dimension contiguous. kv: `[blocks, K, PAGE, 2 D]` with its index. result: out `[N, H, D]`,
    written, and counts `[len(Count)]` int64, added to.
    """
    out, counts = result
    count, (_, heads, d) = len(rows.position), query.shape
    at_once = 1 if rows.begin is None else work.at_once
    kv_heads, page, tuning = layout.kv_heads, layout.page, work.tuning
    group, ns = heads // kv_heads, work.splits(count * kv_heads)
    nw = work.weigh_splits(count * kv_heads)
    width = work.width(group * at_once)
    codes, means = layout.views(kv)
    s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
    begin = -(-rule.sink // TILE_TOKENS) * TILE_TOKENS
    everywhere = dict(
        p_query=query, p_position=rows.position, p_begin=rows.begin, p_ring=rows.ring, p_ready=maps.ready,
        p_table=rows.block_table, p_key_scale=maps.scales and maps.scales.key,
        p_kv=kv, p_codes=codes.view(torch.int8), p_lse2=work.lse2, p_narrow=work.narrow, p_scale=work.scale,
        s_query_row=s_query[0], s_query_head=s_query[1], s_table_row=rows.block_table.stride(0),
        s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_code_page=codes.stride(0),
        log2_scale=rule.scale * LOG2_E.value, K=kv_heads, G=group, T=at_once, D=d, N=layout.directions, PAGE=page,
        BAND=rule.band, BEGIN=begin, MIN_CONTEXT=rule.min_context, nw=nw,
        BQ=width, BD=power_of_two(d), BN=narrow_width(layout.directions), PDL=work.pdl,
        **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
    parts = dict(p_part=work.part, p_part_acc=work.part_acc, p_read=work.read)
    weigh_kernel[(nw, kv_heads, count)](
        **everywhere, p_to_query=maps.to_query, p_mean=maps.mean, STAGES=tuning.weigh_stages, num_warps=4 * work.wider(width, d),
    )  # fmt: skip
    yield "weigh"
    arguments = dict(
        **everywhere, **parts, p_value_scale=maps.scales and maps.scales.value, p_means=means, p_slots=work.slots,
        p_words=work.words, s_mean_page=means.stride(0), s_words=work.words.stride(0), ns=ns, SPAN=SPAN,
        ROOM=work.slots.shape[1],
        log2_tolerance=math.log2(rule.tolerance) if rule.tolerance > 0 else -1e9,  # 0 reads every token
        BT=tuning.block if d <= 128 else tuning.block // 2, BW=tuning.words, BNW=power_of_two(tuning.most),
        # With FP8 registers spill in more stages.
        LIST_STAGES=tuning.list_stages, READ_STAGES=tuning.read_stages - (kv.itemsize == 1),
        DOT=tl.float32 if triton.knobs.runtime.interpret else DOT_TYPES[means.dtype],
    )  # fmt: skip
    kinds = by_kind(arguments, ("ns", "nw", "log2_scale", "log2_tolerance", "s_table_row", "s_words"))
    launch(look_kernel, (ns, kv_heads, count), *kinds, work.options(width, d), work.found)
    yield "look"
    shared = "p_position p_begin p_ring p_ready K G T D BAND BEGIN MIN_CONTEXT PDL launch_pdl".split()
    merge_kernel[(heads * at_once, count, triton.cdiv(d, MERGED))](
        **{name: everywhere[name] for name in shared if name in everywhere}, **parts, ns=ns, p_out=out, p_counters=counts,
        s_out_row=s_out[0], s_out_head=s_out[1], INDEX_BYTES=layout.index_bytes, KV_BYTES=layout.kv_bytes,
        SPAN=SPAN, BD=MERGED, BNS=power_of_two(tuning.most), num_warps=4,
    )  # fmt: skip
    yield "merge"
