"""The kernel of `exact`: exact attention over the prefixes of the missed (row, KV head) groups.

The work of all missed groups is one line of units of `BN` tokens, cut into as many equal
pieces as there are programs: whatever the number of misses and the lengths of their
prefixes, every program reads the same number of tokens. A program therefore meets at most
one group that began in an earlier program and one that goes on in a later one. Those leave
partial results, and the program that arrives last merges them.

Letters and variables are as in `exact`. **LSE base 2.**
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.complete import complete_group


@triton.jit
def _finish(out, lse, b_o, b_l, stride_h, o_g, o_d, G: tl.constexpr, D: tl.constexpr):
    """Write a group's result, `[heads, BD]` and `[heads]`."""
    ok = (o_g < G)[:, None] & (o_d < D)[None, :]
    tl.store(out + o_g[:, None] * stride_h + o_d[None, :], b_o.to(out.dtype.element_ty), mask=ok)
    tl.store(lse + o_g, b_l, mask=o_g < G)


@triton.jit
def _put(part_out, part_lse, program, first, b_o, b_l, o_g, o_d, G: tl.constexpr, D: tl.constexpr):
    """Keep a program's partial result of the group that begins in program `first`."""
    slot = (2 * program + (program == first).to(tl.int32)) * G
    _finish(part_out + slot.to(tl.int64) * D, part_lse + slot, b_o, b_l, D, o_g, o_d, G, D)


