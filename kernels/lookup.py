"""Decode by the index of keys. `lookup.decode` is the oracle; see there for the rule.

Three launches. `weigh_kernel` estimates what all tokens weigh, by a sample. `look_kernel` estimates them one by one, marks
those that weigh enough, lists and reads them, and adds the others by the mean values of their pages. `merge_kernel` in
`lookup_merge` merges. The spans of `SPAN` tokens of a (row, KV head) pair go round among its `ns` programs of
`look_kernel`, those of them that have work.

A program is one warp where its blocks are small enough, and an SM runs a dozen at once. Nothing then waits for other
warps, and a sum over tokens takes few shuffles: products have queries as rows and tokens as columns, so a thread holds
many tokens of few queries. A row that decodes several tokens has the heads of each among its queries.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.kernels.estimate import codes_of, first_rows, narrow_at, pages_of, scores_of, shares_of
from vllm_mac.kernels.launch import by_kind, launch, power_of_two
from vllm_mac.kernels.lookup_merge import indexed_end, merge_kernel, programs_of, query_at, seen, tokens_of
from vllm_mac.kernels.lookup_work import DOT_TYPES, LookupWork, narrow_width
from vllm_mac.kernels.partial import LOG2_E
from vllm_mac.kernels.scales import scaled
from vllm_mac.kernels.weigh import least_score, weigh_kernel
from vllm_mac.key_index import Maps, PageLayout
from vllm_mac.lookup import SPAN, TILE
from vllm_mac.state import IndexRule, Rows

# Numbers of an output that a program merges, at least, and those of all results that a warp holds.
LEAST_MERGED, MERGED = 32, 2048
UNIT = tl.constexpr(16)  # elements; slots are listed as places in the cache in such units


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _attend(q, key, value, mask, log2_scale, peak, total, acc, BQ: tl.constexpr, DOT: tl.constexpr):
    """A partial result with the tokens of a block: key, value `[BD, BT]`, those of `mask`. q: `[BR, BD]`. total: `[BQ, BT]`."""
    score = first_rows(tl.dot(q, key.to(DOT), input_precision="ieee"), BQ) * log2_scale  # [BQ, BT]
    score = tl.where(mask, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink[:, None] + weight
    weight = weight.to(tl.float16 if value.dtype.is_fp8() else value.dtype).to(DOT)
    acc = tl.dot(value.to(DOT), tl.trans(weight), acc * shrink[None, :], input_precision="ieee")  # [BD, BQ]
    return new_peak, total, acc


@triton.jit
def _read(p_head_kv, slot, D: tl.constexpr, BD: tl.constexpr):
    """Keys and values `[BD, BT]` that lie at `slot` `[BT]`: in one shape, so that a thread computes an address for both."""
    o_d = tl.arange(0, BD)
    p_key = (p_head_kv + slot.to(tl.int64) * UNIT)[None, :] + o_d[:, None]
    m_d = (o_d < D)[:, None]
    return tl.load(p_key, mask=m_d, other=0.0), tl.load(p_key + D, mask=m_d, other=0.0)


@triton.jit
def _near(i, end, BEGIN: tl.constexpr):
    """The `i`-th near token of a row whose indexed ones end at `end`."""
    return tl.where(i < BEGIN, i, i - BEGIN + end)


@triton.jit
def _slot(p_row_table, token, page_unit, token_unit, PAGE: tl.constexpr):
    """Where a token lies, in units of `UNIT` elements."""
    page = tl.load(p_row_table + token.to(tl.uint32) // PAGE)
    return page * page_unit + (token.to(tl.uint32) % PAGE).to(tl.int32) * token_unit


@triton.jit(do_not_specialize=("s_table_row", "ns", "nw"))
def look_kernel(
    p_query, p_position, p_begin, p_ring, p_ready, p_table, p_kv, p_codes, p_means, p_lse2, p_narrow, p_scale,
    p_slots, p_words, p_rest, p_part, p_part_acc, p_read, p_key_scale, p_value_scale,
    s_query_row, s_query_head, s_table_row, s_kv_page, s_kv_head, s_kv_token, s_code_page, s_mean_page,
    ns, nw, log2_scale, log2_tolerance,
    K: tl.constexpr, G: tl.constexpr, T: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr,
    BAND: tl.constexpr, BEGIN: tl.constexpr, MIN_CONTEXT: tl.constexpr, SPAN: tl.constexpr, TURN: tl.constexpr,
    ROOM: tl.constexpr, BT: tl.constexpr,
    BQ: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BNW: tl.constexpr,
    MARK_STAGES: tl.constexpr, READ_STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `(i_s, i_k, i_row)`: the partial result over its tokens, see `partial`, and how many of them it read.

    Its tokens are those of its spans, and a share of the near ones; of a row read whole all are near. It takes `TURN` spans
    at a time. p_slots: `[programs, ROOM]`, where the tokens to read lie. p_words: `[programs, TURN, SPAN / 32]`, bits of
    the tokens to read. p_rest: `[programs, TURN, SPAN / PAGE, BQ]`, what the others of each page weigh. nw: programs of
    `weigh_kernel`.

    A warp's products give thread `l` of four the tokens `8 i + 2 l` and `8 i + 2 l + 1` of a span. So `l` numbers its
    words, and `2 i` and `2 i + 1` their bits.
    """
    # 1. The row. What `weigh_kernel` did not write may be read before it ends.
    i_s, i_k, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = tl.load(p_position + i_row).to(tl.int32)
    end = indexed_end(m, tl.load(p_ring + i_row).to(tl.int32), tl.load(p_ready), BAND, BEGIN, MIN_CONTEXT)
    first_query, count = tokens_of(p_begin, i_row)
    tl.static_assert(SPAN == 128, "a thread has 32 tokens of a span, the bits of a word")
    tl.static_assert((PAGE % BT == 0) & (BEGIN % BT == 0), "near tokens are read by blocks that lie in one page")
    HALF: tl.constexpr = N // 2
    C: tl.constexpr = G * T
    NP: tl.constexpr = SPAN // PAGE
    WORDS: tl.constexpr = SPAN // 32
    PART: tl.constexpr = 8  # bits of a word that are listed at once, as registers are scarce
    PAGES: tl.constexpr = PART * 4 // PAGE if PART * 4 > PAGE else 1  # that the tokens of `PART` bits lie in
    last = m + count
    o_q, o_d, o_r, o_j = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BR), tl.arange(0, BT)
    m_q, m_d = o_q < G * count, o_d < D
    i_bk = i_row * K + i_k
    i_part = i_bk * ns + i_s
    p_row_table = p_table + i_row // PARTS * s_table_row
    p_list = p_slots + i_part * ROOM
    p_own_words = p_words + i_part * (TURN * WORDS)
    p_own_rest = p_rest + i_part * (TURN * NP * BQ)
    looked, ns = end > BEGIN, programs_of(ns, end, last, BEGIN, SPAN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if (m < 0) | (i_s >= ns):
        return
    p_own_query = p_query + first_query * s_query_row + i_k * G * s_query_head
    p_own_query += query_at(o_r, s_query_row, s_query_head, G, T)[:, None] + o_d[None, :]
    q = tl.load(p_own_query, mask=(o_r < G * count)[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BR, BD]
    p_head_kv = p_kv + i_k.to(tl.int64) * s_kv_head
    near = tl.where(looked, BEGIN + last - end, last)  # of a row read whole all tokens are near
    blocks = tl.cdiv(near, BT)
    each, over = blocks // ns, blocks % ns  # blocks times `i_s` may be more than 32 bits hold
    near_begin = tl.minimum((each * i_s + over * i_s // ns) * BT, near)
    near_end = tl.minimum((each * (i_s + 1) + over * (i_s + 1) // ns) * BT, near)
    read = near_end - near_begin
    key_scale = scaled(log2_scale, p_key_scale)
    page_unit, token_unit = s_kv_page // UNIT, s_kv_token // UNIT
    peak = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ, BT], tl.float32)  # added up over tokens at the end only
    acc = tl.zeros([BD, BQ], tl.float32)
    if looked:
        spans = tl.cdiv(tl.cdiv(end, SPAN) - i_s, ns)
        o_p, o_l, o_16, o_32 = tl.arange(0, NP), tl.arange(0, 4), tl.arange(0, 16), tl.arange(0, 32)
        bit = tl.arange(0, SPAN // 8)[:, None, None] * 2 + tl.arange(0, 2)[None, None, :]
        p_head_codes = p_codes + i_k * PAGE * HALF
        # Shares are relative to those from which tokens are listed; no query that there is not lists any.
        least = least_score(p_lse2 + i_bk * nw * C, nw, m, log2_tolerance, o_q, m_q, G, T, BNW)
        p_low, p_high = narrow_at(p_narrow, i_bk, BQ, BN)
        narrow_low, narrow_high = tl.load(p_low), tl.load(p_high)
        factor, constant = tl.load(p_scale + i_bk * (2 * BQ) + o_q), tl.load(p_scale + i_bk * (2 * BQ) + BQ + o_q)
        constant = tl.where(m_q, constant - least, float("-inf"))
        peak = least
        # What lists have beyond their ends is read and counts for nothing: the row's own token, whose numbers are good.
        own_slot = _slot(p_row_table, m, page_unit, token_unit, PAGE)
        for turn in range(0, spans, TURN):
            turn_spans = tl.minimum(spans - turn, TURN)

            # 2. Mark tokens to read, and add up what the others of each page weigh.
            next_page = pages_of(p_row_table, (turn * ns + i_s) * SPAN, end, PAGE, SPAN)
            for i in tl.range(0, turn_spans, num_stages=MARK_STAGES):
                t, page = ((turn + i) * ns + i_s) * SPAN, next_page
                next_page = pages_of(p_row_table, t + ns * SPAN, end, PAGE, SPAN)
                codes = codes_of(page, p_head_codes, t, end, s_code_page, HALF, PAGE, SPAN, BN)
                share = shares_of(scores_of(narrow_low, narrow_high, codes), factor, constant, t, BEGIN, end, PAGE)
                share = tl.reshape(share, (BQ, SPAN // 8, 4, 2))
                own = tl.sum(tl.sum(tl.where(share >= 0, 1, 0) << bit[None], 3), 1)  # [BQ, 4]
                word = tl.reduce(own, 0, _or)  # [4]
                tl.store(p_own_words + i * WORDS + o_l, word)
                listed = (word[None, :, None] >> bit) & 1
                left = tl.exp2(tl.where((listed != 0)[None], float("-inf"), share))
                rest = tl.sum(tl.sum(tl.sum(tl.reshape(left, (BQ, NP, PAGE // 8, 4, 2)), 4), 2), 2)  # [BQ, NP]
                tl.store(p_own_rest + (i * NP + o_p)[None, :] * BQ + o_q[:, None], rest)
            tl.debug_barrier()  # what threads marked, others read

            # 3. List what is marked, 32 words at once: where each token lies, in units of `UNIT` elements.
            listed_count = tl.zeros((), tl.int32)
            for w in tl.range(0, turn_spans * WORDS, 32, num_stages=1):
                i_word = w + o_32
                m_word = i_word < turn_spans * WORDS
                word = tl.load(p_own_words + i_word, mask=m_word, other=0)
                first = ((turn + i_word // WORDS) * ns + i_s) * NP  # page
                count_of = tl.sum((word[None, :] >> o_32[:, None]) & 1, 0)
                at = tl.cumsum(count_of, 0) - count_of + (listed_count - 1)
                for part in tl.static_range(32 // PART):
                    o_b, o_pp = part * PART + tl.arange(0, PART), part * PART * 4 // PAGE + tl.arange(0, PAGES)
                    marked = (word[None, :] >> o_b[:, None]) & 1  # [PART, 32]
                    at_page = first[None, :] + o_pp[:, None]
                    page = tl.load(p_row_table + at_page, mask=m_word[None, :] & (at_page * PAGE < end), other=0)
                    slot = page * page_unit + (i_word % WORDS * 2 * token_unit)[None, :]
                    slot = tl.reshape(tl.broadcast_to(slot[:, None, :], (PAGES, PART // PAGES, 32)), (PART, 32))
                    slot += ((o_b // 2 * 8 + o_b % 2) % PAGE * token_unit)[:, None]
                    tl.store(p_list + at[None, :] + tl.cumsum(marked, 0), slot, mask=marked != 0)
                    at += tl.sum(marked, 0)
                listed_count += tl.sum(count_of, 0)
            read += listed_count
            # Near ones too, in the last turn, where all queries see them and they have room.
            if (T == 1) & (turn + TURN >= spans) & (listed_count + near_end - near_begin <= ROOM - 2 * BT):
                for i in tl.range(near_begin, near_end, 32, num_stages=1):
                    i_near = tl.minimum(i + o_32, near_end - 1)
                    slot = _slot(p_row_table, _near(i_near, end, BEGIN), page_unit, token_unit, PAGE)
                    tl.store(p_list + listed_count + i + o_32 - near_begin, slot, mask=i + o_32 < near_end)
                listed_count += near_end - near_begin
                near_begin = near_end
            tl.store(p_list + listed_count + tl.arange(0, 2 * BT), own_slot)
            tl.debug_barrier()  # what threads listed, others read

            # 4. Add the others, page by page.
            # What they weigh is relative to `least`, so the result is too meanwhile. Far below the peak they count for nothing.
            ahead = tl.minimum(peak - least, 60.0)
            acc *= tl.exp2(ahead)[None, :]
            rest_total = tl.zeros([16, BQ], tl.float32)
            for i in tl.range(0, turn_spans * NP, 16, num_stages=1):
                i_page = i + o_16
                at_page = ((turn + i_page // NP) * ns + i_s) * NP + i_page % NP
                m_page = (i_page < turn_spans * NP) & (at_page * PAGE < end)
                page = tl.load(p_row_table + at_page, mask=m_page, other=0).to(tl.int64)
                rest = tl.load(p_own_rest + i_page[:, None] * BQ + o_q[None, :], mask=m_page[:, None], other=0.0)
                p_mean = p_means + (page * s_mean_page + i_k * D)[None, :] + o_d[:, None]
                mean = tl.load(p_mean, mask=m_page[None, :] & m_d[:, None], other=0.0)  # [BD, 16]
                rest_total += rest  # [16, BQ]
                acc = tl.dot(mean.to(DOT), rest.to(mean.dtype).to(DOT), acc, input_precision="ieee")
            shrink = tl.exp2(-ahead)
            acc *= shrink[None, :]
            total += tl.where((o_j == 0)[None, :], (tl.sum(rest_total, 0) * shrink)[:, None], 0.0)

            # 5. Read what is listed.
            next_slot = tl.load(p_list + o_j)
            for j in tl.range(0, listed_count, BT, num_stages=READ_STAGES):
                m_t, slot = j + o_j < listed_count, next_slot  # [BT]
                next_slot = tl.load(p_list + j + BT + o_j)
                key, value = _read(p_head_kv, slot, D, BD)
                peak, total, acc = _attend(q, key, value, m_t[None, :], key_scale, peak, total, acc, BQ, DOT)
            tl.debug_barrier()  # before they mark and list others

    # 6. Read near tokens that no list has. A block of them lies in one page.
    if near_begin < near_end:
        next_slot = _slot(p_row_table, _near(near_begin, end, BEGIN), page_unit, token_unit, PAGE)
        for j in tl.range(near_begin, near_end, BT, num_stages=READ_STAGES):
            slot = next_slot + tl.minimum(o_j, near_end - 1 - j) * token_unit
            next_near = _near(tl.minimum(j + BT, near_end - 1), end, BEGIN)
            next_slot = _slot(p_row_table, next_near, page_unit, token_unit, PAGE)
            key, value = _read(p_head_kv, slot, D, BD)
            m_seen = tl.trans(seen(j + o_j < near_end, _near(j, end, BEGIN) + o_j, m, o_q, G, T))
            peak, total, acc = _attend(q, key, value, m_seen, key_scale, peak, total, acc, BQ, DOT)

    # 7. Leave the result to `merge_kernel`.
    p_own_part = p_part + (i_part * C + o_q) * 2
    tl.store(p_own_part, peak, mask=m_q)
    tl.store(p_own_part + 1, tl.sum(total, 1), mask=m_q)
    p_own_acc = p_part_acc + (i_part * C + o_q)[None, :] * D + o_d[:, None]
    tl.store(p_own_acc, scaled(acc, p_value_scale), mask=m_d[:, None] & m_q[None, :])
    tl.store(p_read + i_part, read)


def look_up(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Decode the tokens of each row. Arguments: of `launches`. Allocates nothing and waits for nothing."""
    for _ in launches(rows, query, kv, layout, maps, rule, work, result):
        pass


def merged_at_once(ns: int, d: int) -> tuple[int, int]:
    """What a program of `merge_kernel` loads: so many of the `ns` results of a head, and numbers of each.

    Results are rounded up to powers of four, so that few variants are compiled.
    """
    bits = max(ns - 1, 3).bit_length()
    results = 1 << (bits + bits % 2)
    return results, min(max(MERGED // results, LEAST_MERGED), power_of_two(d))


def _check_places(kv: Tensor) -> None:
    """Raises ValueError where tokens do not lie in whole units, or too many of these for 32 bits."""
    most, strides = UNIT.value << 31, kv.stride()
    if strides[0] % UNIT.value or strides[2] % UNIT.value or len(kv) * strides[0] > most:
        raise ValueError(
            f"kv: {len(kv)} pages with strides {strides}, choose multiples of {UNIT.value} for pages and tokens, and "
            f"{most} elements at most"
        )


def launches(
    rows: Rows, query: Tensor, kv: Tensor, layout: PageLayout, maps: Maps, rule: IndexRule, work: LookupWork,
    result: tuple[Tensor, Tensor],
) -> Iterator[str]:  # fmt: skip
    """Launch the kernels one by one: each has been launched when its name is yielded.

    rows: position, ring (`OPTED_OUT` or less for a row that is read whole), block_table and begin are read; int32. query:
    `[N, H, D]` after RoPE, last dimension contiguous. kv: `[blocks, K, PAGE, 2 D]` with its index. result: out `[N, H, D]`,
    written, and counts `[len(Count)]` int64, added to. Raises ValueError where `kv` has other strides than pages with an
    index have, or more than 2^35 elements.
    """
    out, counts = result
    count, (_, heads, d) = len(rows.position), query.shape
    together, parts = (1, 1) if rows.begin is None else (work.together, work.parts)
    kv_heads, page, tuning = layout.kv_heads, layout.page, work.tuning
    group = heads // kv_heads
    width = work.width(group * together)
    ns, nw = work.splits(count * kv_heads, width), work.weigh_splits(count * kv_heads)
    codes, means = layout.views(kv)
    s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
    begin = -(-rule.sink // TILE) * TILE
    block = work.block(width, d, kv.itemsize, page)
    _check_places(kv)
    everywhere = dict(
        p_query=query, p_position=rows.position, p_begin=rows.begin, p_ring=rows.ring, p_ready=maps.ready,
        p_table=rows.block_table, p_key_scale=maps.scales and maps.scales.key,
        p_kv=kv, p_codes=codes.view(torch.int8), p_lse2=work.lse2, p_narrow=work.narrow, p_scale=work.scale,
        s_query_row=s_query[0], s_query_head=s_query[1], s_table_row=rows.block_table.stride(0),
        s_kv_page=s_kv[0], s_kv_head=s_kv[1], s_kv_token=s_kv[2], s_code_page=codes.stride(0),
        log2_scale=rule.scale * LOG2_E.value, K=kv_heads, G=group, T=together, PARTS=parts, D=d, N=layout.directions, PAGE=page,
        BAND=rule.band, BEGIN=begin, MIN_CONTEXT=rule.min_context, nw=nw,
        BQ=width, BR=max(width, 16), BD=power_of_two(d), BN=narrow_width(layout.directions), SPAN=SPAN, BT=block, PDL=work.pdl,
        **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
    found = dict(p_part=work.part, p_part_acc=work.part_acc, p_read=work.read)
    weigh_kernel[(nw, kv_heads, count)](
        **everywhere, p_to_query=maps.to_query, p_mean=maps.mean, STAGES=tuning.weigh_stages,
        **work.weigher_options(width, d, layout.directions),
    )  # fmt: skip
    yield "weigh"
    arguments = dict(
        **everywhere, **found, p_value_scale=maps.scales and maps.scales.value, p_means=means, p_slots=work.slots,
        p_words=work.words, p_rest=work.rest, s_mean_page=means.stride(0), ns=ns, TURN=tuning.turn, ROOM=work.slots.shape[1],
        log2_tolerance=math.log2(rule.tolerance) if rule.tolerance > 0 else -1e9,  # 0 reads every token
        BNW=power_of_two(tuning.most_weighers), MARK_STAGES=tuning.mark_stages, READ_STAGES=tuning.read_stages,
        DOT=tl.float32 if triton.knobs.runtime.interpret else DOT_TYPES[means.dtype],
    )  # fmt: skip
    kinds = by_kind(arguments, ("ns", "nw", "log2_scale", "log2_tolerance", "s_table_row"))
    launch(
        look_kernel, (ns, kv_heads, count), *kinds, work.options(width, d, kv.itemsize, layout.directions),
        work.found[width],
    )  # fmt: skip
    yield "look"
    shared = "p_position p_begin p_ring p_ready K G T PARTS D BAND BEGIN MIN_CONTEXT PDL launch_pdl".split()
    results, numbers = merged_at_once(ns, d)
    merge_kernel[(heads * together, count, triton.cdiv(d, numbers))](
        **{name: everywhere[name] for name in shared if name in everywhere}, **found, ns=ns, p_out=out, p_counters=counts,
        s_out_row=s_out[0], s_out_head=s_out[1], INDEX_BYTES=layout.index_bytes, KV_BYTES=layout.kv_bytes,
        SPAN=SPAN, BD=numbers, BNS=results, num_warps=max(results * numbers // MERGED, 1),
    )  # fmt: skip
    yield "merge"
