"""Split-KV: the parts of a prefix that programs attend to, and how they are merged.

Device code of `exact`. The tokens of all missed groups are one list of units of `BN` tokens, of which each program takes
a share. A group whose units lie in the shares of several programs leaves one part in each, normalised: `out` `[BG, BD]`
and `lse2` `[BG]`, its **base-2** LSE. A program has two slots for parts: slot 0 for a group that began in an earlier
program's share, slot 1 for one that begins in its own.
"""

import triton
import triton.language as tl

from vllm_mac.kernels.merge import complete_miss


@triton.jit
def write(p_out, p_lse2, out, lse2, s_out_head, o_g, o_d, G: tl.constexpr, D: tl.constexpr):
    """Write a group's `out` `[BG, BD]` and `lse2` `[BG]`."""
    m_gd = (o_g < G)[:, None] & (o_d < D)[None, :]
    tl.store(p_out + o_g[:, None] * s_out_head + o_d[None, :], out.to(p_out.dtype.element_ty), mask=m_gd)
    tl.store(p_lse2 + o_g, lse2, mask=o_g < G)


@triton.jit
def _put(p_split_out, p_split_lse2, i_p, i_first, out, lse2, o_g, o_d, G: tl.constexpr, D: tl.constexpr):
    """Keep the part in program `i_p` of the group that begins in program `i_first`."""
    o_slot = (2 * i_p + (i_p == i_first).to(tl.int32)) * G
    write(p_split_out + o_slot.to(tl.int64) * D, p_split_lse2 + o_slot, out, lse2, D, o_g, o_d, G, D)


