"""Decode by the index of keys: `weigh_kernel` estimates what all tokens weigh, `read_kernel` reads those that matter.

`lookup.decode` is the oracle; see there for the rule. The tiles of a (row, KV head) pair go round among its `NS`
programs, so that near tokens and stretches of chosen ones are spread over all. `weigh_kernel` leaves the LSE of each
program's tiles. `read_kernel` estimates the same tiles again, since codes are few bytes and often still in L2, lists the
tokens to read, and reads them. The last program of a pair to arrive merges.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac import counters
from vllm_mac.counters import Count
from vllm_mac.kernels.entry import INTERPRETED
from vllm_mac.kernels.launch import power_of_two
from vllm_mac.kernels.partial import LOG2_E, attend, combine
from vllm_mac.key_index import Maps, PageLayout
from vllm_mac.lookup import TILE as TILE_TOKENS
from vllm_mac.state import Geometry, IndexRule, Rows

OPTED_OUT = tl.constexpr(counters.OPTED_OUT)
HIT, SHORT_CONTEXT, NOT_READY = (
    tl.constexpr(Count.HIT.value), tl.constexpr(Count.SHORT_CONTEXT.value), tl.constexpr(Count.NO_RING.value)
)  # fmt: skip
REQUEST, READ, SKIPPED = tl.constexpr(Count.REQUEST.value), tl.constexpr(Count.READ.value), tl.constexpr(Count.SKIPPED.value)
TILE = tl.constexpr(TILE_TOKENS)
BIAS = tl.constexpr(1024 + 7.5)  # what `_halves` adds to the value that a code stands for


@triton.jit
def _indexed_end(m, ring, ready, BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr):
    """Where the indexed tiles of a row at position `m` end, which begin at `BEGIN`: at once where it is read whole."""
    n = m + 1
    end = tl.maximum((n - BAND) // TILE, BEGIN)
    return tl.where((n >= MIN_CONTEXT) & (ring != OPTED_OUT) & (ready != 0), end, BEGIN)


@triton.jit
def _narrow(q, p_group_query, p_to_query, p_mean, s_query_head, o_q, o_d, o_n, m_q, m_d, m_n, D: tl.constexpr, N: tl.constexpr):
    """The queries `q` `[BQ, BD]` as codes are multiplied with: low and high halves `[BQ, BN]` float16, and `[BQ]` to add."""
    HALF: tl.constexpr = N // 2
    m_dn = m_d[:, None] & m_n[None, :]
    p_map = p_to_query + o_d[:, None] * N + o_n[None, :]
    low = tl.load(p_map, mask=m_dn, other=0.0)  # [BD, BN]
    high = tl.load(p_map + HALF, mask=m_dn, other=0.0)  # [BD, BN]
    mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)  # [BD]
    if INTERPRETED:  # see `partial.attend`
        low, high = low.to(tl.float32), high.to(tl.float32)
        q = q.to(tl.float32)
    q_low = tl.dot(q, low, input_precision="ieee").to(tl.float16)
    q_high = tl.dot(q, high, input_precision="ieee").to(tl.float16)
    constant = tl.sum(q.to(tl.float32) * mean[None, :], 1)
    constant -= BIAS * (tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1))
    return q_low, q_high, constant


@triton.jit
def _halves(codes):
    """The codes of both halves of a block of bytes, each plus 1024, in float16: a code is the last bits of 1024 + code."""
    wide = codes.to(tl.int16)
    low, high = (wide & 15) | 0x6400, ((wide >> 4) & 15) | 0x6400
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def _estimated(
    q_low, q_high, constant, t, m_tile, p_row_table, p_head_codes, s_code_page, log2_scale, o_t, o_n, m_n,
    N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Estimated scores `[BQ, TILE]`, scaled and base 2, of tile `t`; without meaning where `m_tile` is false."""
    token = t * TILE + o_t
    page = tl.load(p_row_table + token // PAGE, mask=m_tile & (o_t >= 0), other=0).to(tl.int64)  # [TILE]
    p_code = p_head_codes + (page * s_code_page + token % PAGE)[None, :] + (o_n * PAGE)[:, None]
    codes = tl.load(p_code, mask=m_n[:, None] & m_tile, other=0)  # [BN, TILE]
    low, high = _halves(codes)
    # The lanes of a half that are of no direction have 1024 there and 0 in the query.
    if INTERPRETED:
        low, high, q_low, q_high = low.to(tl.float32), high.to(tl.float32), q_low.to(tl.float32), q_high.to(tl.float32)
    score = tl.dot(q_low, low, input_precision="ieee")
    score = tl.dot(q_high, high, score, input_precision="ieee")
    return (score + constant[:, None]) * log2_scale


@triton.jit
def _after(first, i_s, NS: tl.constexpr):
    """The first tile from `first` on that is program `i_s`'s: tile `t` is program `t % NS`'s."""
    return first + (i_s + NS - first % NS) % NS


@triton.jit
def _add_scores(peak, total, score):
    """The LSE of more scores `[BQ, TILE]`, `-inf` where there is none, beside `(peak, total)` `[BQ]`."""
    new_peak = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, total * tl.exp2(peak - base) + tl.sum(tl.exp2(score - base[:, None]), 1)


@triton.jit
def _near_scores(
    q, peak, total, t, n, p_row_table, p_head_kv, s_kv_page, s_kv_token, log2_scale, o_t, o_d, m_d, PAGE: tl.constexpr
):  # fmt: skip
    """`_add_scores` of the exact scores of tile `t`."""
    token = t * TILE + o_t
    m_t = token < n
    page = tl.load(p_row_table + token // PAGE, mask=m_t, other=0).to(tl.int64)  # [TILE]
    p_key = p_head_kv + (page * s_kv_page + (token % PAGE) * s_kv_token)[:, None] + o_d[None, :]
    key = tl.load(p_key, mask=m_t[:, None] & m_d[None, :], other=0.0)  # [TILE, BD]
    if INTERPRETED:
        q, key = q.to(tl.float32), key.to(tl.float32)
    score = tl.dot(q, tl.trans(key), input_precision="ieee") * log2_scale
    return _add_scores(peak, total, tl.where(m_t[None, :], score, float("-inf")))


@triton.jit(do_not_specialize=("s_table_row",))
def weigh_kernel(
    p_query, p_position, p_ring, p_ready, p_table, p_kv, p_codes, p_to_query, p_mean, p_lse2,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, log2_scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, NS: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the base-2 LSE of its tiles, exact for near ones, estimated for the others."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    end = _indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    if end <= BEGIN:
        return
    o_q, o_d, o_n, o_t = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, TILE)
    m_q, m_d, m_n = o_q < G, o_d < D, o_n < N // 2
    p_group_query = p_query + i_row * s_query_row + i_k * G * s_query_head
    q = tl.load(p_group_query + (o_q * s_query_head)[:, None] + o_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
    p_row_table = p_table + i_row * s_table_row
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    p_head_codes = p_codes + i_k * (N // 2 * PAGE)
    q_low, q_high, constant = _narrow(
        q, p_group_query, p_to_query + i_k * D * N, p_mean + i_k * D, s_query_head, o_q, o_d, o_n, m_q, m_d, m_n, D, N
    )
    peak, total = tl.full([BQ], float("-inf"), tl.float32), tl.zeros([BQ], tl.float32)
    for t in tl.range(_after(BEGIN, i_s, NS), end, NS, num_stages=STAGES):
        score = _estimated(
            q_low, q_high, constant, t, True, p_row_table, p_head_codes, s_code_page, log2_scale, o_t, o_n, m_n, N, PAGE
        )
        peak, total = _add_scores(peak, total, score)
    n = m + 1
    for t in range(i_s, BEGIN, NS):
        peak, total = _near_scores(
            q, peak, total, t, n, p_row_table, p_head_kv, s_kv_page, s_kv_token, log2_scale, o_t, o_d, m_d, PAGE
        )
    for t in range(_after(end, i_s, NS), tl.cdiv(n, TILE), NS):
        peak, total = _near_scores(
            q, peak, total, t, n, p_row_table, p_head_kv, s_kv_page, s_kv_token, log2_scale, o_t, o_d, m_d, PAGE
        )
    lse2 = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(p_lse2 + ((i_row * K + i_k) * NS + i_s) * G + o_q, lse2, mask=m_q)


@triton.jit(do_not_specialize=("s_table_row",))
def read_kernel(
    p_query, p_position, p_ring, p_ready, p_table, p_kv, p_codes, p_means, p_to_query, p_mean, p_out, p_counters,
    p_lse2, p_list, p_part, p_part_acc, p_chosen, p_arrived,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page, s_out_row, s_out_head,
    log2_scale, log2_tolerance,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, INDEX_BYTES: tl.constexpr, TILE_BYTES: tl.constexpr,
    NS: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr, BT: tl.constexpr,
    BQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BNS: tl.constexpr,
    STAGES: tl.constexpr, READ_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: attends to the near and chosen tokens of its tiles, and adds the rest of them.

    CHUNK: tiles that are listed before any is read. ROOM: tokens that the list of a program holds.
    """
    # 1. The row, and where the threshold lies.
    if PDL:
        gdc_wait()
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    if m < 0:
        return
    n = m + 1
    ring, ready = tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready)
    end = _indexed_end(m, ring, ready, BAND, BEGIN, MIN_CONTEXT)
    o_q, o_d, o_n, o_t, o_ns = (
        tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, TILE), tl.arange(0, BNS)
    )  # fmt: skip
    m_q, m_d, m_n = o_q < G, o_d < D, o_n < N // 2
    m_qd = m_q[:, None] & m_d[None, :]
    i_bk = i_row * K + i_k
    p_group_query = p_query + i_row * s_query_row + i_k * G * s_query_head
    q = tl.load(p_group_query + (o_q * s_query_head)[:, None] + o_d[None, :], mask=m_qd, other=0.0)  # [BQ, BD]
    p_row_table = p_table + i_row * s_table_row
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    p_head_codes, p_head_means = p_codes + i_k * (N // 2 * PAGE), p_means + i_k * D
    q_low, q_high, constant = _narrow(
        q, p_group_query, p_to_query + i_k * D * N, p_mean + i_k * D, s_query_head, o_q, o_d, o_n, m_q, m_d, m_n, D, N
    )
    lse2 = tl.full([BQ], 0.0, tl.float32)
    if end > BEGIN:
        p_parts = p_lse2 + (i_bk * NS + o_ns[:, None]) * G + o_q[None, :]
        parts = tl.load(p_parts, mask=(o_ns < NS)[:, None] & m_q[None, :], other=float("-inf"))  # [BNS, BQ]
        lse2 = tl.max(parts, 0)
        lse2 = tl.where(m_q, lse2, 0.0)
        lse2 += tl.where(m_q, tl.log2(tl.sum(tl.exp2(parts - lse2[None, :]), 0)), 0.0)
    threshold = lse2 + log2_tolerance - tl.log2(n.to(tl.float32))  # [BQ]

    # 2. List the tokens to read, and read them; add what is left of each page.
    peak, total = tl.full([BQ], float("-inf"), tl.float32), tl.zeros([BQ], tl.float32)
    acc, rest_acc = tl.zeros([BQ, BD], tl.float32), tl.zeros([BQ, BD], tl.float32)
    rest_total = tl.zeros([BQ], tl.float32)
    p_own = p_list + (i_bk * NS + i_s) * ROOM
    NP: tl.constexpr = TILE // PAGE if PAGE < TILE else 1
    o_np = tl.arange(0, NP)
    chosen_in_all = 0
    count = 0
    first = i_s
    tiles = tl.cdiv(n, TILE)
    while first < tiles:
        stop = tl.minimum(first + CHUNK * NS, tiles)
        for t in tl.range(first, stop, NS, num_stages=STAGES):
            indexed = (t >= BEGIN) & (t < end)
            score = _estimated(
                q_low, q_high, constant, t, indexed, p_row_table, p_head_codes, s_code_page, log2_scale, o_t, o_n, m_n,
                N, PAGE,
            )  # fmt: skip
            over = tl.max(tl.where(m_q[:, None], score - threshold[:, None], float("-inf")), 0) >= 0
            token = t * TILE + o_t
            chosen = tl.where(indexed, over.to(tl.int32), (token < n).to(tl.int32))  # [TILE]
            tl.store(p_own + count + tl.cumsum(chosen, 0) - 1, token, mask=chosen != 0)
            count += tl.sum(chosen, 0)
            left = tl.where(indexed & (chosen == 0)[None, :], tl.exp2(score - lse2[:, None]), 0.0)  # [BQ, TILE]
            rest_total += tl.sum(left, 1)
            page = tl.load(p_row_table + t * TILE // PAGE + o_np, mask=indexed & (o_np >= 0), other=0).to(tl.int64)
            p_page_mean = p_head_means + (page * s_mean_page)[:, None] + o_d[None, :]
            mean = tl.load(p_page_mean, mask=indexed & m_d[None, :], other=0.0).to(tl.float32)  # [NP, BD]
            of_page = tl.sum(tl.reshape(left, (BQ, NP, TILE // NP)), 2)  # [BQ, NP]
            rest_acc += tl.sum(of_page[:, :, None] * mean[None, :, :], 1)
        first += CHUNK * NS
        if (count > ROOM - CHUNK * TILE) | (first >= tiles):
            tl.debug_barrier()  # the list is whole
            for j in tl.range(0, count, BT, num_stages=READ_STAGES):
                o_j = j + tl.arange(0, BT)
                m_j = o_j < count
                token = tl.load(p_own + o_j, mask=m_j, other=0)  # [BT]
                page = tl.load(p_row_table + token // PAGE, mask=m_j, other=0)  # [BT]
                peak, total, acc = attend(
                    q, peak, total, acc, token, page, m_j, m_j[None, :], p_head_kv, s_kv_page, s_kv_token, log2_scale,
                    o_d, m_d, D, PAGE,
                )  # fmt: skip
            chosen_in_all += count
            count = 0
            tl.debug_barrier()  # the list may be written anew
    some = rest_total > 0
    peak, total, acc = combine(peak, total, acc, tl.where(some, lse2, float("-inf")), rest_total, rest_acc)

    # 3. The last program of the group merges.
    if NS > 1:
        i_part = i_bk * NS + i_s
        p_o = p_part + (i_part * G + o_q) * 2
        tl.store(p_o, peak, mask=m_q)
        tl.store(p_o + 1, total, mask=m_q)
        tl.store(p_part_acc + (i_part * G + o_q)[:, None] * D + o_d[None, :], acc, mask=m_qd)
        tl.store(p_chosen + i_part, chosen_in_all)
        tl.debug_barrier()  # all threads' stores precede the one thread's atomic
        p_count = p_arrived + i_bk
        if tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu") != NS - 1:
            return
        tl.debug_barrier()
        tl.store(p_count, 0)  # for the next step
        p_parts = p_part + ((i_bk * NS + o_ns[:, None]) * G + o_q[None, :]) * 2
        m_parts = (o_ns < NS)[:, None] & m_q[None, :]
        peaks = tl.load(p_parts, mask=m_parts, other=float("-inf"))  # [BNS, BQ]
        totals = tl.load(p_parts + 1, mask=m_parts, other=0.0)  # [BNS, BQ]
        peak = tl.max(peaks, 0)
        total = tl.sum(tl.exp2(peaks - tl.where(m_q, peak, 0.0)[None, :]) * totals, 0)
        acc = tl.zeros([BQ, BD], tl.float32)
        for i in range(NS):
            o_part = (i_bk * NS + i) * G + o_q
            weight = tl.exp2(tl.load(p_part + o_part * 2, mask=m_q, other=float("-inf")) - tl.where(m_q, peak, 0.0))
            acc += weight[:, None] * tl.load(p_part_acc + o_part[:, None] * D + o_d[None, :], mask=m_qd, other=0.0)
        chosen_in_all = tl.sum(tl.load(p_chosen + i_bk * NS + o_ns, mask=o_ns < NS, other=0), 0)
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    p_o = p_out + i_row * s_out_row + ((i_k * G + o_q) * s_out_head)[:, None] + o_d[None, :]
    tl.store(p_o, out.to(p_out.dtype.element_ty), mask=m_qd)

    # 4. Count. The index counts as the tokens that have as many bytes.
    kind = tl.where(ring == OPTED_OUT, REQUEST, tl.where(n < MIN_CONTEXT, SHORT_CONTEXT, tl.where(ready != 0, HIT, NOT_READY)))
    read = chosen_in_all.to(tl.int64) + (end - BEGIN).to(tl.int64) * TILE * INDEX_BYTES // TILE_BYTES
    tl.atomic_add(p_counters + kind, tl.full((), G, tl.int64), sem="relaxed")
    tl.atomic_add(p_counters + READ, read, sem="relaxed")
    tl.atomic_add(p_counters + SKIPPED, n.to(tl.int64) - read, sem="relaxed")


@dataclass(frozen=True, slots=True)
class Tuning:
    """per_sm: programs of a step for each SM. most: programs of one (row, KV head) pair at most. chunk: tiles that are
    listed before any is read. block: tokens read at once. The others are of the kernels' loops."""

    per_sm: int = 3
    most: int = 64
    chunk: int = 16
    block: int = 64
    warps: int = 4
    weigh_stages: int = 4
    list_stages: int = 3
    read_stages: int = 3


@dataclass(slots=True)
class LookupWork:
    """What one step leaves for its later kernels, for all layers of one geometry.

    lse2: `[programs, G]` float32 base 2. listed: `[programs, ROOM]` int32 tokens. part: `[programs, G, 2]`, part_acc:
    `[programs, G, D]` float32, chosen: `[programs]` int32, of each program. arrived: `[B, K]` int32, 0 between steps.
    slots: programs that share a step.
    """

    lse2: Tensor
    listed: Tensor
    part: Tensor
    part_acc: Tensor
    chosen: Tensor
    arrived: Tensor
    slots: int
    pdl: bool
    tuning: Tuning

    ROOM = 2048

    @classmethod
    def allocate(cls, geometry: Geometry, device, tuning: Tuning = Tuning()) -> "LookupWork":
        """For batches of at most `max_rows` rows, padding included."""
        on, g = torch.device(device), geometry
        gpu = torch.cuda.get_device_properties(on) if on.type == "cuda" else None
        slots = tuning.per_sm * gpu.multi_processor_count if gpu else 4
        pairs = g.max_rows * g.kv_heads
        programs = max(pairs, slots)
        empty = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=on)
        return cls(
            empty(programs, g.group), empty(programs, cls.ROOM, dtype=torch.int32), empty(programs, g.group, 2),
            empty(programs, g.group, g.head_size), empty(programs, dtype=torch.int32),
            torch.zeros(pairs, dtype=torch.int32, device=on), slots, gpu is not None and gpu.major >= 9, tuning,
        )  # fmt: skip

    def splits(self, pairs: int) -> int:
        """Programs of each of so many (row, KV head) pairs."""
        return max(1, min(self.tuning.most, self.slots // pairs))


def look_up(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Decode one token of each row. Allocates nothing and waits for nothing.

    rows: position, ring (`OPTED_OUT` for a row that is read whole) and block_table are read; int32. query: `[B, H, D]`
    after RoPE, last dimension contiguous. kv: `[blocks, K, PAGE, 2 D]` with its index. result: out `[B, H, D]`, written,
    and counts `[len(Count)]` int64, added to.
    """
    out, counts = result
    count, heads, d = query.shape
    kv_heads, page = layout.kv_heads, layout.page
    group, ns = heads // kv_heads, work.splits(count * kv_heads)
    codes, means = layout.views(kv)
    s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
    shared = dict(
        p_query=query, p_position=rows.position, p_ring=rows.ring, p_ready=maps.ready, p_table=rows.block_table, p_kv=kv,
        p_codes=codes, p_to_query=maps.to_query, p_mean=maps.mean, p_lse2=work.lse2,
        s_query_row=s_query[0], s_query_head=s_query[1], s_table_row=rows.block_table.stride(0),
        s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_code_page=codes.stride(0),
        log2_scale=rule.scale * LOG2_E.value,
        K=kv_heads, G=group, D=d, N=layout.directions, PAGE=page,
        BAND=rule.band, BEGIN=-(-rule.sink // TILE_TOKENS), MIN_CONTEXT=rule.min_context, NS=ns,
        BQ=max(16, power_of_two(group)), BD=power_of_two(d), BN=max(16, power_of_two(layout.directions // 2)),
        PDL=work.pdl, num_warps=work.tuning.warps, **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
    grid = (ns, kv_heads, count)
    weigh_kernel[grid](**shared, STAGES=work.tuning.weigh_stages)
    read_kernel[grid](
        **shared, p_means=means, p_out=out, p_counters=counts, p_list=work.listed, p_part=work.part, p_part_acc=work.part_acc,
        p_chosen=work.chosen, p_arrived=work.arrived, s_mean_page=means.stride(0), s_out_row=s_out[0], s_out_head=s_out[1],
        log2_tolerance=_log2(rule.tolerance), INDEX_BYTES=layout.index_bytes, TILE_BYTES=layout.kv_bytes,
        CHUNK=work.tuning.chunk, ROOM=work.ROOM, BT=work.tuning.block, BNS=power_of_two(ns),
        STAGES=work.tuning.list_stages, READ_STAGES=work.tuning.read_stages,
    )  # fmt: skip


def _log2(x: float) -> float:
    import math

    return math.log2(x) if x > 0 else -1e9  # 0 reads every token
