"""What becomes of a KV group: merge its partial results, write its output and its ring entries.

Device code; partial results as in `partial`. A group that hit is finished by `complete_hit`. Of one that missed
`leave_miss` keeps what does not depend on its prefix, and `complete_miss` finishes it once the prefix was read.
`reference.merge` and the end of `paged.decode` are the oracles.
"""

import triton
import triton.language as tl

from vllm_mac.kernels.entry import unrotate, write_entry
from vllm_mac.kernels.partial import combine, finish, unfinish


@triton.jit
def complete_hit(
    near, near_total, near_acc, rest, rest_total, rest_acc, kept, ring_out, ring_lse, chain,
    p_group_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    i_row, m, ring, o_h, s_query_head, s_out_row, s_out_head, o_g, o_d, m_g, m_gd,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
):  # fmt: skip
    """Finish a group that hit, and write its heads' entries.

    near: over the amendment. rest: over band and sink. ring_out, ring_lse: the matched summaries, natural log.
    kept: the queries to write, in the ring's dtype, or None for each head's own. chain: `[BG]`, to write.
    """
    peak, total, acc = unfinish(ring_out, ring_lse)
    near, near_total, near_acc = combine(near, near_total, near_acc, peak, total, acc)
    near_out, near_lse = finish(near, near_total, near_acc)
    peak, total, acc = combine(near, near_total, near_acc, rest, rest_total, rest_acc)
    out, _ = finish(peak, total, acc)
    p_o = p_out + i_row * s_out_row + (o_h * s_out_head)[:, None] + o_d[None, :]
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_gd)
    # The entry written may be the one matched: position m-W has the slot of m.
    tl.debug_barrier()
    o_entry = (ring * H + o_h) * W + m % W  # [BG]
    o_entry_d = o_entry[:, None] * D + o_d[None, :]
    if kept is None:
        p_q = p_group_query + (o_g * s_query_head)[:, None]
        kept = unrotate(p_q, p_cos_sin, m, o_d[None, :], m_gd, ROTARY, NEOX)
    write_entry(
        p_ring_query, p_ring_out, p_ring_lse, p_ring_chain, o_entry, o_entry_d, kept, near_out, near_lse, chain,
        m_g, m_gd,
    )  # fmt: skip


@triton.jit
def leave_miss(
    p_part_out,
    p_part_lse,
    o_head,
    near,
    near_total,
    near_acc,
    rest,
    rest_total,
    rest_acc,
    o_d,
    m_g,
    m_gd,
    D: tl.constexpr,
):
    """Leave both partial results of a group that missed: up to the first whole page, and of band and sink.

    o_head: `[BG]`, the heads among those of all rows.
    """
    near_out, near_lse = finish(near, near_total, near_acc)
    rest_out, rest_lse = finish(rest, rest_total, rest_acc)
    o_part = o_head * 2
    tl.store(p_part_lse + o_part, near_lse, mask=m_g)
    tl.store(p_part_lse + o_part + 1, rest_lse, mask=m_g)
    tl.store(p_part_out + o_part[:, None] * D + o_d[None, :], near_out, mask=m_gd)
    tl.store(p_part_out + (o_part[:, None] + 1) * D + o_d[None, :], rest_out, mask=m_gd)


@triton.jit
def complete_miss(
    peak, total, acc, left, p_part_out, p_part_lse,
    p_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    i_row, i_k, m, ring, s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
):  # fmt: skip
    """Finish a group that missed, whose prefix is the partial result `(peak, total, acc)`.

    left: whether `leave_miss` left anything of it.
    """
    m_g, m_d = o_g < G, o_d < D
    m_gd = m_g[:, None] & m_d[None, :]
    o_h = i_k * G + o_g
    m_part = o_g < tl.where(left, G, 0)
    m_part_d = m_part[:, None] & m_d[None, :]
    o_part = (i_row * H + o_h) * 2
    near_lse = tl.load(p_part_lse + o_part, mask=m_part, other=float("-inf"))
    rest_lse = tl.load(p_part_lse + o_part + 1, mask=m_part, other=float("-inf"))
    near_out = tl.load(p_part_out + o_part[:, None] * D + o_d[None, :], mask=m_part_d, other=0.0)  # [BG, BD]
    rest_out = tl.load(p_part_out + (o_part[:, None] + 1) * D + o_d[None, :], mask=m_part_d, other=0.0)  # [BG, BD]
    peak_b, total_b, acc_b = unfinish(near_out, near_lse)
    peak, total, acc = combine(peak_b, total_b, acc_b, peak, total, acc)
    near_out, near_lse = finish(peak, total, acc)
    peak_b, total_b, acc_b = unfinish(rest_out, rest_lse)
    peak, total, acc = combine(peak, total, acc, peak_b, total_b, acc_b)
    out, _ = finish(peak, total, acc)
    p_o = p_out + i_row * s_out_row + (o_h * s_out_head)[:, None] + o_d[None, :]
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_gd)
    if ring >= 0:
        p_q = p_query + i_row * s_query_row + (o_h * s_query_head)[:, None]
        pre = unrotate(p_q, p_cos_sin, m, o_d[None, :], m_gd, ROTARY, NEOX)
        o_entry = (ring * H + o_h) * W + m % W  # [BG]
        o_entry_d = o_entry[:, None] * D + o_d[None, :]
        write_entry(
            p_ring_query, p_ring_out, p_ring_lse, p_ring_chain, o_entry, o_entry_d, pre, near_out, near_lse,
            tl.zeros_like(o_g), m_g, m_gd,
        )  # fmt: skip
