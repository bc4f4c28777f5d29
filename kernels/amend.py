"""Amend: partial attention of the heads of a KV group over a short range of the paged cache.

Device code, called by `group` and, through `complete`, by `prefix`. `paged.attend` is its
oracle. Partial results here are `(peak, total, acc)`: `peak` the largest score times `log2 e`, `total`
and `acc` the sums of `2^(score - peak)`, alone and times the value. `lse = (peak + log2 total) / log2 e`.
"""

import os

import triton
import triton.language as tl

# The interpreter holds bf16 as bare bits, which its matrix product would take for integers.
UPCAST = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    q, peak, total, acc, token, block, m_token, seen, p_kv, s_block, s_token, log2_scale, o_d, m_d,
    D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Fold the tokens `token` `[BN]` into the partial result `(peak [M], total [M], acc [M, DP])`.

    q: `[M, DP]`. block: `[BN]`, the page of each token. m_token: `[BN]`, tokens to read.
    seen: `[M, BN]`, which head sees which token.
    p_kv: the KV head's first page. A page has keys at offset 0 and values at `D` of each token.
    """
    p_key = p_kv + (block.to(tl.int64) * s_block + (token % PAGE) * s_token)[:, None] + o_d[None, :]
    m_kv = m_token[:, None] & m_d[None, :]
    key = tl.load(p_key, mask=m_kv, other=0.0)  # [BN, DP]
    value = tl.load(p_key + D, mask=m_kv, other=0.0)  # [BN, DP]
    rounded = value.dtype
    if UPCAST:
        q, key, value = q.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    score = tl.dot(q, tl.trans(key), input_precision="ieee") * log2_scale
    score = tl.where(seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(score - base[:, None])  # [M, BN]
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
    """`(out [M, DP], lse [M])` of a partial result; `(0, -inf)` of an empty one."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, (peak + tl.log2(safe)) * LN_2, float("-inf"))
    return acc * (1.0 / safe)[:, None], lse


@triton.jit
def unfinish(out, lse):
    """The partial result that `finish` gives `(out, lse)` for."""
    some = lse > float("-inf")
    return lse * LOG2_E, tl.where(some, 1.0, 0.0), tl.where(some[:, None], out.to(tl.float32), 0.0)
