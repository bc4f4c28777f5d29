"""Match: find the recorded query nearest to a head's own, and decide whether the head may use its entry.

Device code of `hit`. `reference.match` and `paged.match` are the oracles.

A candidate is one int64, its key: the bits of its score (never negative, so they order as the score does) above
`LAST - position`. So the smallest key has the best score and, among equal scores, the later position.
"""

import triton
import triton.language as tl

from vllm_mac.kernels.entry import unrotate
from vllm_mac.kernels.partial import LOG2_E

NO_KEY = tl.constexpr(0x7F800000 << 32)  # the score +inf
LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _square(pre, p_x, m_entry, o_d, D: tl.constexpr):
    """`(pre - x)^2` `[BW, BC]` over the dimensions `o_d` `[BC]` of the entries `p_x` `[BW]`."""
    x = tl.load(p_x[:, None] + o_d[None, :], mask=m_entry[:, None] & (o_d < D)[None, :], other=0.0)
    delta = pre[None, :] - x.to(tl.float32)
    return delta * delta


@triton.jit
def _keep(
    best, best_back, best_lse, distance, back, lse, m_usable, bound, strict, lag_weight,
    W: tl.constexpr, LAGGED: tl.constexpr,
):  # fmt: skip
    """The better of each lane's and a new candidate; of equals the former, a later position."""
    score = distance
    if LAGGED:
        lag = tl.where(distance < strict * bound, (back + 1).to(tl.float32), W * 1.0)
        score += tl.div_rn(lag_weight * lag, W * 1.0) * bound
    better = m_usable & (distance < bound) & (score < best)
    return tl.where(better, score, best), tl.where(better, back, best_back), tl.where(better, lse, best_lse)


