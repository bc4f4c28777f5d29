"""Which row of a batch the maps of the index are learned from."""

import numpy as np
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_mac.key_index import LEAST_QUERIES, worth_learning
from vllm_mac.state import Learning


def choose(
    begin: np.ndarray, length: np.ndarray, prefilled: np.ndarray, block_table: Tensor, learned: int, least: int
) -> Learning | None:
    """The longest row that is worth it, or None.

    begin: `[B + 1]`, where each row's tokens begin. length: `[B]`, tokens of each row after this step. prefilled: `[B]`
    bool. learned: tokens of the row that maps were learned from, 0 for none. least: tokens that a row must have.
    """
    # Without those that have too few tokens in this step: they would hide a shorter row that has enough.
    rows = np.flatnonzero(prefilled & (length >= least) & (np.diff(begin) >= LEAST_QUERIES))
    if not len(rows):
        return None
    row = int(rows[np.argmax(length[rows])])
    first, end, tokens = int(begin[row]), int(begin[row + 1]), int(length[row])
    if not worth_learning(tokens, end - first, learned):
        return None
    return Learning(first, end, tokens, block_table[row])


def of_batch(common: CommonAttentionMetadata, decodes: int, learned: int, least: int) -> Learning | None:
    """`choose` among the rows behind the first `decodes`, of which the host knows the lengths."""
    rows = common.num_reqs
    begin = common.query_start_loc_cpu.numpy()[: rows + 1]
    length = common.seq_lens_cpu_upper_bound.numpy()[:rows]
    return choose(begin, length, np.arange(rows) >= decodes, common.block_table_tensor, learned, least)
