"""Merge what the programs of `lookup.look_kernel` found, and count it. `lookup.decode` is the oracle.

Device code that the kernels of `lookup` share is here too: what a row's tokens are. A row decodes up to `T` tokens, each of
which takes a group's heads: query `c` of a program is head `c % G` of token `c // G`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vllm_mac import counters
from vllm_mac.counters import Count
from vllm_mac.lookup import TILE as TILE_TOKENS

OPTED_OUT, PREFILLED = tl.constexpr(counters.OPTED_OUT), tl.constexpr(counters.PREFILLED)
IN_SMALL_STEP = tl.constexpr(counters.IN_SMALL_STEP)
# Device code reads no enumeration.
HIT, NO_MAPS = tl.constexpr(Count.HIT.value), tl.constexpr(Count.NO_MAPS.value)
SHORT_CONTEXT, REQUEST = tl.constexpr(Count.SHORT_CONTEXT.value), tl.constexpr(Count.REQUEST.value)
SMALL_STEP = tl.constexpr(Count.SMALL_STEP.value)
READ, SKIPPED = tl.constexpr(Count.READ.value), tl.constexpr(Count.SKIPPED.value)
TILE = tl.constexpr(TILE_TOKENS)


@triton.jit
def indexed_end(m, ring, ready, BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr):
    """Where the indexed tokens of a row end whose first token is at position `m`, and which begin at `BEGIN`: at once where
    it is read whole."""
    n = m + 1
    end = tl.maximum((n - BAND) // TILE * TILE, BEGIN)
    return tl.where((n >= MIN_CONTEXT) & (ring > OPTED_OUT) & (ready != 0), end, BEGIN)


@triton.jit
def programs_of(ns, end, last, BEGIN: tl.constexpr, SPAN: tl.constexpr):
    """How many of a pair's `ns` programs of `look_kernel` have work: each one span, or of rows read whole one tile, at least."""
    units = tl.where(end > BEGIN, tl.cdiv(end, SPAN), tl.cdiv(last, TILE))
    return tl.minimum(ns, tl.maximum(units, 1))


@triton.jit
def tokens_of(p_begin, i_row):
    """Where a row's tokens begin among all queries, and how many there are. p_begin: see `state.Rows`."""
    if p_begin is None:
        first, count = i_row, 1
    else:
        first = tl.load(p_begin + i_row).to(tl.int64)
        count = (tl.load(p_begin + i_row + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def query_at(o_q, s_query_row, s_query_head, G: tl.constexpr, T: tl.constexpr):
    """Offsets `[BQ]` of a program's queries from that of the row's first token and the group's first head."""
    if T == 1:
        offset = o_q * s_query_head
    else:
        offset = o_q // G * s_query_row + o_q % G * s_query_head
    return offset


@triton.jit
def seen(m_t, token, m, o_q, G: tl.constexpr, T: tl.constexpr):
    """Which queries attend to which tokens, `[BT, BQ]`, or `[BT, 1]` where all do: those up to their own. m_t: `[BT]`."""
    mask = m_t[:, None]
    if T > 1:
        mask &= token[:, None] <= m + (o_q // G)[None, :]
    return mask


@triton.jit(do_not_specialize=("ns",))
def merge_kernel(
    p_position, p_begin, p_ring, p_ready, p_out, p_counters, p_part, p_part_acc, p_read, s_out_row, s_out_head, ns,
    K: tl.constexpr, G: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, SPAN: tl.constexpr,
    INDEX_BYTES: tl.constexpr, KV_BYTES: tl.constexpr, BD: tl.constexpr, BNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_h, i_row, i_d)`: `BD` numbers of a head's output, of the results of its group's programs; counts.

    The heads of a row's first token come first, then those of the next. What is left of a head is so little that one
    program loads all of it at once, `[BNS, BD]`.
    """
    # What the kernels in front do not write may be read before they end.
    i_h, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    ring, ready = tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready)
    first, count = tokens_of(p_begin, i_row)
    if PDL:
        gdc_wait()
    if m < 0:
        return
    i_t = 0
    if T > 1:
        i_t, i_h = i_h // (K * G), i_h % (K * G)
        if i_t >= count:
            return
    i_bk, i_g = i_row * K + i_h // G, i_t * G + i_h % G
    C: tl.constexpr = G * T
    end = indexed_end(m, ring, ready, BAND, BEGIN, MIN_CONTEXT)
    some = programs_of(ns, end, m + count, BEGIN, SPAN)
    o_d, o_ns = tl.program_id(2) * BD + tl.arange(0, BD), tl.arange(0, BNS)
    m_ns, i_part = o_ns < some, (i_bk * ns + o_ns) * C + i_g
    peaks = tl.load(p_part + i_part * 2, mask=m_ns, other=float("-inf"))  # [BNS]
    totals = tl.load(p_part + i_part * 2 + 1, mask=m_ns, other=0.0)  # [BNS]
    part = tl.load(p_part_acc + i_part[:, None] * D + o_d[None, :], mask=m_ns[:, None] & (o_d < D)[None, :], other=0.0)
    weight = tl.exp2(peaks - tl.max(peaks, 0))
    out = tl.sum(weight[:, None] * part, 0) / tl.sum(weight * totals, 0)  # [BD]
    tl.store(p_out + (first + i_t) * s_out_row + i_h * s_out_head + o_d, out.to(p_out.dtype.element_ty), mask=o_d < D)
    counted = (i_g == 0) & (tl.program_id(2) == 0)
    if p_begin is not None:
        counted &= ring != PREFILLED
    if counted:
        n = m + 1
        kind = tl.where(ready != 0, HIT, NO_MAPS)
        kind = tl.where(ring == IN_SMALL_STEP, SMALL_STEP, kind)
        kind = tl.where(n < MIN_CONTEXT, SHORT_CONTEXT, kind)
        kind = tl.where(ring == OPTED_OUT, REQUEST, kind)
        tl.atomic_add(p_counters + kind, tl.full((), G, tl.int64) * count, sem="relaxed")
    # What all parts of a row read counts beside what one read of the row would have been.
    if counted & (i_row % PARTS == 0):
        read, length = tl.zeros((), tl.int64), m + count
        for i in tl.static_range(PARTS):
            if i > 0:
                m = tl.load(p_position + i_row + i).to(tl.int32)
                first, count = tokens_of(p_begin, i_row + i)
                end = indexed_end(m, ring, ready, BAND, BEGIN, MIN_CONTEXT)
                some = tl.where(m < 0, 0, programs_of(ns, end, m + count, BEGIN, SPAN))
                length = tl.maximum(length, m + count)
            p_of_part = p_read + (i_bk + i * K) * ns
            read += tl.sum(tl.load(p_of_part + o_ns, mask=o_ns < some, other=0), 0)
            read += (end - BEGIN).to(tl.int64) * INDEX_BYTES // KV_BYTES  # it counts as tokens that have as many bytes
        tl.atomic_add(p_counters + READ, read, sem="relaxed")
        tl.atomic_add(p_counters + SKIPPED, tl.maximum(length.to(tl.int64) - read, 0), sem="relaxed")
