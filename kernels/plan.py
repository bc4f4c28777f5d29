"""FlashInfer's inputs for missed groups, written on the device: page table and work list.

FlashInfer sees one virtual request per (row, KV head): request `b * K + k` has the group's `G`
query heads, one KV head, and virtual pages that are the pages of that head alone. `write_pages`
fills its page table once a step. `write_plan` fills, once a layer, the work list that
FlashInfer's own planner would otherwise compute on the host, with the missed requests only.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_mac.state import Geometry, Rows

# Chunk sizes are compared as: tokens of the busiest slot plus this much for each tile started.
TILE_COST = 128
MIN_CHUNK = 128
CHUNK_STEP = 64
WAVES = 4


@triton.jit(do_not_specialize=("s_table_row", "block_pages", "head_pages"))
def _pages_kernel(
    p_table, p_position, p_indices, p_indptr, p_last_page_len,
    rows, first_page, band, s_table_row, block_pages, head_pages,
    K: tl.constexpr, PAGE: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0), tl.program_id(1)
    o_b = tl.arange(0, BB)
    m = tl.load(p_position + o_b, mask=o_b < rows, other=-1)  # [BB]
    all_tokens = tl.maximum(m + 1 - band - first_page * PAGE, 0)
    all_pages = (all_tokens + PAGE - 1) // PAGE
    start = K * tl.sum(tl.where(o_b < i_row, all_pages, 0), 0)
    pages = tl.sum(tl.where(o_b == i_row, all_pages, 0), 0)
    if i_chunk == 0:
        tokens = tl.sum(tl.where(o_b == i_row, all_tokens, 0), 0)
        o_k = tl.arange(0, BK)
        tl.store(p_indptr + i_row * K + o_k, (start + o_k * pages).to(tl.int32), mask=o_k < K)
        last = tl.where(pages > 0, tokens - (pages - 1) * PAGE, 0)
        tl.store(
            p_last_page_len + i_row * K + o_k,
            (last + tl.zeros([BK], tl.int32)).to(tl.int32),
            mask=o_k < K,
        )
        if i_row == rows - 1:
            tl.store(p_indptr + rows * K, (start + K * pages).to(tl.int32))
    if i_chunk * BP < pages:
        o_p = i_chunk * BP + tl.arange(0, BP)
        o_row = i_row.to(tl.int64) * s_table_row
        page = tl.load(p_table + o_row + first_page + o_p, mask=o_p < pages, other=0)  # [BP]
        for i_k in range(K):
            p_page = p_indices + start.to(tl.int64) + i_k * pages + o_p
            tl.store(p_page, page * block_pages + i_k * head_pages, mask=o_p < pages)


@triton.jit
def _plan_kernel(
    p_position, p_hit, p_request_indices, p_kv_tile_indices, p_valid, p_indptr, p_chunk_size, p_total_rows,
    rows, first_token, band, capacity, slots, waves,
    K: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    TILE_COST: tl.constexpr, MIN_CHUNK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    o_b, o_k, o_c = tl.arange(0, BB), tl.arange(0, BK), tl.arange(0, 16)
    m_b = o_b < rows
    m_bk = m_b[:, None] & (o_k < K)[None, :]

    # How much there is to do: missed groups, their tokens, the longest of them.
    m = tl.load(p_position + o_b, mask=m_b, other=-1).to(tl.int32)  # [BB]
    tokens = tl.maximum(m + 1 - band - first_token, 0)
    hit = tl.load(p_hit + o_b[:, None] * K + o_k[None, :], mask=m_bk, other=1)  # [BB, BK]
    miss = ((hit == 0) & (tokens > 0)[:, None]).to(tl.int32)
    misses = tl.sum(miss, 1)  # [BB]
    count = tl.sum(misses, 0)
    work = tl.sum(misses.to(tl.float32) * tokens.to(tl.float32), 0)
    most = tl.max(tl.where(misses > 0, tokens, 0), 0)

    # Candidates: equal shares of the longest group, or of all work, that make 1, 2, ... full waves.
    wave = o_c % 8 + 1
    share = tl.maximum(slots * wave // tl.maximum(count, 1), 1)
    # A group's last tile is half empty on average.
    full = tl.maximum(slots * wave - 0.55 * count, 0.5 * slots * wave)
    chunks = tl.where(o_c < 8, (most + share - 1) // share, (work / full).to(tl.int32) + 1)
    chunks = tl.maximum((chunks + STEP - 1) // STEP * STEP, MIN_CHUNK)  # [16]
    each = (tokens[None, :] + chunks[:, None] - 1) // chunks[:, None]  # [16, BB]
    tiles = tl.sum(each * misses[None, :], 1)  # [16]
    # Tiles of one length run in waves; of many lengths, as a list that ends at most a tile late.
    slots_f, chunks_f = slots.to(tl.float32), chunks.to(tl.float32)
    time = ((tiles + slots - 1) // slots).to(tl.float32) * chunks_f
    time = tl.minimum(time, work / slots_f + chunks_f) + TILE_COST * tiles.to(tl.float32) / slots_f
    # Candidate 0 makes at most max(slots, count) tiles, which always fit.
    time = tl.where((tiles > capacity) | (wave > waves) & (o_c > 0), float("inf"), time)
    chunk = tl.min(tl.where(time == tl.min(time, 0), chunks, 2147483647), 0)

    parts = (tokens + chunk - 1) // chunk  # [BB] tiles of each missed group of a row
    ends = tl.cumsum(parts * misses, 0)  # [BB]
    starts = ends - parts * misses
    done = tl.sum(parts * misses, 0)
    i_p = tl.program_id(0)
    if i_p == 0:
        before = tl.cumsum(miss, 1) - miss  # [BB, BK]
        start = starts[:, None] + before * parts[:, None]
        tl.store(p_indptr + o_b[:, None] * K + o_k[None, :], start, mask=m_bk)
        tl.store(p_indptr + rows * K, done)
        tl.store(p_chunk_size, chunk)
        tl.store(p_total_rows, rows * K)

    # Each program fills its share of the tile list.
    o_t = i_p * TILES + tl.arange(0, TILES)
    m_t = o_t < done
    past = ends[None, :] <= o_t[:, None]  # [TILES, BB]
    row = tl.sum(past.to(tl.int32), 1)  # [TILES]
    rest = o_t - tl.max(tl.where(past, ends[None, :], 0), 1)
    m = tl.load(p_position + row, mask=m_t, other=-1).to(tl.int32)
    parts = tl.maximum((tl.maximum(m + 1 - band - first_token, 0) + chunk - 1) // chunk, 1)
    nth, tile = rest // parts, rest % parts  # [TILES]
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    hit = tl.load(p_hit + row[:, None] * K + o_k[None, :], mask=m_tk, other=1)  # [TILES, BK]
    upto = tl.cumsum((hit == 0).to(tl.int32), 1)
    k = tl.sum((upto <= nth[:, None]).to(tl.int32), 1)  # [TILES]
    tl.store(p_request_indices + o_t, row * K + k, mask=m_t)
    tl.store(p_kv_tile_indices + o_t, tile, mask=m_t)
    tl.store(p_valid + o_t, m_t.to(tl.int8), mask=o_t < capacity)


def capacity(groups: int, slots: int) -> int:
    """Tiles that a plan for so many virtual requests may have.

    slots: tiles the device runs at once. More waves of tiles even out the load, but every
    unused tile costs its launch, so small batches have few.
    """
    return max(_waves(groups, slots) * slots, groups)


def _waves(groups: int, slots: int) -> int:
    return min(max(-(-16 * groups // slots), 1), WAVES)


@dataclass(slots=True)
class Plan:
    """A work list in FlashInfer's format, in one int32 buffer. Offsets are in bytes.

    request_indices, kv_tile_indices: `[capacity]`, which request and which chunk of it a tile is.
    valid: `[capacity]` int8, 0 where the tile has nothing to do. indptr: `[B * K + 1]`, first tile
    of each request, which with one query row a request is both `o_indptr` and `merge_indptr`.
    chunk_size: `[1]` tokens. total_rows: `[1]`, `B * K`. qo_tile_indices: `[capacity]`, always 0.
    """

    request_indices: Tensor
    qo_tile_indices: Tensor
    kv_tile_indices: Tensor
    indptr: Tensor
    chunk_size: Tensor
    total_rows: Tensor
    valid: Tensor
    offset: dict[str, int]

    @classmethod
    def in_buffer(cls, buffer: Tensor, groups: int, tiles: int) -> "Plan":
        """A plan for up to `groups` requests and `tiles` tiles laid out in `buffer` (uint8)."""
        views, offset, at = {}, {}, 0
        sizes = {
            "request_indices": tiles,
            "qo_tile_indices": tiles,
            "kv_tile_indices": tiles,
            "indptr": groups + 1,
        }
        sizes |= {"chunk_size": 1, "total_rows": 1, "valid": tiles}
        for name, size in sizes.items():
            width = 1 if name == "valid" else 4
            offset[name] = at
            part = buffer[at : at + size * width]
            if part.numel() < size * width:
                raise ValueError(f"buffer: {buffer.numel()} bytes, a plan of {tiles} tiles needs more")
            views[name] = part.view(torch.int8 if name == "valid" else torch.int32).zero_()
            at += -(-size * width // 16) * 16
        return cls(**views, offset=offset)


def write_pages(
    rows: Rows, geometry: Geometry, indices: Tensor, indptr: Tensor, last_page_len: Tensor,
    block_pages: int, head_pages: int,
) -> None:  # fmt: skip
    """Page table of the virtual requests of the prefixes `[prefix_start, m+1-band)`.

    rows: position and block_table are read. Writes indices int32 (compact; room for `B * K * max_blocks`),
    indptr `[B * K + 1]` and last_page_len `[B * K]`.
    The virtual page of KV head `k` in page `p` is `p * block_pages + k * head_pages`.
    """
    g, table = geometry, rows.block_table
    count, chunk = rows.position.shape[0], 1024
    most = min(g.max_blocks, table.shape[1])
    _pages_kernel[(count, triton.cdiv(most, chunk))](
        table, rows.position, indices, indptr, last_page_len,
        count, g.prefix_start // g.page_size, g.band, table.stride(0), block_pages, head_pages,
        K=g.kv_heads, PAGE=g.page_size, BB=max(16, triton.next_power_of_2(count)),
        BK=triton.next_power_of_2(g.kv_heads), BP=chunk, num_warps=4,
    )  # fmt: skip


def write_plan(rows: Rows, geometry: Geometry, hit: Tensor, plan: Plan, slots: int, pdl: bool = False) -> None:
    """List the tiles of the missed requests, sized so that they fill the device evenly.

    rows: position is read. hit: `[B, K]` int32, contiguous. slots: tiles the device runs at once.
    """
    count, kv_heads = hit.shape
    tiles = capacity(hit.numel(), slots)
    width = max(16, triton.next_power_of_2(count))
    block = min(max(8192 // width, 16), 128)
    _plan_kernel[(triton.cdiv(tiles, block),)](
        rows.position, hit, plan.request_indices, plan.kv_tile_indices, plan.valid, plan.indptr,
        plan.chunk_size, plan.total_rows,
        count, geometry.prefix_start, geometry.band, tiles, slots, _waves(hit.numel(), slots),
        K=kv_heads, BB=width, BK=triton.next_power_of_2(kv_heads), TILES=block,
        TILE_COST=TILE_COST, MIN_CHUNK=MIN_CHUNK, STEP=CHUNK_STEP, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
