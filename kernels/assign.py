"""Assign: which ring each row of a batch uses in this step, decided on the device.

`ring.RingTable.assign` is the oracle; this is the same decision, on the same tensors, in one
launch of one program. Nothing is sorted and nothing allocated: a ring's rank is the number of
rings before it, and the outputs serve as room to work in.
"""

import triton
import triton.language as tl


@triton.jit(
    # These change from step to step: none of them may compile the kernel anew.
    do_not_specialize=("step", "rows", "padded", "tokens", "s_table"),
    do_not_specialize_on_alignment=(
        "p_begin", "p_length", "p_prefilling", "p_table", "p_slot", "p_row_request",
        "p_out_position", "p_out_ring", "p_out_first",
    ),
)  # fmt: skip
def _assign_kernel(
    p_owner, p_last, p_last_block, p_first, p_request, p_used,
    p_begin, p_length, p_prefilling, p_table, p_slot, p_row_request,
    p_out_position, p_out_ring, p_out_first,
    step, rows, padded, tokens, s_table,
    R: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, MIN_CONTEXT: tl.constexpr,
    IDLE: tl.constexpr, BB: tl.constexpr, LOG_BB: tl.constexpr, BT: tl.constexpr,
    BR: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    # A block may be written anew and shared within one step: forget whose it was.
    end = tl.minimum(tl.load(p_begin + rows), tokens)
    for i in range(0, end, BT):
        o_t = i + tl.arange(0, BT)
        slot = tl.load(p_slot + o_t, mask=o_t < end, other=-1).to(tl.int64)  # [BT]
        m_new = (slot >= 0) & (slot % PAGE == 0)
        tl.store(p_owner + slot // PAGE, tl.full((BT,), -1, tl.int64), mask=m_new)
    tl.debug_barrier()

    o_b = tl.arange(0, BB)
    m_b = o_b < rows
    begin = tl.load(p_begin + o_b, mask=m_b, other=0)  # [BB]
    count = tl.load(p_begin + o_b + 1, mask=m_b, other=0) - begin
    length = tl.load(p_length + o_b, mask=m_b, other=0)
    start = length - count
    active = (count > 0) & (start >= 0)
    if p_prefilling is None:
        prefilling = count > 1
    else:
        prefilling = tl.load(p_prefilling + o_b, mask=active, other=0) != 0
    if p_row_request is not None:
        request = tl.load(p_row_request + o_b, mask=active, other=-1).to(tl.int64)

    # The ring that wrote the row's previous token, if that was the ring's last one.
    p_row = p_table + o_b.to(tl.int64) * s_table
    ok = active & (start > 0)
    before = tl.load(p_row + (start - 1) // PAGE, mask=ok, other=0).to(tl.int64)
    here = tl.load(p_row + (length - 1) // PAGE, mask=active, other=0).to(tl.int64)
    ring = tl.load(p_owner + before, mask=ok, other=-1)  # [BB] int64
    ok = ok & (ring >= 0)
    ok = ok & (tl.load(p_last + ring, mask=ok, other=-1) == start - 1)
    ok = ok & (tl.load(p_last_block + ring, mask=ok, other=-1) == before)
    if p_row_request is not None:
        ok = ok & (tl.load(p_request + ring, mask=ok, other=-1) == request)

    # Of several such rows one that has lived before wins, then the earliest. The claims lie
    # above all steps; the winner of each ring overwrites its claim.
    claim = tl.full((BB,), 1 << 62, tl.int64) - o_b - tl.where(prefilling, BB, 0)
    tl.atomic_max(p_used + ring, claim, mask=ok, sem="relaxed")
    tl.debug_barrier()
    ok = ok & (tl.load(p_used + ring, mask=ok, other=0) == claim)
    tl.debug_barrier()
    now = tl.zeros((BB,), tl.int64) + step
    tl.store(p_used + ring, now, mask=ok)

    ring = tl.where(ok, ring, -1)
    wants = active & (ring < 0) & (length >= MIN_CONTEXT)
    wanted = tl.sum(wants.to(tl.int32), 0)
    if wanted > 0:
        tl.debug_barrier()
        # Longest unused first, then by number: the k-th ring goes to the k-th row.
        o_r = tl.arange(0, BR)
        used = tl.load(p_used + o_r, mask=o_r < R, other=1 << 40)  # [BR]
        free = used <= step - IDLE
        order = used * BR + o_r
        rank = tl.zeros((BR,), tl.int32)
        for j in range(0, R, BJ):
            o_j = j + tl.arange(0, BJ)
            other = tl.load(p_used + o_j, mask=o_j < R, other=1 << 40) * BR + o_j  # [BJ]
            rank += tl.sum((other[:, None] < order[None, :]).to(tl.int32), 0)
        tl.store(p_out_ring + rank, o_r, mask=free & (rank < wanted))
        tl.debug_barrier()
        nth = tl.cumsum(wants.to(tl.int32), 0) - 1
        m_fresh = wants & (nth < tl.sum(free.to(tl.int32), 0))
        fresh = tl.load(p_out_ring + nth, mask=m_fresh, other=-1).to(tl.int64)
        ring = tl.where(m_fresh, fresh, ring)
        tl.debug_barrier()

    m_ring = ring >= 0
    # What another sequence left in a fresh ring lies before `first`.
    first = tl.load(p_first + ring, mask=m_ring & ~wants, other=0)
    first = tl.where(wants, tl.maximum(length - WINDOW, start).to(tl.int64), first)
    tl.store(p_first + ring, first, mask=m_ring & wants)
    tl.store(p_last + ring, (length - 1).to(tl.int64), mask=m_ring)
    tl.store(p_last_block + ring, here, mask=m_ring)
    tl.store(p_used + ring, now, mask=m_ring)
    if p_row_request is not None:
        tl.store(p_request + ring, request, mask=m_ring)

    m_out = o_b < padded
    # A prompt is read exactly, also where its last chunk is a single token.
    seen = tl.where(m_ring & ~prefilling, first.to(tl.int32), length)
    tl.store(p_out_position + o_b, tl.where(active & (count == 1), length - 1, -1), mask=m_out)
    tl.store(p_out_ring + o_b, ring.to(tl.int32), mask=m_out)
    tl.store(p_out_first + o_b, seen, mask=m_out)
    tl.debug_barrier()

    for i in range(0, end, BT):
        o_t = i + tl.arange(0, BT)
        slot = tl.load(p_slot + o_t, mask=o_t < end, other=-1).to(tl.int64)
        row = tl.zeros((BT,), tl.int32)  # the last row that begins no later than the token
        for j in tl.static_range(0, LOG_BB):
            middle = row + (BB >> (j + 1))
            row_begin = tl.load(p_begin + middle, mask=middle < rows, other=0x7FFFFFFF)
            row = tl.where(row_begin <= o_t, middle, row)
        heir = tl.load(p_out_ring + row, mask=slot >= 0, other=-1).to(tl.int64)
        tl.store(p_owner + slot // PAGE, heir, mask=slot >= 0)


def assign(
    table, query_start_loc, seq_lens, prefilling, block_table, slot_mapping, request, position, ring, first
):  # fmt: skip
    """Give each row of a batch its ring, and record in `table` what this step will write.

    `table.assign` for metadata as vLLM has it on the device, with room for padding: `P >= B`
    elements of each output are written. One launch, without waiting for the device; not to be
    captured in a CUDA graph, since the step's number is an argument, which a replay would
    repeat. Rows of no tokens or no length are padding, and have no effect. Of a table's dummy elements only
    those that are ever read (`owner`, `last`, `request`) stay equal to the oracle's.

    Args:
        table: `ring.RingTable` on the device; counts the step.
        query_start_loc: `[B + 1]` int32, first token of each row, never decreasing. Tokens from
            the last element on are padding.
        seq_lens: `[B]` int32, sequence length after this step.
        prefilling: `[B]` bool, rows still reading their prompt; None: rows of several tokens.
            Elements of padded rows are not read, so those at the end may be missing.
        block_table: `[B, *]` int32, last dimension contiguous.
        slot_mapping: `[N]` int64, KV slot of each token (-1: none).
        request: `[B]` int32, the runner's index of the row's request, or None. As `prefilling`,
            elements of padded rows may be missing.
        position: `[P]` int32, written: the position decoded by a row of one token, else -1.
        ring: `[P]` int32, written: the row's ring, or -1.
        first: `[P]` int32, written: the oldest position of the ring that the row may read, its
            sequence length where it has no ring or is prefilling, and 0 past row `B`.
    """
    rows, padded = seq_lens.shape[0], position.shape[0]
    if padded < rows:
        raise ValueError(f"position: {padded} elements, choose at least as many as rows ({rows})")
    table.step += 1
    # Never fewer than threads: one compiled kernel serves all small batches.
    bb = max(128, triton.next_power_of_2(padded))
    br = max(128, triton.next_power_of_2(table.rings))
    _assign_kernel[(1,)](
        table.owner, table.last, table.last_block, table.first, table.request, table.used,
        query_start_loc, seq_lens, prefilling, block_table, slot_mapping, request,
        position, ring, first,
        table.step, rows, padded, slot_mapping.shape[0], block_table.stride(0),
        R=table.rings, PAGE=table.block_size, WINDOW=table.config.window,
        MIN_CONTEXT=table.config.min_context, IDLE=table.idle_steps,
        BB=bb, LOG_BB=bb.bit_length() - 1, BT=1024, BR=br, BJ=16,
        num_warps=4 if max(bb, br) <= 1024 else 8,
    )  # fmt: skip
