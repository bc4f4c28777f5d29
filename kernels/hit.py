"""One kernel for match, amend and complete of the KV groups that hit.

The programs of a (row, KV head) pair are independent of one another: some attend to the band
and the sink, the others each scan a part of one head's ring. Whichever arrives last reads what
all of them found, decides, attends to what the match left to read, merges and records. So the
step is one launch, and the last part of one group overlaps the first parts of the others.

`paged.decode` is the oracle.
"""

from dataclasses import dataclass, field

import torch

from vllm_mac.kernels.amend import LOG2_E
from vllm_mac.kernels.group import hit_kernel
from vllm_mac.kernels.registers import REGISTERS, launch, power_of_two

# How the kernel may be launched, by the registers that a thread is to have.
OPTIONS = {wanted: [{"maxnreg": limit} for limit in REGISTERS if limit >= wanted] for wanted in REGISTERS}
OPTIONS[None] = [{"maxnreg": None}]


@dataclass(slots=True)
class Workspace:
    """What one step leaves for its later kernels, and room to work in. Layers may share one.

    source: `[B, H]` int32, position matched by each head or -1. hit: `[B, K]` int32, 1 where all
    heads of the group matched. Rows whose position is -1 are not written.
    part_out: `[B, H, 2, D]` float32, part_lse: `[B, H, 2]` float32 natural log, of missed groups
    only: attention over `[sink, lo)`, `lo` being `sink` rounded up to a whole page, and over band
    and sink together. Not written for a row that is read whole and has no sink.
    whole: whether the engine for misses reads the bands of rows without a ring too, as
    `exact.TritonExact` does when it completes; what is left of such a row is its sink.
    key, key_lse, band_acc, band_sum: partial results of the programs of a group. arrived: `[B, K]` int32,
    programs of a group that are done; all 0 between steps.
    slots: programs that the device runs at once. pdl: launch the kernels before their predecessors
    end (programmatic dependent launch); they wait before they read. tune: overrides `_tune`.
    options: how each variant of the kernel is launched, see `registers.launch`.
    """

    source: torch.Tensor
    hit: torch.Tensor
    part_out: torch.Tensor
    part_lse: torch.Tensor
    key: torch.Tensor
    key_lse: torch.Tensor
    band_acc: torch.Tensor
    band_sum: torch.Tensor
    arrived: torch.Tensor
    whole: bool = False
    slots: int = 396
    pdl: bool = False
    tune: dict | None = None
    options: dict = field(default_factory=dict)

    MAX_SPLITS = 16
    MAX_BANDS = 8

    @classmethod
    def allocate(cls, rows: int, heads: int, kv_heads: int, head_size: int, device, whole: bool = False) -> "Workspace":
        """For batches of at most `rows` rows, padding included."""
        on = torch.device(device)

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=on)

        gpu = torch.cuda.get_device_properties(on) if on.type == "cuda" else None
        return cls(
            source=empty(rows, heads, dtype=torch.int32),
            hit=empty(rows, kv_heads, dtype=torch.int32),
            part_out=empty(rows, heads, 2, head_size),
            part_lse=empty(rows, heads, 2),
            key=empty(rows, heads, cls.MAX_SPLITS, dtype=torch.int64),
            key_lse=empty(rows, heads, cls.MAX_SPLITS),
            band_acc=empty(rows, heads, cls.MAX_BANDS, head_size),
            band_sum=empty(rows, heads, cls.MAX_BANDS, 2),
            arrived=torch.zeros(rows, kv_heads, dtype=torch.int32, device=on),
            whole=whole,
            slots=3 * gpu.multi_processor_count if gpu else 4,
            pdl=gpu is not None and gpu.major >= 9,
        )