@triton.jit
def scan(
    p_query, p_cos_sin, p_entry, p_chain, p_lse, m, first, begin, end, bound, strict, lag_weight,
    D: tl.constexpr, BD: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
    W: tl.constexpr, BAND: tl.constexpr, SINK: tl.constexpr, MAX_CHAIN: tl.constexpr,
    LAGGED: tl.constexpr, RELATIVE: tl.constexpr, WEIGHED: tl.constexpr,
    BW: tl.constexpr, SPAN: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`(key, lse)` of the best candidate of one head among the positions `m-1-back`, `back` in `[begin, end)`.

    Where there is none the key is `NO_KEY`, and the LSE has no meaning. Natural-log LSE.

    p_query: the head's query after RoPE. p_entry: its ring's `[W, D]` queries. p_chain, p_lse: `[W]`.
    bound: what a squared distance must be below; with RELATIVE in units of the query's squared norm.
    strict: the part of the bound from which on a candidate counts as `W` old.
    WEIGHED: whether the key's score is to be in units of the bound. LAGGED: whether `lag_weight` is not 0.
    SPAN: the most positions that any program scans. HALVES: whether to read an entry's second half only where
    the first leaves it a chance: a distance only grows with the dimensions, so the result is the same.
    """
    # An entry is read in up to four parts. The fewer threads share an entry, the fewer shuffles
    # its sum takes, and those, not memory, would bound the scan.
    PARTS: tl.constexpr = 4 if BD >= 128 else BD // 32
    BC: tl.constexpr = BD // PARTS
    o_d = tl.arange(0, BC)
    q_0 = unrotate(p_query, p_cos_sin, m, o_d, o_d < D, ROTARY, NEOX)  # [BC]
    if PARTS > 1:
        q_1 = unrotate(p_query, p_cos_sin, m, BC + o_d, BC + o_d < D, ROTARY, NEOX)
    if PARTS > 2:
        q_2 = unrotate(p_query, p_cos_sin, m, 2 * BC + o_d, 2 * BC + o_d < D, ROTARY, NEOX)
        q_3 = unrotate(p_query, p_cos_sin, m, 3 * BC + o_d, 3 * BC + o_d < D, ROTARY, NEOX)
    if RELATIVE:
        norm = q_0 * q_0
        if PARTS > 1:
            norm += q_1 * q_1
        if PARTS > 2:
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
        o_slot = (m - 1 - back + W) % W
        m_usable = back < end
        if MAX_CHAIN > 0:
            m_usable = m_usable & (tl.load(p_chain + o_slot, mask=m_usable, other=0) < MAX_CHAIN)
        p_x = p_entry + o_slot * D
        square = _square(q_0, p_x, m_usable, o_d, D)  # [BW, BC]
        if HALVES:
            if PARTS > 2:
                square += _square(q_1, p_x, m_usable, BC + o_d, D)
            distance = tl.sum(square, 1)
            m_usable = m_usable & (distance < cutoff)
            if tl.max(m_usable.to(tl.int32), 0) > 0:
                if PARTS > 2:
                    square = _square(q_2, p_x, m_usable, 2 * BC + o_d, D)
                    square += _square(q_3, p_x, m_usable, 3 * BC + o_d, D)
                else:
                    square = _square(q_1, p_x, m_usable, BC + o_d, D)
                distance += tl.sum(square, 1)
                lse = tl.load(p_lse + o_slot, mask=m_usable, other=0.0)
                best, best_back, best_lse = _keep(
                    best, best_back, best_lse, distance, back, lse, m_usable, bound, strict, lag_weight, W, LAGGED
                )
                cutoff = tl.minimum(bound, tl.min(best, 0))  # a score is no less than its distance
        else:
            if PARTS > 1:
                square += _square(q_1, p_x, m_usable, BC + o_d, D)
            if PARTS > 2:
                square += _square(q_2, p_x, m_usable, 2 * BC + o_d, D)
                square += _square(q_3, p_x, m_usable, 3 * BC + o_d, D)
            distance = tl.sum(square, 1)
            lse = tl.load(p_lse + o_slot, mask=m_usable, other=0.0)
            best, best_back, best_lse = _keep(
                best, best_back, best_lse, distance, back, lse, m_usable, bound, strict, lag_weight, W, LAGGED
            )
    if WEIGHED:
        best = tl.where(best < float("inf"), best / bound, best)
    order = best_back - (m - 1) + LAST  # LAST - position
    key = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | order.to(tl.int64)
    key = tl.where(best < float("inf"), key, NO_KEY)
    least = tl.min(key, 0)
    return least, tl.max(tl.where(key == least, best_lse, float("-inf")), 0)


@triton.jit
def choose(
    p_key, p_key_lse, i_row, o_h, o_g, matching, rest, rest_total, lag_weight, mass_floor,
    H: tl.constexpr, G: tl.constexpr, NS: tl.constexpr, BNS: tl.constexpr, LAGGED: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """`(source [BG], lse [BG])`: the position that each head matches, or -1, and the natural-log LSE of its summary.

    Of what `NS` programs found for each head the best, unless it is too far off for its part of the mass.

    rest, rest_total: of the partial result over band and sink, which say how much mass the summary's is part of.
    """
    o_s = tl.arange(0, BNS)
    o_key = ((i_row * H + o_h) * NS)[:, None] + o_s[None, :]
    m_key = (o_g < tl.where(matching, G, 0))[:, None] & (o_s < NS)[None, :]
    # .cg: written by other SMs, so not from this one's L1.
    keys = tl.load(p_key + o_key, mask=m_key, other=NO_KEY, cache_modifier=".cg")  # [BG, BNS]
    lses = tl.load(p_key_lse + o_key, mask=m_key, other=float("-inf"), cache_modifier=".cg")  # [BG, BNS]
    key = tl.min(keys, 1)
    lse = tl.max(tl.where((keys == key[:, None]) & (keys < NO_KEY), lses, float("-inf")), 1)
    source = tl.where(key < NO_KEY, -(key & LAST).to(tl.int32) + LAST, -1)
    if WEIGHED:
        # `scan` accepted every distance that is allowed to a summary without mass; the score is in units of that.
        part = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if LAGGED:  # too much below the strict limit, where a candidate is accepted in any case
            part -= lag_weight
        mass = 1.0 / (1.0 + tl.exp2(rest + tl.log2(rest_total) - lse * LOG2_E))
        allowed = mass_floor / (mass + mass_floor)
        source = tl.where(part < allowed * allowed, source, -1)
    return source, lse
