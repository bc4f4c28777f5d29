"""Complete: merge partial results, write the output and record the summary in the ring.

The kernel of `hit` completes the groups that hit. Those that missed are completed by `complete_group`,
which the engine for misses of `exact` calls where it has their prefix, and the kernel here calls for an
engine that only leaves it in memory. `reference.merge` and the end of `paged.decode` are the oracles.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.amend import LN_2, combine, finish, unfinish
from vllm_mac.kernels.match import narrow, unrotate


@triton.jit
def complete_group(
    peak, total, acc, held, p_part_out, p_part_lse,
    p_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    i_row, i_k, m, ring, s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
):  # fmt: skip
    """Finish a group that missed, whose prefix is the partial result `(peak, total, acc)` (see `amend`).

    held: whether `hit` left anything else of it.
    """
    m_g, m_d = o_g < G, o_d < D
    m_gd = m_g[:, None] & m_d[None, :]
    o_h = i_k * G + o_g
    m_p = o_g < tl.where(held, G, 0)
    m_pd = m_p[:, None] & m_d[None, :]
    o_part = (i_row * H + o_h) * 2
    near_lse = tl.load(p_part_lse + o_part, mask=m_p, other=float("-inf"))
    rest_lse = tl.load(p_part_lse + o_part + 1, mask=m_p, other=float("-inf"))
    near_out = tl.load(p_part_out + o_part[:, None] * D + o_d[None, :], mask=m_pd, other=0.0)
    rest_out = tl.load(p_part_out + (o_part[:, None] + 1) * D + o_d[None, :], mask=m_pd, other=0.0)
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
        o_entry = (ring * H + o_h) * W + m % W
        o_entry_d = o_entry[:, None] * D + o_d[None, :]
        tl.store(p_ring_query + o_entry_d, narrow(pre, p_ring_query), mask=m_gd)
        tl.store(p_ring_out + o_entry_d, near_out.to(p_ring_out.dtype.element_ty), mask=m_gd)
        tl.store(p_ring_lse + o_entry, near_lse, mask=m_g)
        tl.store(p_ring_chain + o_entry, tl.zeros_like(o_g), mask=m_g)


@triton.jit
def _complete_kernel(
    p_query, p_cos_sin, p_position, p_ring, p_hit, p_prefix_out, p_prefix_lse,
    p_part_out, p_part_lse, p_out,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    s_query_row, s_query_head, s_out_row, s_out_head,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
    M: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_k, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.load(p_position + i_row).to(tl.int32)
    if m < 0:
        return
    if tl.load(p_hit + i_row * K + i_k) != 0:
        return
    H: tl.constexpr = K * G
    ring = tl.load(p_ring + i_row).to(tl.int64)
    o_g, o_d = tl.arange(0, M), tl.arange(0, DP)
    m_g = o_g < G
    m_gd = m_g[:, None] & (o_d < D)[None, :]
    o_head = i_row * H + i_k * G + o_g  # [M]
    lse = tl.load(p_prefix_lse + o_head, mask=m_g, other=float("-inf")) * LN_2
    far = tl.load(p_prefix_out + o_head[:, None] * D + o_d[None, :], mask=m_gd, other=0.0)
    peak, total, acc = unfinish(far, lse)
    complete_group(
        peak, total, acc, True, p_part_out, p_part_lse,
        p_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
        i_row, i_k, m, ring, s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d,
        H, G, D, W, ROTARY, NEOX,
    )  # fmt: skip


def complete_misses(
    query,
    position,
    ring,
    store,
    prefix_out,
    prefix_lse,
    work,
    out,
    cos_sin=None,
    is_neox=True,
):
    """Finish the KV groups that `decode_hits` left open; to be called after it, in the same step.

    For an engine for misses that does not do so itself (`exact.TritonExact` does).

    `S = (rest of the prefix) (+) prefix`, `out = S (+) band (+) sink`, where all but `prefix` was
    left in `work`. Writes `S` into the row's ring where it has one. Groups that hit and padded
    rows (position -1) are left alone.

    Args:
        query: `[B, H, D]` bf16, fp16 or fp32, after RoPE; last dimension contiguous.
        position, ring: `[B]` int32 or int64, as for `decode_hits`.
        store: the layer's rings (`ring.RingStore`).
        prefix_out: `[B, H, D]` contiguous, any float dtype: attention over `[lo, m+1-band)`,
            where `lo` is `sink` rounded up to a whole page.
        prefix_lse: `[B, H]` float32 contiguous, **base 2**, as FlashInfer gives it; `-inf` where the
            interval is empty (`prefix_out` is then ignored).
        work: the `Workspace` that `decode_hits` used, with `whole` false.
        out: `[B, H, D]` in query's dtype, last dimension contiguous; written for missed groups.
        cos_sin, is_neox: as for `decode_hits`.
    """
    rows, heads, d = query.shape
    kv_heads = work.hit.shape[1]
    group = heads // kv_heads
    _complete_kernel[(kv_heads, rows)](
        query, cos_sin, position, ring, work.hit, prefix_out, prefix_lse,
        work.part_out, work.part_lse, out,
        store.query, store.out, store.lse, store.chain,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        K=kv_heads, G=group, D=d, W=store.query.shape[2],
        ROTARY=0 if cos_sin is None else cos_sin.shape[-1], NEOX=is_neox,
        M=triton.next_power_of_2(group), DP=triton.next_power_of_2(d), PDL=work.pdl,
        num_warps=2, **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