def decode_hits(
    query,
    position,
    ring,
    first,
    slack,
    block_table,
    kv,
    store,
    config,
    scale,
    work,
    out,
    counters,
    cos_sin=None,
    is_neox=True,
    paused=None,
):
    """Match all heads; decode and record the KV groups that hit; prepare those that missed.

    Args:
        query: `[B, H, D]` bf16, fp16 or fp32, after RoPE; last dimension contiguous.
        position: `[B]` int32 or int64, position decoded; its KV is in the cache. -1: padding.
        ring, first: `[B]` int32 or int64, as `RingTable.assign` gives them; ring -1: none;
            `counters.OPTED_OUT`: none, and counted as such.
        slack: `[B]` float32, the most that `(1 - threshold)^2` may be in each row, 1 where the layer's own counts.
        block_table: `[B, *]` int32, last dimension contiguous.
        kv: `[blocks, K, BS, 2 D]` in query's dtype, any strides but 1 in the last dimension.
        store: the layer's rings (`ring.RingStore`), contiguous.
        config: window, band, sink, threshold, distance, min_context, lag_weight, reuse, max_chain,
            mass_floor. The threshold is not compiled in: layers may differ in it.
        scale: factor of the scores.
        work: room for `B` rows. Its `hit` and `source` are written, and
            `part_out` and `part_lse` of missed groups, for what completes them.
        out: `[B, H, D]` in query's dtype, last dimension contiguous; written for groups that hit.
        counters: `[len(Count)]` int64, added to: see `counters.Count`.
        cos_sin: `[positions, rotary_dim]`, `[cos | sin]`, or None for a layer without RoPE.
        is_neox: whether RoPE pairs `j` with `j + rotary_dim/2`, else `2j` with `2j + 1`.
        paused: `[1]` int32, nonzero while the layer is to be exact; None where it never is.
    """
    rows, heads, d = query.shape
    kv_heads, page = kv.shape[1], kv.shape[2]
    group, window = heads // kv_heads, store.query.shape[2]
    tune = work.tune or _tune(rows, heads, kv_heads, work.slots, d, window, store.query.dtype.itemsize)
    splits = max(1, min(tune["splits"], work.MAX_SPLITS, -(-window // 16)))
    bn = tune["bn"]
    tail = -(-(config.band + config.sink) // bn)
    bands = max(1, min(tune["bands"], work.MAX_BANDS, tail))
    span = -(-window // splits)
    relative = config.distance == "relative"
    # The limit of a summary without mass is so much looser, see `reference.relief`.
    relief = 1.0 if config.mass_floor is None else (1.0 + 1.0 / config.mass_floor) ** 2
    loosest = 2.0 * (1 if relative else d) * relief  # at threshold 0
    s_query, s_kv, s_out = query.stride(), kv.stride(), out.stride()
    pointers = dict(
        p_query=query, p_cos_sin=cos_sin, p_position=position, p_ring=ring, p_first=first, p_slack=slack,
        p_table=block_table, p_kv=kv,
        p_ring_query=store.query, p_ring_out=store.out, p_ring_lse=store.lse, p_ring_chain=store.chain,
        p_out=out, p_counters=counters, p_paused=paused,
    )  # fmt: skip
    sizes = dict(
        s_query_row=s_query[0], s_query_head=s_query[1],
        s_block=s_kv[0], s_head=s_kv[1], s_token=s_kv[2], s_out_row=s_out[0], s_out_head=s_out[1],
    )  # fmt: skip
    others = dict(
        p_source=work.source, p_hit=work.hit, p_key=work.key, p_key_lse=work.key_lse,
        p_band_acc=work.band_acc, p_band_sum=work.band_sum, p_part_out=work.part_out, p_part_lse=work.part_lse,
        p_arrived=work.arrived, s_table=block_table.stride(0),
        log2_scale=scale * LOG2_E.value, bound=loosest * (1.0 - config.threshold) ** 2, loosest=loosest,
        strict=1.0 / relief, lag_weight=config.lag_weight / relief, mass_floor=config.mass_floor or 0.0,
    )  # fmt: skip
    constants = dict(
        K=kv_heads, G=group, D=d, W=window, PAGE=page,
        BAND=config.band, SINK=config.sink, WHOLE=work.whole, MIN_CONTEXT=config.min_context,
        MAX_CHAIN=config.max_chain or 0,
        LAGGED=config.lag_weight > 0, RELATIVE=relative, ANCHORED=config.reuse == "anchored",
        WEIGHED=config.mass_floor is not None,
        ROTARY=0 if cos_sin is None else cos_sin.shape[-1], NEOX=is_neox,
        S=splits, BW=min(tune["bw"], power_of_two(span)), SPAN=span,
        HALVES=tune["halves"], SCAN_STAGES=tune["scan_stages"],
        NB=bands, BB=bn, CHUNK=-(-tail // bands) * bn, BT=tune["bt"],
        MP=max(16, power_of_two(group)), M=power_of_two(group),
        DP=power_of_two(d), SP=power_of_two(splits),
        TP=power_of_two(window // page + 2),
        BAND_STAGES=tune["stages"], NEAR_STAGES=tune["near_stages"],
        PDL=work.pdl, num_warps=tune["warps"], **({"launch_pdl": True} if work.pdl else {}),
    )  # fmt: skip
    grid = (bands + group * splits, kv_heads, rows)
    launch(hit_kernel, grid, pointers, sizes, others, constants, OPTIONS[tune["registers"]], work.options)


def _tune(rows: int, heads: int, kv_heads: int, slots: int, d: int, window: int, entry_bytes: int) -> dict:
    """How the work is split, as measured on an H200 with 32/8 and 32/4 heads, D 128, window 512.

    Small batches want many programs with little to do one after the other; large ones want the
    fewest instructions, and enough bytes in flight per program.

    splits, bands: programs per head's ring, and for band and sink. bw: ring entries at a time.
    bn, bt: tokens at a time, of band and sink and after the match. halves: see `match.scan`.
    scan_stages, stages, near_stages: depth of the software pipelines of the three loops.
    registers: per thread, if they are enough; None for what the compiler takes.
    """
    dp = power_of_two(d)
    # Up to `slots` programs run at once; a few more than that would cost as much as twice as many.
    splits = max(1, min(8, slots * 3 // 4 // (rows * heads)))
    splits = 1 << splits.bit_length() - 1
    bands = max(1, min(4, (slots - rows * heads * splits) // (rows * kv_heads)))
    group = heads // kv_heads
    # Where programs queue, a multiprocessor should hold a fourth one.
    tight = group > 8 or (rows * (heads * splits + kv_heads * bands) > slots and group & (group - 1) == 0)
    few, usual, most = REGISTERS
    tokens = 32 if dp > 128 else 64
    return {
        "splits": splits,
        "bands": bands,
        "bw": max(16, min(128, 16384 // (dp * entry_bytes))),
        "bn": tokens,
        "bt": tokens // 2,
        "halves": splits == 1 and dp >= 64,
        "scan_stages": 3 if window >= 256 * splits else 1,
        "stages": 2 if splits == 1 else 1,
        "near_stages": 3,
        "warps": 4 if group <= 8 else 8,
        "registers": most if dp > 128 else few if tight else usual,
    }
