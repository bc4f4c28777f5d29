"""Assign: what each row of a batch may read in its ring, decided on the device.

`ring.RingTable.assign` is the oracle; this is the same decision, on the same tensors, in one
launch of one program.
"""

import triton
import triton.language as tl

FRESH, PREFILLING, SKIPS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # flags of a row


@triton.jit(
    # These change from step to step: none of them may compile the kernel anew.
    do_not_specialize=("rows", "padded"),
    do_not_specialize_on_alignment=("p_begin", "p_length", "p_ring", "p_flags", "p_out_position", "p_out_ring", "p_out_first"),
)  # fmt: skip
def _assign_kernel(
    p_first, p_last, p_begin, p_length, p_ring, p_flags, p_out_position, p_out_ring, p_out_first,
    rows, padded, W: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    o_b = tl.arange(0, BB)
    m_b = o_b < rows
    begin = tl.load(p_begin + o_b, mask=m_b, other=0)  # [BB]
    count = tl.load(p_begin + o_b + 1, mask=m_b, other=0) - begin
    length = tl.load(p_length + o_b, mask=m_b, other=0)
    start = length - count
    active = (count > 0) & (start >= 0)
    ring = tl.load(p_ring + o_b, mask=active, other=-1)
    flags = tl.load(p_flags + o_b, mask=active, other=0)
    m_ring = ring >= 0

    first = tl.load(p_first + ring, mask=m_ring, other=0).to(tl.int32)
    last = tl.load(p_last + ring, mask=m_ring, other=-1).to(tl.int32)
    continues = m_ring & (flags & FRESH == 0) & (last >= start - 1) & (last + 1 - W < start)
    first = tl.where(continues, tl.maximum(first, last + 1 - W), start)
    skips = flags & SKIPS != 0
    last = tl.where(continues, tl.maximum(last, length - 1), length - 1)
    last = tl.where(skips, start - 1, last)  # the next row begins past it
    tl.store(p_first + ring, first.to(tl.int64), mask=m_ring)
    tl.store(p_last + ring, last.to(tl.int64), mask=m_ring)

    m_out = o_b < padded
    tl.store(p_out_position + o_b, tl.where(active & (count == 1), length - 1, -1), mask=m_out)
    tl.store(p_out_ring + o_b, tl.where(skips, -1, ring), mask=m_out)
    tl.store(p_out_first + o_b, tl.where(m_ring & (flags & (PREFILLING | SKIPS) == 0), first, length), mask=m_out)


def assign(table, query_start_loc, seq_lens, rings, flags, position, ring, first):
    """Decide what each row of a batch may read in its ring, and update `table` with what the row will record.

    `table.assign` for vLLM's metadata on the device, with padding: `P >= B`
    elements of each output are written. One launch, without waiting for the device. Rows of no
    tokens or no length are padding, and have no effect. A table's last elements, which stand for rows
    without a ring, are left alone.

    Args:
        table: `ring.RingTable` on the device.
        query_start_loc: `[B + 1]` int32, first token of each row, never decreasing.
        seq_lens: `[B]` int32, sequence length after this step.
        rings: `[B]` int32, the ring of each row's request, -1 for none; no ring twice.
        flags: `[B]` int32, sum of `FRESH` (the ring was given in this step, with nothing in it),
            `PREFILLING` (a prefill row, which reads nothing) and `SKIPS` (neither reads nor records).
        position: `[P]` int32, written: the position decoded by a row of one token, else -1.
        ring: `[P]` int32, written: the ring that the row reads and records in, or -1.
        first: `[P]` int32, written: the oldest position of the ring that the row may read, its
            sequence length where that is none, and 0 past row `B`.

    Raises ValueError where the outputs, `rings` or `flags` have too few elements.
    """
    rows, padded = seq_lens.shape[0], position.shape[0]
    for name, tensor in (("position", position), ("rings", rings), ("flags", flags)):
        if tensor.shape[0] < rows:
            raise ValueError(f"{name}: {tensor.shape[0]} elements, choose at least as many as rows ({rows})")
    _assign_kernel[(1,)](
        table.first, table.last, query_start_loc, seq_lens, rings, flags, position, ring, first,
        rows, padded, W=table.window,
        # At least as many as threads: one variant for all small batches.
        BB=max(128, triton.next_power_of_2(padded)),
        num_warps=4 if padded <= 1024 else 8,
    )  # fmt: skip
