"""Triton kernels of a decode step on GPUs; they also run under Triton's interpreter on CPUs.

`hit.decode_hits` matches every head, decodes the KV groups that hit from start to finish, and
leaves for the groups that missed what does not depend on their prefix. `exact.TritonExact` reads the
prefix of those and finishes them (`complete.complete_group`); after FlashInfer `complete.complete_misses`
finishes them. `group` and `prefix` hold the kernels of `hit` and `exact`, `match` and `amend` device code of the two stages
whose names they bear, `registers` how the two are launched so that their threads have enough of them.

Letters: `B` rows, `H` query heads, `K` KV heads, `G = H / K`, `D` head size, `W` window, `R`
rings, `BS` page size. Kernel variables: `i_` index of a program, `o_` offsets of a block, `m_`
mask, `p_` pointer, `s_` stride. Positions are 0-based, intervals half-open. Every LSE is a
natural-log log-sum-exp of scaled scores.
"""
