"""FlashInfer's inputs for missed groups, written on the device: page table and work list.

FlashInfer sees one virtual request per (row, KV head): request `b * K + k` has the group's `G`
query heads, one KV head, and virtual pages that are the pages of that head alone. `write_pages`
fills its page table once a step. `write_plan` fills, once a layer, the work list that
FlashInfer's own planner would otherwise compute on the host, with the missed requests only.

Letters: `B` rows, `K` KV heads, `G` query heads of a KV head, `R = B * K` virtual requests.
Variables: `i_` index, `o_` offsets of a block, `b_` block in registers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Chunk sizes are compared as: tokens of the busiest slot plus this much for each tile started.
TILE_COST = 128
MIN_CHUNK = 128
CHUNK_STEP = 64
WAVES = 4


@triton.jit(do_not_specialize=("stride_table", "block_pages", "head_pages"))
def _pages_kernel(
    block_table, position, indices, indptr, last_page_len,
    rows, first_page, band, stride_table, block_pages, head_pages,
    K: tl.constexpr, PAGE: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i_b, i_c = tl.program_id(0), tl.program_id(1)
    o_b = tl.arange(0, BB)
    b_m = tl.load(position + o_b, mask=o_b < rows, other=-1)  # [BB]
    b_tokens = tl.maximum(b_m + 1 - band - first_page * PAGE, 0)
    b_pages = (b_tokens + PAGE - 1) // PAGE
    start = K * tl.sum(tl.where(o_b < i_b, b_pages, 0), 0)
    pages = tl.sum(tl.where(o_b == i_b, b_pages, 0), 0)
    if i_c == 0:
        tokens = tl.sum(tl.where(o_b == i_b, b_tokens, 0), 0)
        o_k = tl.arange(0, BK)
        tl.store(indptr + i_b * K + o_k, (start + o_k * pages).to(tl.int32), mask=o_k < K)
        last = tl.where(pages > 0, tokens - (pages - 1) * PAGE, 0)
        tl.store(
            last_page_len + i_b * K + o_k,
            (last + tl.zeros([BK], tl.int32)).to(tl.int32),
            mask=o_k < K,
        )
        if i_b == rows - 1:
            tl.store(indptr + rows * K, (start + K * pages).to(tl.int32))
    if i_c * BP < pages:
        o_p = i_c * BP + tl.arange(0, BP)
        row = i_b.to(tl.int64) * stride_table
        b_page = tl.load(block_table + row + first_page + o_p, mask=o_p < pages, other=0)  # [BP]
        for i_k in range(K):
            at = indices + start.to(tl.int64) + i_k * pages + o_p
            tl.store(at, b_page * block_pages + i_k * head_pages, mask=o_p < pages)


@triton.jit
def _plan_kernel(
    position, hit, request_indices, kv_tile_indices, valid, indptr, chunk_size, total_rows,
    rows, first_token, band, capacity, slots, waves,
    K: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    TILE_COST: tl.constexpr, MIN_CHUNK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    o_b, o_k, o_c = tl.arange(0, BB), tl.arange(0, BK), tl.arange(0, 16)
    m_b = o_b < rows
    m_bk = m_b[:, None] & (o_k < K)[None, :]

    # How much there is to do: missed groups, their tokens, the longest of them.
    b_m = tl.load(position + o_b, mask=m_b, other=-1).to(tl.int32)  # [BB]
    b_n = tl.maximum(b_m + 1 - band - first_token, 0)
    b_hit = tl.load(hit + o_b[:, None] * K + o_k[None, :], mask=m_bk, other=1)  # [BB, BK]
    b_miss = ((b_hit == 0) & (b_n > 0)[:, None]).to(tl.int32)
    b_count = tl.sum(b_miss, 1)  # [BB]
    count = tl.sum(b_count, 0)
    work = tl.sum(b_count.to(tl.float32) * b_n.to(tl.float32), 0)
    most = tl.max(tl.where(b_count > 0, b_n, 0), 0)

    # Candidates: equal shares of the longest group, or of all work, that make 1, 2, ... full waves.
    b_wave = o_c % 8 + 1
    b_share = tl.maximum(slots * b_wave // tl.maximum(count, 1), 1)
    # A group's last tile is half empty on average.
    b_full = tl.maximum(slots * b_wave - 0.55 * count, 0.5 * slots * b_wave)
    b_chunk = tl.where(o_c < 8, (most + b_share - 1) // b_share, (work / b_full).to(tl.int32) + 1)
    b_chunk = tl.maximum((b_chunk + STEP - 1) // STEP * STEP, MIN_CHUNK)  # [16]
    b_each = (b_n[None, :] + b_chunk[:, None] - 1) // b_chunk[:, None]  # [16, BB]
    b_tiles = tl.sum(b_each * b_count[None, :], 1)  # [16]
    # Tiles of one length run in waves; of many lengths, as a list that ends at most a tile late.
    f_slots, f_chunk = slots.to(tl.float32), b_chunk.to(tl.float32)
    b_time = ((b_tiles + slots - 1) // slots).to(tl.float32) * f_chunk
    b_time = tl.minimum(b_time, work / f_slots + f_chunk) + TILE_COST * b_tiles.to(tl.float32) / f_slots
    # Candidate 0 makes at most max(slots, count) tiles, which always fit.
    b_time = tl.where((b_tiles > capacity) | (b_wave > waves) & (o_c > 0), float("inf"), b_time)
    chunk = tl.min(tl.where(b_time == tl.min(b_time, 0), b_chunk, 2147483647), 0)

    b_parts = (b_n + chunk - 1) // chunk  # [BB] tiles of each missed group of a row
    b_end = tl.cumsum(b_parts * b_count, 0)  # [BB]
    b_start = b_end - b_parts * b_count
    done = tl.sum(b_parts * b_count, 0)
    i_t = tl.program_id(0)
    if i_t == 0:
        b_before = tl.cumsum(b_miss, 1) - b_miss  # [BB, BK]
        b_at = b_start[:, None] + b_before * b_parts[:, None]
        tl.store(indptr + o_b[:, None] * K + o_k[None, :], b_at, mask=m_bk)
        tl.store(indptr + rows * K, done)
        tl.store(chunk_size, chunk)
        tl.store(total_rows, rows * K)

    # Each program fills its share of the tile list.
    o_t = i_t * BT + tl.arange(0, BT)
    used = o_t < done
    b_past = b_end[None, :] <= o_t[:, None]  # [BT, BB]
    b_row = tl.sum(b_past.to(tl.int32), 1)  # [BT]
    b_rest = o_t - tl.max(tl.where(b_past, b_end[None, :], 0), 1)
    b_m = tl.load(position + b_row, mask=used, other=-1).to(tl.int32)
    b_parts = tl.maximum((tl.maximum(b_m + 1 - band - first_token, 0) + chunk - 1) // chunk, 1)
    b_nth, b_tile = b_rest // b_parts, b_rest % b_parts  # [BT]
    m_tk = used[:, None] & (o_k < K)[None, :]
    b_hit = tl.load(hit + b_row[:, None] * K + o_k[None, :], mask=m_tk, other=1)  # [BT, BK]
    b_upto = tl.cumsum((b_hit == 0).to(tl.int32), 1)
    b_k = tl.sum((b_upto <= b_nth[:, None]).to(tl.int32), 1)  # [BT]
    tl.store(request_indices + o_t, b_row * K + b_k, mask=used)
    tl.store(kv_tile_indices + o_t, b_tile, mask=used)
    tl.store(valid + o_t, used.to(tl.int8), mask=o_t < capacity)


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
    valid: `[capacity]` int8, 0 where the tile has nothing to do. indptr: `[R + 1]`, first tile
    of each request, which with one query row a request is both `o_indptr` and `merge_indptr`.
    chunk_size: `[1]` tokens. total_rows: `[1]`, `R`. qo_tile_indices: `[capacity]`, always 0.
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
    block_table: Tensor, position: Tensor, indices: Tensor, indptr: Tensor, last_page_len: Tensor,
    kv_heads: int, page_size: int, first_page: int, band: int, max_blocks: int,
    block_pages: int, head_pages: int,
) -> None:  # fmt: skip
    """Page table of the virtual requests of the prefixes `[first_page * page_size, m+1-band)`.

    block_table: `[B, *]` int32; position: `[B]`, -1 for a padded row. Writes indices int32
    (compact; room for `B * K * max_blocks`), indptr `[B * K + 1]` and last_page_len `[B * K]`.
    The virtual page of KV head `k` in page `p` is `p * block_pages + k * head_pages`.
    """
    rows, chunk = position.shape[0], 1024
    _pages_kernel[(rows, triton.cdiv(max_blocks, chunk))](
        block_table, position, indices, indptr, last_page_len,
        rows, first_page, band, block_table.stride(0), block_pages, head_pages,
        K=kv_heads, PAGE=page_size, BB=max(16, triton.next_power_of_2(rows)),
        BK=triton.next_power_of_2(kv_heads), BP=chunk, num_warps=4,
    )  # fmt: skip


def write_plan(
    position: Tensor,
    hit: Tensor,
    plan: Plan,
    first_token: int,
    band: int,
    slots: int,
    pdl: bool = False,
) -> None:
    """List the tiles of the missed requests, sized so that they fill the device evenly.

    position: `[B]`; hit: `[B, K]` int32, contiguous. slots: tiles the device runs at once.
    """
    rows, kv_heads = hit.shape
    tiles = capacity(hit.numel(), slots)
    width = max(16, triton.next_power_of_2(rows))
    block = min(max(8192 // width, 16), 128)
    _plan_kernel[(triton.cdiv(tiles, block),)](
        position, hit, plan.request_indices, plan.kv_tile_indices, plan.valid, plan.indptr,
        plan.chunk_size, plan.total_rows,
        rows, first_token, band, tiles, slots, _waves(hit.numel(), slots),
        K=kv_heads, BB=width, BK=triton.next_power_of_2(kv_heads), BT=block,
        TILE_COST=TILE_COST, MIN_CHUNK=MIN_CHUNK, STEP=CHUNK_STEP, PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
