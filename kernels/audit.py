"""Audit: how far the heads that hit are from exact attention, into a layer's histograms.

`vllm_mac.audit.tally` is the oracle.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.workspace import Workspace
from vllm_mac.state import LayerState, Rows


@triton.jit
def _tally_kernel(
    p_position, p_ring, p_hit, p_source, p_chain, p_out, p_exact, p_edges, p_counts,
    s_out_row, s_out_head,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_k, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.load(p_position + i_row).to(tl.int32)
    if m < 0:
        return
    if tl.load(p_hit + i_row * K + i_k) == 0:
        return
    H: tl.constexpr = K * G
    o_g, o_d, o_e = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BE)
    m_g, m_e = o_g < G, o_e < E
    m_gd = m_g[:, None] & (o_d < D)[None, :]
    o_h = i_k * G + o_g
    p_o = p_out + i_row * s_out_row + (o_h * s_out_head)[:, None] + o_d[None, :]
    out = tl.load(p_o, mask=m_gd, other=0.0).to(tl.float32)  # [BG, BD]
    p_true = p_exact + ((i_row * H + o_h) * D)[:, None] + o_d[None, :]
    true = tl.load(p_true, mask=m_gd, other=0.0).to(tl.float32)  # [BG, BD]
    off = tl.sum((out - true) * (out - true), 1)
    error = tl.where(off == 0, 0.0, tl.sqrt(off / tl.sum(true * true, 1)))  # [BG]
    lag = (m - tl.load(p_source + i_row * H + o_h, mask=m_g, other=0)).to(tl.float32)
    # The entry written by this step, which is one longer than the one reused.
    o_entry = (tl.load(p_ring + i_row).to(tl.int64) * H + o_h) * W + m % W
    length = tl.load(p_chain + o_entry, mask=m_g, other=0).to(tl.float32)

    edge = tl.load(p_edges + o_e, mask=m_e, other=0.0)[None, :]  # [1, BE]
    # Not "above the edge", so that NaN is in the last bucket.
    bucket = tl.sum((m_e[None, :] & ~(error[:, None] <= edge)).to(tl.int32), 1)  # [BG]
    one = tl.full((BG,), 1, tl.int64)
    tl.atomic_add(p_counts + o_h * (E + 1) + bucket, one, mask=m_g, sem="relaxed")
    edge = tl.load(p_edges + E + o_e, mask=m_e, other=0.0)[None, :]
    bucket = tl.sum((m_e[None, :] & (lag[:, None] > edge)).to(tl.int32), 1)
    tl.atomic_add(p_counts + H * (E + 1) + bucket, one, mask=m_g, sem="relaxed")
    bucket = tl.sum((m_e[None, :] & (length[:, None] > edge)).to(tl.int32), 1)
    tl.atomic_add(p_counts + (H + 1) * (E + 1) + bucket, one, mask=m_g, sem="relaxed")


def tally(layer: LayerState, rows: Rows, work: Workspace, out: Tensor, exact: Tensor, edges: Tensor) -> None:
    """Add the heads of one audited step to a layer's histograms, after the step was recorded.

    Args:
        layer: the rings' chains are read, `audited` is added to.
        rows: position and ring are read, int32 or int64; position -1: the row is padding or not audited.
        work: as the step left it: hit and source are read. Only groups that hit count.
        out: `[B, H, D]`, any float dtype, last dimension contiguous: what was delivered.
        exact: `[B, H, D]`, any float dtype, contiguous: exact attention of the groups that hit.
        edges: `[2, E]` float32, as `audit.edges` makes them.
    """
    count, heads, d = out.shape
    kv_heads, buckets = work.hit.shape[1], edges.shape[1]
    group = heads // kv_heads
    _tally_kernel[(kv_heads, count)](
        rows.position, rows.ring, work.hit, work.source, layer.store.chain, out, exact, edges, layer.audited,
        out.stride(0), out.stride(1),
        K=kv_heads, G=group, D=d, W=layer.store.window, E=buckets,
        BG=triton.next_power_of_2(group), BD=triton.next_power_of_2(d),
        BE=triton.next_power_of_2(buckets), PDL=work.pdl, num_warps=2,
        **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
