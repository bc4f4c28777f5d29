"""Match: undo the rotary embedding and find the recorded query nearest to a head's own.

Device code, called by `group` and, through `complete`, by `prefix`. `reference.match` and
`paged.match` are its oracles.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LARGEST = tl.constexpr(448.0)  # in float8_e4m3fn
# A candidate is one int64: the bits of its score (never negative, so they order as the score
# does) above `LAST - position`, so that the smallest key is the best score and, among equals,
# the later position.
NO_KEY = tl.constexpr(0x7F800000 << 32)  # the score +inf
LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def unrotate(p_query, p_cos_sin, m, o_d, m_d, ROTARY: tl.constexpr, NEOX: tl.constexpr):
    """`[..., DP]` float32: the query before RoPE, from the one after it.

    p_query: pointers to the queries, without the offset of `o_d`. p_cos_sin: `[positions, ROTARY]`,
    `[cos | sin]`, both times a factor that divides out. ROTARY: 0 for no RoPE.
    """
    q = tl.load(p_query + o_d, mask=m_d, other=0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        m_r = m_d & (o_d < ROTARY)
        if NEOX:
            o_f = o_d % HALF
            first = o_d < HALF
            o_pair = tl.where(first, o_d + HALF, o_d - HALF)
        else:
            o_f = o_d // 2
            first = o_d % 2 == 0
            o_pair = tl.where(first, o_d + 1, o_d - 1)
        pair = tl.load(p_query + o_pair, mask=m_r, other=0.0).to(tl.float32)
        p_row = p_cos_sin + m.to(tl.int64) * ROTARY
        cos = tl.load(p_row + o_f, mask=m_r, other=1.0).to(tl.float32)
        sin = tl.load(p_row + HALF + o_f, mask=m_r, other=0.0).to(tl.float32)
        back = q * cos + tl.where(first, pair, -pair) * sin
        unit = tl.math.rsqrt(cos * cos + sin * sin)
        q = tl.where(m_r, back * unit * unit, q)
    return q


@triton.jit
def narrow(x, p):
    """`x`, float32, as the elements that `p` points to; what float8 does not reach becomes its largest."""
    if p.dtype.element_ty.is_fp8():
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        if INTERPRETED:
            # The interpreter loses the carry when it rounds to float8. Adding 1.5 * 2^(e+20) rounds
            # to float8's spacing, which is 2^(e-3) from 2^e on, and 2^-9 below 2^-6.
            top = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
            shift = top.to(tl.float32, bitcast=True) * 1572864.0
            x = (x + shift) - shift
    return x.to(p.dtype.element_ty)


@triton.jit
def _square(pre, p_x, m_row, o_d, D: tl.constexpr):
    """`(pre - x)^2` `[BW, DC]` over the dimensions `o_d` `[DC]` of the rows `p_x` `[BW]`."""
    x = tl.load(p_x[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    delta = pre[None, :] - x.to(tl.float32)
    return delta * delta


@triton.jit
def _keep(
    best,
    best_back,
    best_lse,
    distance,
    back,
    lse,
    usable,
    bound,
    strict,
    lag_weight,
    W: tl.constexpr,
    LAGGED: tl.constexpr,
):
    """The better of each lane's and a new candidate; of equals the former, a later position."""
    score = distance
    if LAGGED:
        age = tl.where(distance < strict * bound, (back + 1).to(tl.float32), W * 1.0)
        score += tl.div_rn(lag_weight * age, W * 1.0) * bound
    better = usable & (distance < bound) & (score < best)
    return tl.where(better, score, best), tl.where(better, back, best_back), tl.where(better, lse, best_lse)


