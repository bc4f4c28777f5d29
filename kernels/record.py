"""Record: seed the rings of prefill rows from what FlashInfer computed for them.

The summaries of the last `window` tokens of a chunk are causal attention over a cache that ends
`band` tokens earlier: one more FlashInfer call. It can begin only at a whole page, so this
kernel adds the tokens between the sink and that page, undoes the rotary embedding and writes
the entries. The recording of `paged.prefill` is the oracle.
"""

import triton
import triton.language as tl
from torch import Tensor

from vllm_mac.kernels.entry import INTERPRETED, unrotate, write_entry
from vllm_mac.kernels.partial import LN_2, LOG2_E
from vllm_mac.state import LayerState, Seeds


@triton.jit(
    # These change with the number of tokens: none of them may compile the kernel anew.
    do_not_specialize=("s_table_row",),
    do_not_specialize_on_alignment=("p_token", "p_row", "p_position"),
)  # fmt: skip
def _record_kernel(
    p_query, p_cos_sin, p_token, p_row, p_position, p_ring, p_table, p_kv, p_prefix_out, p_prefix_lse2,
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain,
    s_query_token, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, log2_scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, SINK: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_t, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_row = tl.load(p_row + i_t).to(tl.int64)
    if i_row < 0:
        return
    ring = tl.load(p_ring + i_row).to(tl.int64)
    if ring < 0:
        return
    H: tl.constexpr = K * G
    WHOLE_PAGE: tl.constexpr = (SINK + PAGE - 1) // PAGE * PAGE
    m = tl.load(p_position + i_t).to(tl.int32)
    stop = m + 1 - BAND
    o_q, o_d = tl.arange(0, BQ), tl.arange(0, BD)
    m_q, m_d = o_q < G, o_d < D
    m_qd = m_q[:, None] & m_d[None, :]
    o_h = i_k * G + o_q
    o_head = i_t * H + o_h  # [BQ]
    p_q = p_query + tl.load(p_token + i_t).to(tl.int64) * s_query_token
    p_q = p_q + (o_h * s_query_head)[:, None]  # [BQ, 1]

    # The partial result (peak, total, acc) as in `partial`, of what FlashInfer computed.
    m_far = o_q < tl.where(stop > WHOLE_PAGE, G, 0)
    peak = tl.load(p_prefix_lse2 + o_head, mask=m_far, other=float("-inf"))
    some = peak != float("-inf")
    total = tl.where(some, 1.0, 0.0)
    p_far = p_prefix_out + o_head[:, None] * D + o_d[None, :]
    acc = tl.load(p_far, mask=(m_far & some)[:, None] & m_d[None, :], other=0.0).to(tl.float32)

    if WHOLE_PAGE > SINK:
        # All of these tokens are in one page.
        near = tl.minimum(stop, WHOLE_PAGE)
        page = tl.load(p_table + i_row * s_table_row + SINK // PAGE, mask=near > SINK, other=0)
        p_page = p_kv + page.to(tl.int64) * s_kv_page + i_k.to(tl.int64) * s_kv_head
        q = tl.load(p_q + o_d[None, :], mask=m_qd, other=0.0)  # [BQ, BD]
        if INTERPRETED:
            q = q.to(tl.float32)
        for i in range(SINK, near, BN):
            token = i + tl.arange(0, BN)
            m_n = token < near
            m_nd = m_n[:, None] & m_d[None, :]
            p_key = p_page + ((token % PAGE) * s_kv_token)[:, None] + o_d[None, :]
            key = tl.load(p_key, mask=m_nd, other=0.0)  # [BN, BD]
            value = tl.load(p_key + D, mask=m_nd, other=0.0)  # [BN, BD]
            # Weights would lose bits in a narrower type. Three TF32 products are as accurate as a float32 product, and run on
            # tensor cores, where the float32 product would spill.
            EXACT: tl.constexpr = "ieee" if value.dtype == tl.float32 else "tf32x3"
            value = value.to(tl.float32)
            if INTERPRETED:
                key = key.to(tl.float32)
            score = tl.dot(q, tl.trans(key), input_precision="ieee") * log2_scale  # [BQ, BN]
            score = tl.where(m_n[None, :], score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight, value, acc * shrink[:, None], input_precision=EXACT)
            peak = new_peak

    some = total > 0
    safe = tl.where(some, total, 1.0)
    out = acc / safe[:, None]
    lse = tl.where(some, (peak + tl.log2(safe)) * LN_2, float("-inf"))
    pre = unrotate(p_q, p_cos_sin, m, o_d[None, :], m_qd, ROTARY, NEOX)
    o_entry = (ring * H + o_h) * W + m % W  # [BQ]
    o_entry_d = o_entry[:, None] * D + o_d[None, :]
    none = tl.zeros((BQ,), tl.int32)  # reuse on reuse
    write_entry(
        p_ring_query, p_ring_out, p_ring_lse, p_ring_chain, o_entry, o_entry_d, pre, out, lse, none, m_q, m_qd
    )  # fmt: skip


def record_prefill(
    layer: LayerState, seeds: Seeds, query: Tensor, kv: Tensor, prefix_out: Tensor, prefix_lse: Tensor, scale: float
) -> None:
    """Write the ring entries of `T` tokens of rows that are prefilled. One launch.

    `S_p = A(q_p, [sink, lo)) (+) prefix`, both cut at `p+1-band`, where `lo` is `sink` rounded up
    to a whole page.

    Args:
        layer: store, rotary, and band and sink of config are used. The store is written at slot `p % window`.
        seeds: the tokens to record, `T` of them.
        query: `[N, H, D]` bf16, fp16 or fp32, after RoPE, of all tokens of the batch; last dimension contiguous.
        kv: `[blocks, K, PAGE, 2 D]`, any strides but 1 in the last dimension.
        prefix_out: `[T, H, D]` contiguous, any float dtype: attention over `[lo, p+1-band)`.
        prefix_lse: `[T, H]` float32 contiguous, **base 2**. Neither is read where `p+1-band <= lo`;
            where the LSE is `-inf`, the output is not.
        scale: factor of the scores.
    """
    tokens, heads, d = prefix_out.shape
    if tokens == 0:
        return
    kv_heads, page = kv.shape[1], kv.shape[2]
    group = heads // kv_heads
    store, config, cos_sin = layer.store, layer.config, layer.rotary.cos_sin
    # `tl.dot` takes 16 rows or more; those past the group's heads are masked.
    m, dp = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(d))
    _record_kernel[(tokens, kv_heads)](
        query, cos_sin, seeds.token, seeds.row, seeds.position, seeds.ring, seeds.block_table, kv, prefix_out, prefix_lse,
        store.query, store.out, store.lse, store.chain,
        query.stride(0), query.stride(1), seeds.block_table.stride(0),
        kv.stride(0), kv.stride(1), kv.stride(2), scale * LOG2_E.value,
        K=kv_heads, G=group, D=d, W=store.window, PAGE=page,
        BAND=config.band, SINK=config.sink,
        ROTARY=0 if cos_sin is None else cos_sin.shape[-1], NEOX=layer.rotary.is_neox,
        BQ=m, BD=dp, BN=16, num_warps=4 if m * dp <= 2048 else 8,
    )  # fmt: skip
