"""Complete the groups that missed, after a miss engine that only leaves their prefixes in memory.

`merge.complete_miss`, for a miss engine that does not call it itself as `exact` does. The end of `paged.decode` is the
oracle.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.merge import complete_miss
from vllm_mac.kernels.partial import LN_2, unfinish
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.state import LayerState, Rows


@triton.jit
def _complete_kernel(
    p_query, p_cos_sin, p_position, p_ring, p_hit, p_prefix_out, p_prefix_lse2,
    p_part_out, p_part_lse, p_out,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    s_query_row, s_query_head, s_out_row, s_out_head,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
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
    o_g, o_d = tl.arange(0, BG), tl.arange(0, BD)
    m_g = o_g < G
    m_gd = m_g[:, None] & (o_d < D)[None, :]
    o_head = i_row * H + i_k * G + o_g  # [BG]
    lse = tl.load(p_prefix_lse2 + o_head, mask=m_g, other=float("-inf")) * LN_2
    out = tl.load(p_prefix_out + o_head[:, None] * D + o_d[None, :], mask=m_gd, other=0.0)  # [BG, BD]
    peak, total, acc = unfinish(out, lse)
    complete_miss(
        peak, total, acc, True, p_part_out, p_part_lse,
        p_query, p_cos_sin, p_out, p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
        i_row, i_k, m, ring, s_query_row, s_query_head, s_out_row, s_out_head, o_g, o_d,
        H, G, D, W, ROTARY, NEOX,
    )  # fmt: skip


def complete_misses(
    layer: LayerState, rows: Rows, query: Tensor, prefix_out: Tensor, prefix_lse: Tensor, work: Workspace, out: Tensor
) -> None:
    """Finish the KV groups that `decode_hits` left open; to be called after it, in the same step.

    For a miss engine that only computes the prefix, as FlashInfer's does.

    `S = (rest of the prefix) (+) prefix`, `out = S (+) band (+) sink`, where all but `prefix` was
    left in `work`. Writes `S` into the row's ring where it has one. Groups that hit and padded
    rows (position -1) are left alone.

    Args:
        layer: store and rotary are used.
        rows: position and ring are read, int32 or int64.
        query: `[B, H, D]` bf16, fp16 or fp32, after RoPE; last dimension contiguous.
        prefix_out: `[B, H, D]` contiguous, any float dtype: attention over `[lo, m+1-band)`,
            where `lo` is `sink` rounded up to a whole page.
        prefix_lse: `[B, H]` float32 contiguous, **base 2**, as FlashInfer gives it; `-inf` where the
            interval is empty (`prefix_out` is then ignored).
        work: the `Workspace` that `decode_hits` used, with `whole` false.
        out: `[B, H, D]` in query's dtype, last dimension contiguous; written for missed groups.
    """
    count, heads, d = query.shape
    kv_heads = work.hit.shape[1]
    group = heads // kv_heads
    store, cos_sin = layer.store, layer.rotary.cos_sin
    _complete_kernel[(kv_heads, count)](
        query, cos_sin, rows.position, rows.ring, work.hit, prefix_out, prefix_lse,
        work.part_out, work.part_lse, out,
        store.query, store.out, store.lse, store.chain,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        K=kv_heads, G=group, D=d, W=store.window,
        ROTARY=0 if cos_sin is None else cos_sin.shape[-1], NEOX=layer.rotary.is_neox,
        BG=triton.next_power_of_2(group), BD=triton.next_power_of_2(d), PDL=work.pdl,
        num_warps=2, **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