@triton.jit
def scan(
    p_query, p_cos_sin, p_entry, p_chain, p_lse, m, first, begin, end, bound, strict, lag_weight,
    D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
    W: tl.constexpr, BAND: tl.constexpr, SINK: tl.constexpr, MAX_CHAIN: tl.constexpr,
    LAGGED: tl.constexpr, RELATIVE: tl.constexpr, SHARE: tl.constexpr,
    BW: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Key of the best candidate of one head among the positions `m-1-lag`, `lag` in `[begin, end)`, and the
    LSE of its summary, of no meaning without one.

    p_query: the head's query after RoPE. p_entry: its ring's `[W, D]` queries. p_chain, p_lse: `[W]`.
    strict: the part of the bound from which on a candidate counts as `W` old.
    RELATIVE: whether `bound` is in units of the query's squared norm. SHARE: whether the key's score is
    to be in units of the bound. SPAN: the most lags there
    are. LAGGED: whether `lag_weight` is not 0. HALVES: whether to read an entry's second half only
    where the first leaves it a chance: a distance only grows with the dimensions, so the result is
    the same.
    """
    # An entry is read in up to four pieces: the fewer threads share a row, the fewer shuffles
    # does its sum take, and those, not memory, would bound the scan.
    C: tl.constexpr = 4 if DP >= 128 else DP // 32
    DC: tl.constexpr = DP // C
    o_d = tl.arange(0, DC)
    q_0 = unrotate(p_query, p_cos_sin, m, o_d, o_d < D, ROTARY, NEOX)  # [DC]
    if C > 1:
        q_1 = unrotate(p_query, p_cos_sin, m, DC + o_d, DC + o_d < D, ROTARY, NEOX)
    if C > 2:
        q_2 = unrotate(p_query, p_cos_sin, m, 2 * DC + o_d, 2 * DC + o_d < D, ROTARY, NEOX)
        q_3 = unrotate(p_query, p_cos_sin, m, 3 * DC + o_d, 3 * DC + o_d < D, ROTARY, NEOX)
    if RELATIVE:
        norm = q_0 * q_0
        if C > 1:
            norm += q_1 * q_1
        if C > 2:
            norm += q_2 * q_2 + q_3 * q_3
        bound *= tl.sum(norm, 0)
    # p >= first, p >= 0 and p+1-BAND > SINK, for p = m-1-back
    end = tl.minimum(end, m - tl.maximum(first, BAND + SINK))
    best = tl.full((BW,), float("inf"), tl.float32)
    best_back = tl.zeros((BW,), tl.int32)
    best_lse = tl.zeros((BW,), tl.float32)
    cutoff = bound
    for i in tl.range(0, SPAN, BW, num_stages=STAGES):
        back = begin + i + tl.arange(0, BW)
        slot = (m - 1 - back + W) % W
        usable = back < end
        if MAX_CHAIN > 0:
            usable = usable & (tl.load(p_chain + slot, mask=usable, other=0) < MAX_CHAIN)
        p_x = p_entry + slot * D
        square = _square(q_0, p_x, usable, o_d, D)  # [BW, DC]
        if HALVES:
            if C > 2:
                square += _square(q_1, p_x, usable, DC + o_d, D)
            distance = tl.sum(square, 1)
            usable = usable & (distance < cutoff)
            if tl.max(usable.to(tl.int32), 0) > 0:
                if C > 2:
                    square = _square(q_2, p_x, usable, 2 * DC + o_d, D)
                    square += _square(q_3, p_x, usable, 3 * DC + o_d, D)
                else:
                    square = _square(q_1, p_x, usable, DC + o_d, D)
                distance += tl.sum(square, 1)
                lse = tl.load(p_lse + slot, mask=usable, other=0.0)
                best, best_back, best_lse = _keep(
                    best, best_back, best_lse, distance, back, lse, usable, bound, strict, lag_weight, W, LAGGED
                )
                cutoff = tl.minimum(bound, tl.min(best, 0))  # a score is no less than its distance
        else:
            if C > 1:
                square += _square(q_1, p_x, usable, DC + o_d, D)
            if C > 2:
                square += _square(q_2, p_x, usable, 2 * DC + o_d, D)
                square += _square(q_3, p_x, usable, 3 * DC + o_d, D)
            distance = tl.sum(square, 1)
            lse = tl.load(p_lse + slot, mask=usable, other=0.0)
            best, best_back, best_lse = _keep(
                best, best_back, best_lse, distance, back, lse, usable, bound, strict, lag_weight, W, LAGGED
            )
    if SHARE:
        best = tl.where(best < float("inf"), best / bound, best)
    order = best_back - (m - 1) + LAST  # LAST - position
    key = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | order.to(tl.int64)
    key = tl.where(best < float("inf"), key, NO_KEY)
    least = tl.min(key, 0)
    return least, tl.max(tl.where(key == least, best_lse, float("-inf")), 0)
