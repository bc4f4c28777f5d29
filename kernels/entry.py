"""Ring entries: the query before RoPE, in the ring's dtype, and the writing of an entry.

Device code. `rope.Rotary.undo` and `ring.narrow` are the oracles of the first two functions.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LARGEST = tl.constexpr(448.0)  # in float8_e4m3fn


@triton.jit
def unrotate(p_query, p_cos_sin, m, o_d, m_d, ROTARY: tl.constexpr, NEOX: tl.constexpr):
    """`[..., BD]` float32: the query before RoPE, from the one after it.

    p_query: pointers to the queries, without the offset of `o_d`. p_cos_sin: `[positions, ROTARY]`,
    `[cos | sin]`, both times a factor that divides out. ROTARY: 0 for no RoPE.
    """
    q = tl.load(p_query + o_d, mask=m_d, other=0.0).to(tl.float32)
    if ROTARY > 0:
        HALF: tl.constexpr = ROTARY // 2
        m_rotary = m_d & (o_d < ROTARY)
        if NEOX:
            o_angle = o_d % HALF
            first = o_d < HALF
            o_pair = tl.where(first, o_d + HALF, o_d - HALF)
        else:
            o_angle = o_d // 2
            first = o_d % 2 == 0
            o_pair = tl.where(first, o_d + 1, o_d - 1)
        pair = tl.load(p_query + o_pair, mask=m_rotary, other=0.0).to(tl.float32)
        p_angle = p_cos_sin + m.to(tl.int64) * ROTARY
        cos = tl.load(p_angle + o_angle, mask=m_rotary, other=1.0).to(tl.float32)
        sin = tl.load(p_angle + HALF + o_angle, mask=m_rotary, other=0.0).to(tl.float32)
        back = q * cos + tl.where(first, pair, -pair) * sin
        unit = tl.math.rsqrt(cos * cos + sin * sin)
        q = tl.where(m_rotary, back * unit * unit, q)
    return q


@triton.jit
def narrow(x, p_ring):
    """`x`, float32, in the dtype of the ring that `p_ring` points to; what float8 does not reach becomes its largest.

    An `x` that is in that dtype stays as it is.
    """
    if p_ring.dtype.element_ty.is_fp8() and not x.dtype.is_fp8():
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        if INTERPRETED:
            # The interpreter loses the carry when it rounds to float8. Adding 1.5 * 2^(e+20) rounds
            # to float8's spacing, which is 2^(e-3) from 2^e on, and 2^-9 below 2^-6. This goes when
            # `test_float8_rings_saturate` passes without it.
            top = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
            shift = top.to(tl.float32, bitcast=True) * 1572864.0
            x = (x + shift) - shift
    return x.to(p_ring.dtype.element_ty)


@triton.jit
def write_entry(
    p_ring_query, p_ring_out, p_ring_lse, p_ring_chain, o_entry, o_entry_d, query, out, lse, chain, m_g, m_gd
):  # fmt: skip
    """Write one entry of each head: `o_entry` `[BG]`, and its elements `o_entry_d` `[BG, BD]`.

    query: `[BG, BD]` before RoPE, float32 or in the ring's dtype. out: `[BG, BD]`. lse: `[BG]` natural log.
    chain: `[BG]` int32.
    """
    tl.store(p_ring_query + o_entry_d, narrow(query, p_ring_query), mask=m_gd)
    tl.store(p_ring_out + o_entry_d, out.to(p_ring_out.dtype.element_ty), mask=m_gd)
    tl.store(p_ring_lse + o_entry, lse, mask=m_g)
    tl.store(p_ring_chain + o_entry, chain, mask=m_g)