@triton.jit
def _merge(
    part_out, part_lse, low, step, count, first, o_g, o_d, o_p,
    G: tl.constexpr, D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge what the programs `low, low + step, ...` (not before `first`) have put."""
    # .cg: written by other multiprocessors, so not from this one's L1.
    program = tl.maximum(low + o_p * step, first)
    slot = (2 * program + (program == first).to(tl.int32)) * G
    ok = (o_p < count)[:, None] & (o_g < G)[None, :]
    at = part_lse + slot[:, None] + o_g[None, :]
    b_each = tl.load(at, mask=ok, other=float("-inf"), cache_modifier=".cg")  # [BP, BM]
    b_max = tl.where(o_g < G, tl.max(b_each, 0), 0.0)
    b_sum = tl.where(o_g < G, tl.sum(tl.exp2(b_each - b_max[None, :]), 0), 1.0)
    b_l = b_max + tl.log2(b_sum)
    # The weights are final before the first value is read: no turn waits for the one before.
    b_o = tl.zeros([o_g.shape[0], o_d.shape[0]], tl.float32)
    row = o_g[:, None] + tl.zeros_like(o_d)[None, :]
    ok = (o_g < G)[:, None] & (o_d < D)[None, :]
    for i in tl.range(0, count, 1, loop_unroll_factor=UNROLL):
        i_p = tl.maximum(low + i * step, first)
        i_s = (2 * i_p + (i_p == first).to(tl.int32)) * G
        b_one = tl.load(part_lse + i_s + row, mask=ok, other=0.0, cache_modifier=".cg")  # [BM, BD]
        at_one = part_out + (i_s + row).to(tl.int64) * D + o_d[None, :]
        b_x = tl.load(at_one, mask=ok, other=0.0, cache_modifier=".cg")  # [BM, BD]
        b_o += tl.exp2(b_one - b_l[:, None]) * b_x
    return b_o, b_l


@triton.jit
def _complete(
    b_l, b_o, row, i_k, m, i_ring, query, cos_sin, left_out, left_lse, out,
    ring_query, ring_out, ring_lse, ring_chain,
    stride_qb, stride_qh, stride_ob, stride_oh, o_g, o_d,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    SINK: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
):  # fmt: skip
    """Complete a group whose prefix is `b_o` `[BM, BD]`, normalised, with base-2 LSE `b_l` `[BM]`."""
    H: tl.constexpr = K * G
    held = True
    if not SINK:
        held = i_ring >= 0  # else the row was read whole, and `hit` left nothing
    complete_group(
        b_l, tl.where(b_l > float("-inf"), 1.0, 0.0), b_o, held, left_out, left_lse,
        query, cos_sin, out, ring_query, ring_out, ring_lse, ring_chain,
        row, i_k, m, i_ring, stride_qb, stride_qh, stride_ob, stride_oh, o_g, o_d, H, G, D, W, ROTARY, NEOX,
    )  # fmt: skip


# Rows change from step to step, and what depends on them must not compile it anew.
@triton.jit(do_not_specialize=("groups", "stride_table"))
def prefix_kernel(
    query, kv, block_table, position, hit, out, lse, part_out, part_lse, arrived,
    groups, first_token, band, scale_log2,
    stride_qb, stride_qh, stride_page, stride_head, stride_token, stride_table,
    stride_ob, stride_oh, stride_lb,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    P: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr, OF_HITS: tl.constexpr,
    ring=None, cos_sin=None, left_out=None, left_lse=None,
    ring_query=None, ring_out=None, ring_lse=None, ring_chain=None,
    W: tl.constexpr = 0, SINK: tl.constexpr = 0, ROTARY: tl.constexpr = 0, NEOX: tl.constexpr = True,
):  # fmt: skip
    """With rings `out` is what the layer gives, and `lse` nothing."""
    COMPLETE: tl.constexpr = ring_query is not None
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i_p, programs = tl.program_id(0), tl.num_programs(0)
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    o_g, o_m, o_p = tl.arange(0, BG), tl.arange(0, BM), tl.arange(0, 2 * P)

    # Every program lays out the whole line of work by itself: no other launch, no waiting.
    o_r = tl.arange(0, BR)
    b_m = tl.load(position + o_r // K, mask=o_r < groups, other=-1).to(tl.int32)  # [BR]
    if COMPLETE:
        b_ring = tl.load(ring + o_r // K, mask=o_r < groups, other=-1)  # [BR]
    b_hit = tl.load(hit + o_r, mask=o_r < groups, other=0) != 0  # [BR]
    if COMPLETE:  # the band of a row without a ring is read like its prefix
        b_m += tl.where((b_ring < 0) & (b_m >= 0), band, 0)
    b_tokens = tl.where(b_hit == OF_HITS, tl.maximum(b_m + 1 - band - first_token, 0), 0)
    b_units = (b_tokens + BN - 1) // BN  # [BR]
    b_end = tl.cumsum(b_units, 0)
    total = tl.sum(b_units, 0)
    share = tl.maximum((total + programs - 1) // programs, 1)
    # A group in few pieces is merged sooner than another unit is read.
    share = tl.maximum(share, tl.minimum((tl.max(b_units, 0) + P - 1) // P, 4))

    b_none = (b_hit == OF_HITS) & (b_m >= 0) & (b_tokens == 0)
    if COMPLETE:
        nothing = tl.sum(b_none.to(tl.int32), 0) > 0
    else:
        nothing = True
    if nothing:
        i_r = i_p
        while i_r < groups:
            m = tl.load(position + i_r // K).to(tl.int32)
            wanted = (tl.sum(tl.where(o_r == i_r, b_hit.to(tl.int32), 0), 0) == OF_HITS) & (m >= 0)
            row, i_k = (i_r // K).to(tl.int64), i_r % K
            b_empty = tl.full([BM], float("-inf"), tl.float32)
            b_zero = tl.zeros([BM, BD], tl.float32)
            if COMPLETE:
                i_ring = tl.load(ring + row).to(tl.int64)
                if wanted & (m + 1 - tl.where(i_ring < 0, 0, band) <= first_token):
                    _complete(
                        b_empty, b_zero, row, i_k, m, i_ring, query, cos_sin, left_out, left_lse, out,
                        ring_query, ring_out, ring_lse, ring_chain,
                        stride_qb, stride_qh, stride_ob, stride_oh, o_m, o_d, K, G, D, W, SINK, ROTARY, NEOX,
                    )  # fmt: skip
            else:
                if (not wanted) | (m + 1 - band <= first_token):
                    at_none = out + row * stride_ob + i_k * G * stride_oh
                    _finish(at_none, lse + row * stride_lb + i_k * G, b_zero, b_empty, stride_oh, o_m, o_d, G, D)
            i_r += programs

    unit = i_p * share
    stop = tl.minimum(unit + share, total)
    while unit < stop:
        i_r = tl.sum((b_end <= unit).to(tl.int32), 0)
        group_end = tl.min(tl.where(b_end > unit, b_end, 2147483647), 0)
        group_start = group_end - tl.sum(tl.where(o_r == i_r, b_units, 0), 0)
        segment_end = tl.minimum(stop, group_end)
        row, i_k = (i_r // K).to(tl.int64), i_r % K
        if BR <= 1024:  # later to come from memory than from registers, of which large batches have none left
            m = tl.sum(tl.where(o_r == i_r, b_m, 0), 0)
            if COMPLETE:
                i_ring = tl.sum(tl.where(o_r == i_r, b_ring, 0), 0).to(tl.int64)
        else:
            m = tl.load(position + row).to(tl.int32)
            if COMPLETE:
                i_ring = tl.load(ring + row).to(tl.int64)
                m += tl.where(i_ring < 0, band, 0)
        token_end = m + 1 - band
        begin = first_token + (unit - group_start) * BN
        end = tl.minimum(first_token + (segment_end - group_start) * BN, token_end)

        at_q = query + row * stride_qb + (i_k * G + o_g)[:, None] * stride_qh + o_d[None, :]
        b_q = tl.load(at_q, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)  # [BG, BD]
        b_max = tl.full([BG], float("-inf"), tl.float32)
        b_sum = tl.zeros([BN, BG], tl.float32)  # added up over the tokens at the end only
        b_o = tl.zeros([BD, BG], tl.float32)
        head_kv = kv + i_k.to(tl.int64) * stride_head
        for t in tl.range(begin, end, BN, num_stages=STAGES):
            # The last block repeats its last token instead of masking loads.
            token = tl.minimum(t + o_n, end - 1)
            page = tl.load(block_table + row * stride_table + token // PAGE).to(tl.int64)  # [BN]
            at_kv = head_kv + page * stride_page + (token % PAGE) * stride_token  # [BN]
            if BD == D:
                b_k = tl.load(at_kv[:, None] + o_d[None, :])  # [BN, BD]
                b_v = tl.load(at_kv[:, None] + D + o_d[None, :])  # [BN, BD]
            else:
                b_k = tl.load(at_kv[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
                b_v = tl.load(at_kv[:, None] + D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
            # Keys and values, not the few queries, are the tall operand: Hopper's tensor cores
            # then read them from shared memory, without a pass through registers.
            b_s = tl.dot(b_k.to(DOT), tl.trans(b_q).to(DOT), input_precision="ieee") * scale_log2  # [BN, BG]
            b_s = tl.where((t + o_n < end)[:, None], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 0))
            b_w = tl.exp2(b_s - b_new[None, :])
            b_old = tl.exp2(b_max - b_new)
            b_sum = b_sum * b_old[None, :] + b_w
            b_w = b_w.to(b_v.dtype).to(DOT)
            b_o = tl.dot(tl.trans(b_v).to(DOT), b_w, b_o * b_old[None, :], input_precision="ieee")  # [BD, BG]
            b_max = b_new
        b_total = tl.sum(b_sum, 0)  # [BG]
        b_o = tl.trans(b_o / b_total[None, :])  # [BG, BD]
        b_l = b_max + tl.log2(b_total)

        # From BG to BM rows; the others are of no head.
        b_rl = tl.max(tl.reshape(tl.where(o_g < G, b_l, float("-inf")), (BG // BM, BM)), 0)
        b_r = tl.sum(tl.reshape(tl.where((o_g < G)[:, None], b_o, 0.0), (BG // BM, BM, BD)), 0)
        ready = tl.full((), 1, tl.int32)  # whether this program holds the group's result
        if (unit != group_start) | (segment_end != group_end):
            # A program has two slots: 0 for a group begun earlier, 1 for one that begins here.
            first, last = group_start // share, (group_end - 1) // share  # programs of this group
            _put(part_out, part_lse, i_p, first, b_r, b_rl, o_m, o_d, G, D)
            tl.debug_barrier()  # all threads' stores precede the one thread's atomic
            # The last to arrive merges: few programs at once, many within blocks of P, then the blocks.
            low = tl.maximum(first, i_p // P * P)
            high = tl.minimum(last, i_p // P * P + P - 1)
            blocks = last // P - first // P + 1
            if last - first < 2 * P:
                low, high, blocks = first, last, tl.minimum(blocks, 1)
            if high > low:
                counter = arrived + 2 * low + (low == first).to(tl.int32)
                ready = (tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == high - low).to(tl.int32)
                if ready != 0:
                    tl.debug_barrier()
                    tl.store(counter, 0)  # for the next launch
                    b_r, b_rl = _merge(
                        part_out, part_lse, low, 1, high - low + 1, first, o_m, o_d, o_p,
                        G, D, UNROLL,
                    )  # fmt: skip
                    if blocks > 1:
                        _put(part_out, part_lse, low, first, b_r, b_rl, o_m, o_d, G, D)
                        tl.debug_barrier()
            if (blocks > 1) & (ready != 0):
                counter2 = arrived + 2 * programs + 2 * first + 1
                ready = (tl.atomic_add(counter2, 1, sem="acq_rel", scope="gpu") == blocks - 1).to(tl.int32)
                if ready != 0:
                    tl.debug_barrier()
                    tl.store(counter2, 0)
                    b_r, b_rl = _merge(
                        part_out, part_lse, first // P * P, P, blocks, first, o_m, o_d, o_p,
                        G, D, UNROLL,
                    )  # fmt: skip
        if ready != 0:
            if COMPLETE:
                _complete(
                    b_rl, b_r, row, i_k, m, i_ring, query, cos_sin, left_out, left_lse, out,
                    ring_query, ring_out, ring_lse, ring_chain,
                    stride_qb, stride_qh, stride_ob, stride_oh, o_m, o_d, K, G, D, W, SINK, ROTARY, NEOX,
                )  # fmt: skip
            else:
                at_out = out + row * stride_ob + i_k * G * stride_oh
                _finish(at_out, lse + row * stride_lb + i_k * G, b_r, b_rl, stride_oh, o_m, o_d, G, D)
        unit = segment_end
