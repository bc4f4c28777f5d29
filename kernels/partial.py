"""Partial attention results: fold a block of tokens in, combine two, normalise.

Device code. `paged.attend` is the oracle. A partial result of the heads `[BG]` of a KV group is `(peak, total, acc)`:

    peak   [BG]       the largest of the scores, each times `log2 e`; `-inf` where no token was read
    total  [BG]       the sum of `2^(score - peak)`
    acc    [BG, BD]   the sum of `2^(score - peak)` times the value

Its natural-log LSE is `(peak + log2 total) / log2 e`, its output `acc / total`.
"""

import triton
import triton.language as tl

from vllm_mac.kernels.entry import INTERPRETED

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    q, peak, total, acc, token, page, m_token, m_seen, p_head_kv, s_kv_page, s_kv_token, log2_scale, o_d, m_d,
    D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Fold the tokens `token` `[BN]` into the partial result `(peak [BQ], total [BQ], acc [BQ, BD])`.

    q: `[BQ, BD]`. page: `[BN]`, the page of each token in the cache. m_token: `[BN]`, tokens to read.
    m_seen: `[BQ, BN]`, which head attends to which token.
    p_head_kv: the KV head's first page. A page has the key of each token at offset 0 and the value at `D`.
    """
    p_key = p_head_kv + (page.to(tl.int64) * s_kv_page + (token % PAGE) * s_kv_token)[:, None] + o_d[None, :]
    m_kv = m_token[:, None] & m_d[None, :]
    key = tl.load(p_key, mask=m_kv, other=0.0)  # [BN, BD]
    value = tl.load(p_key + D, mask=m_kv, other=0.0)  # [BN, BD]
    rounded = value.dtype
    if INTERPRETED:
        # The interpreter holds bf16 as bare bits, which its matrix product would take for integers. This goes when its
        # `tl.dot` multiplies bf16.
        q, key, value = q.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    score = tl.dot(q, tl.trans(key), input_precision="ieee") * log2_scale  # [BQ, BN]
    score = tl.where(m_seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(score - base[:, None])  # [BQ, BN]
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None] + tl.dot(weight.to(rounded).to(value.dtype), value, input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def combine(peak_a, total_a, acc_a, peak_b, total_b, acc_b):
    """The partial result over two disjoint sets of tokens. Either may be empty: `(-inf, 0, 0)`."""
    peak = tl.maximum(peak_a, peak_b)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    a = tl.exp2(peak_a - base)
    b = tl.exp2(peak_b - base)
    return peak, total_a * a + total_b * b, acc_a * a[:, None] + acc_b * b[:, None]


@triton.jit
def finish(peak, total, acc):
    """`(out [BG, BD], lse [BG])` of a partial result, with natural-log LSE; `(0, -inf)` of an empty one."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, (peak + tl.log2(safe)) * LN_2, float("-inf"))
    return acc * (1.0 / safe)[:, None], lse


@triton.jit
def unfinish(out, lse):
    """The partial result for which `finish` gives `(out, lse)`."""
    some = lse > float("-inf")
    return lse * LOG2_E, tl.where(some, 1.0, 0.0), tl.where(some[:, None], out.to(tl.float32), 0.0)
