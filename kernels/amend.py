"""Amend: attention of a KV group over the short ranges that its match leaves to read.

Device code of `hit`; partial results as in `partial`. `paged.decode` is the oracle.
"""

import triton
import triton.language as tl

from vllm_mac.kernels.partial import attend, combine


@triton.jit
def attend_band(
    q, i_part, band_start, band, stop, p_row_table, p_head_kv, s_kv_page, s_kv_token, log2_scale, m_q, o_d, m_d,
    D: tl.constexpr, PAGE: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The partial result `(peak [BQ], total [BQ], acc [BQ, BD])` of one program's `CHUNK` tokens of band and sink.

    Band and sink are one list: its token `i` is `band_start + i` while `i < band`, then come the sink's.
    q: `[BQ, BD]`. i_part: which chunk. stop: where in the list it ends.
    """
    peak = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, BD), tl.float32)
    for i in tl.range(i_part * CHUNK, stop, BN, num_stages=STAGES):
        o_i = i + tl.arange(0, BN)
        m_i = o_i < stop
        token = tl.where(o_i < band, band_start + o_i, o_i - band)
        page = tl.load(p_row_table + token // PAGE, mask=m_i, other=0)  # [BN]
        peak, total, acc = attend(
            q, peak, total, acc, token, page, m_i, m_q[:, None] & m_i[None, :], p_head_kv, s_kv_page, s_kv_token,
            log2_scale, o_d, m_d, D, PAGE,
        )  # fmt: skip
    return peak, total, acc


@triton.jit
def add_bands(
    p_band_acc, p_band_sum, i_bk, o_g, o_d, m_g, m_gd,
    G: tl.constexpr, D: tl.constexpr, NB: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The partial result `(peak [BG], total [BG], acc [BG, BD])` of what `attend_band` found in all `NB` programs."""
    rest = tl.full((BG,), float("-inf"), tl.float32)
    rest_total = tl.zeros((BG,), tl.float32)
    rest_acc = tl.zeros((BG, BD), tl.float32)
    for i in tl.static_range(NB):
        o_part = (i_bk * NB + i) * G + o_g
        # .cg: written by other SMs, so not from this one's L1.
        peak = tl.load(p_band_sum + o_part * 2, mask=m_g, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(p_band_sum + o_part * 2 + 1, mask=m_g, other=0.0, cache_modifier=".cg")
        p_acc = p_band_acc + o_part[:, None] * D + o_d[None, :]
        acc = tl.load(p_acc, mask=m_gd, other=0.0, cache_modifier=".cg")
        rest, rest_total, rest_acc = combine(rest, rest_total, rest_acc, peak, total, acc)
    return rest, rest_total, rest_acc


@triton.jit
def amend(
    q, begin, start, stop, columns, column, p_head_kv, s_kv_page, s_kv_token, log2_scale, m_q, o_d, m_d,
    D: tl.constexpr, PAGE: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The partial result `(peak [BG], total [BG], acc [BG, BD])` over the tokens `[start, stop)`.

    q: `[BQ, BD]`. begin: `[BQ]`, the first token that each head attends to.
    columns: `[BP]`, the block table from its column `column` on.
    """
    near = tl.full((BQ,), float("-inf"), tl.float32)
    near_total = tl.zeros((BQ,), tl.float32)
    near_acc = tl.zeros((BQ, BD), tl.float32)
    # From 0: Triton 3.7 to 3.9 can lose the alignment of addresses in a loop that begins at a computed value, and then
    # read KV one element at a time. The subtraction goes with the last of these Tritons.
    for i in tl.range(0, stop - start, BT, num_stages=STAGES):
        token = start + i + tl.arange(0, BT)
        m_i = token < stop
        page = tl.gather(columns, tl.where(m_i, token // PAGE - column, 0), 0)  # [BT]
        m_seen = m_q[:, None] & m_i[None, :] & (token[None, :] >= begin[:, None])
        near, near_total, near_acc = attend(
            q, near, near_total, near_acc, token, page, m_i, m_seen, p_head_kv, s_kv_page, s_kv_token,
            log2_scale, o_d, m_d, D, PAGE,
        )  # fmt: skip
    # From BQ to BG rows; the others are empty.
    near = tl.max(tl.reshape(near, (BQ // BG, BG)), 0)
    near_total = tl.sum(tl.reshape(near_total, (BQ // BG, BG)), 0)
    near_acc = tl.sum(tl.reshape(near_acc, (BQ // BG, BG, BD)), 0)
    return near, near_total, near_acc