@triton.jit
def _merge(
    p_split_out, p_split_lse2, low, step, count, i_first, o_g, o_d, o_part,
    G: tl.constexpr, D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge the parts in the programs `low, low + step, ...`, but none before `i_first`. o_part: `[2 MERGE]`."""
    # .cg: written by other SMs, so not from this one's L1.
    o_program = tl.maximum(low + o_part * step, i_first)
    o_slot = (2 * o_program + (o_program == i_first).to(tl.int32)) * G
    m_part = (o_part < count)[:, None] & (o_g < G)[None, :]
    p_each = p_split_lse2 + o_slot[:, None] + o_g[None, :]
    each = tl.load(p_each, mask=m_part, other=float("-inf"), cache_modifier=".cg")  # [2 MERGE, BG]
    peak = tl.where(o_g < G, tl.max(each, 0), 0.0)
    total = tl.where(o_g < G, tl.sum(tl.exp2(each - peak[None, :]), 0), 1.0)
    lse2 = peak + tl.log2(total)
    # The weights are final before the first value is read: no iteration waits for the one before.
    out = tl.zeros([o_g.shape[0], o_d.shape[0]], tl.float32)
    o_gd = o_g[:, None] + tl.zeros_like(o_d)[None, :]
    m_gd = (o_g < G)[:, None] & (o_d < D)[None, :]
    for i in tl.range(0, count, 1, loop_unroll_factor=UNROLL):
        i_p = tl.maximum(low + i * step, i_first)
        i_slot = (2 * i_p + (i_p == i_first).to(tl.int32)) * G
        part_lse2 = tl.load(p_split_lse2 + i_slot + o_gd, mask=m_gd, other=0.0, cache_modifier=".cg")  # [BG, BD]
        p_part = p_split_out + (i_slot + o_gd).to(tl.int64) * D + o_d[None, :]
        part = tl.load(p_part, mask=m_gd, other=0.0, cache_modifier=".cg")  # [BG, BD]
        out += tl.exp2(part_lse2 - lse2[:, None]) * part
    return out, lse2


@triton.jit
def attend_share(
    q, i_row, begin, end, p_table, p_head_kv, s_table_row, s_kv_page, s_kv_token, log2_scale, o_q, o_n, o_d,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BN: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`(lse2 [BG], out [BG, BD])` of attention over the tokens `[begin, end)` of row `i_row`. q: `[BQ, BD]`."""
    peak = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BN, BQ], tl.float32)  # added up over the tokens at the end only
    acc = tl.zeros([BD, BQ], tl.float32)
    for t in tl.range(begin, end, BN, num_stages=STAGES):
        # The last block repeats its last token instead of masking loads.
        token = tl.minimum(t + o_n, end - 1)
        page = tl.load(p_table + i_row * s_table_row + token // PAGE).to(tl.int64)  # [BN]
        p_token = p_head_kv + page * s_kv_page + (token % PAGE) * s_kv_token  # [BN]
        if BD == D:
            key = tl.load(p_token[:, None] + o_d[None, :])  # [BN, BD]
            value = tl.load(p_token[:, None] + D + o_d[None, :])  # [BN, BD]
        else:
            key = tl.load(p_token[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
            value = tl.load(p_token[:, None] + D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
        # Keys and values, not the few queries, are the tall operand: Hopper's tensor cores
        # then read them from shared memory, without a pass through registers.
        score = tl.dot(key.to(DOT), tl.trans(q).to(DOT), input_precision="ieee") * log2_scale  # [BN, BQ]
        score = tl.where((t + o_n < end)[:, None], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        weight = tl.exp2(score - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink[None, :] + weight
        weight = weight.to(value.dtype).to(DOT)
        acc = tl.dot(tl.trans(value).to(DOT), weight, acc * shrink[None, :], input_precision="ieee")  # [BD, BQ]
        peak = new_peak
    total = tl.sum(total, 0)  # [BQ]
    out = tl.trans(acc / total[None, :])  # [BQ, BD]
    lse2 = peak + tl.log2(total)
    # From BQ to BG rows; the others are of no head.
    lse2 = tl.max(tl.reshape(tl.where(o_q < G, lse2, float("-inf")), (BQ // BG, BG)), 0)
    out = tl.sum(tl.reshape(tl.where((o_q < G)[:, None], out, 0.0), (BQ // BG, BG, BD)), 0)
    return lse2, out


@triton.jit
def merge_shares(
    lse2, out, i_p, programs, i_first, i_last, p_split_out, p_split_lse2, p_arrived, o_g, o_d, o_part,
    G: tl.constexpr, D: tl.constexpr, MERGE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`(ready, lse2, out)`: put this program's part of a group; whether it is the last to, and then the whole group's.

    The group's parts are in the programs `i_first` to `i_last`. p_arrived: counters of arrival, 0 before and after.
    """
    ready = tl.full((), 1, tl.int32)
    _put(p_split_out, p_split_lse2, i_p, i_first, out, lse2, o_g, o_d, G, D)
    tl.debug_barrier()  # all threads' stores precede the one thread's atomic
    # The last to arrive merges: few programs at once, many within blocks of MERGE, then the blocks.
    low = tl.maximum(i_first, i_p // MERGE * MERGE)
    high = tl.minimum(i_last, i_p // MERGE * MERGE + MERGE - 1)
    blocks = i_last // MERGE - i_first // MERGE + 1
    if i_last - i_first < 2 * MERGE:
        low, high, blocks = i_first, i_last, tl.minimum(blocks, 1)
    if high > low:
        p_count = p_arrived + 2 * low + (low == i_first).to(tl.int32)
        ready = (tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu") == high - low).to(tl.int32)
        if ready != 0:
            tl.debug_barrier()
            tl.store(p_count, 0)  # for the next launch
            out, lse2 = _merge(
                p_split_out, p_split_lse2, low, 1, high - low + 1, i_first, o_g, o_d, o_part, G, D, UNROLL
            )
            if blocks > 1:
                _put(p_split_out, p_split_lse2, low, i_first, out, lse2, o_g, o_d, G, D)
                tl.debug_barrier()
    if (blocks > 1) & (ready != 0):
        p_count = p_arrived + 2 * programs + 2 * i_first + 1
        ready = (tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu") == blocks - 1).to(tl.int32)
        if ready != 0:
            tl.debug_barrier()
            tl.store(p_count, 0)
            out, lse2 = _merge(
                p_split_out, p_split_lse2, i_first // MERGE * MERGE, MERGE, blocks, i_first, o_g, o_d, o_part,
                G, D, UNROLL,
            )  # fmt: skip
    return ready, lse2, out


@triton.jit
def complete(
    out, lse2, i_row, i_k, m, ring, p_query, p_cos_sin, p_part_out, p_part_lse, p_out,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    SINK: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
):  # fmt: skip
    """Complete a group whose prefix is `out` `[BG, BD]`, normalised, with `lse2` `[BG]`."""
    H: tl.constexpr = K * G
    left = True
    if not SINK:
        left = ring >= 0  # else the row was read whole, and the hit kernel left nothing
    complete_miss(
        lse2, tl.where(lse2 > float("-inf"), 1.0, 0.0), out, left, p_part_out, p_part_lse,
        p_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
        i_row, i_k, m, ring, s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d, H, G, D, W, ROTARY, NEOX,
    )  # fmt: skip
