"""Triton kernels of a decode step on GPUs; they also run under Triton's interpreter on CPUs.

A kernel is in one file with its launcher: `assign`, `record`, `hit`, `exact`, `complete`, `audit`, `plan`. Device
functions are in others: `match`, `amend`, `merge`, `partial`, `split_kv`, `entry`. `launch` is what launchers share.

Every kernel keeps to the same names.

Prefixes:

    p_      pointer, or block of pointers
    s_      stride in elements: `s_query_row`, `s_kv_page`
    i_      index: of a program, a row, a head
    o_      block of indices: `o_d` in the head size, `o_g` in a group's heads
    m_      block of booleans, for masks: `m_d` is `o_d < D`, `m_gd` masks `[BG, BD]`. `m` alone is a position

Other values have plain names. Each loaded block has a comment with its shape.

Dimensions, in docstrings and as constexprs:

    B       rows of a batch               D       head size
    H       query heads                   W       window: entries of a ring
    K       KV heads                      R       rings
    G       `H / K`, heads of a KV group  PAGE    tokens of a KV page
    NS, NB  programs that scan a head's ring; that attend to a group's band and sink

Constexprs are upper case. A name with `B` before a dimension is a block of it, mostly a power of two:

    BB, BK, BBK  all rows; all KV heads; all (row, KV head) pairs
    BG, BQ       heads of a group; the same, at least the 16 rows that `tl.dot` takes, in `lookup` at least 8
    BR           there BQ, at least 16
    BD, BC       head size; part of it that a scan loads at once
    BW           ring entries loaded at once
    BN, BT       tokens loaded at once; in the amendment of `hit`. In `lookup` BN is half the directions of the index
    BP           columns of the block table loaded at once
    BNS, BE      programs that scan a ring; edges of a histogram

Positions are 0-based, intervals half-open. `m` is the position decoded, `p` that of a ring entry, in slot `p % W`.

Scores are scaled and in base 2: `log2_scale` is the layer's scale times `log2 e`, and weights are `exp2(score - peak)`.

An LSE named `lse` is a natural-log log-sum-exp of scaled scores: in rings, and in `hit.Workspace`. One named `lse2` is
its base-2 counterpart: what a miss engine gives for a prefix, FlashInfer and `exact` alike.
"""
