"""Which row of a batch the maps of the index are learned from."""

import numpy as np
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_mac.key_index import LEAST_QUERIES, Lessons
from vllm_mac.requests import prompt_lengths
from vllm_mac.state import Learning

logger = init_logger("vllm.mac")


def choose(
    begin: np.ndarray, length: np.ndarray, prefilled: np.ndarray, block_table: Tensor, lessons: Lessons, least: int
) -> tuple[Learning | None, Lessons]:
    """The longest row that is worth it, or None; and what maps are learned from then.

    begin: `[B + 1]`, where each row's tokens begin. length: `[B]`, tokens of each row after this step. prefilled: `[B]`
    bool. lessons: what maps were learned from until now. least: tokens that a row must have.

    A row teaches once, in the last step that has queries enough of its prompt: earlier chunks do not know where its last
    keys lie. Once there are maps, most of its prompt must be new: one conversation, or many questions about one document,
    would be all the texts otherwise.
    """
    count, (prompt, cached) = np.diff(begin), prompt_lengths(len(length))
    place = prompt - LEAST_QUERIES  # that the step has to compute; of an unknown prompt any will do
    last = (length > place) & ((length - count <= place) | (prompt == 0))
    new = (2 * cached <= prompt) | (lessons.texts == 0)
    able = prefilled & last & new & (length >= least) & (count >= LEAST_QUERIES)
    if not able.any():
        return None, lessons
    row = int(np.where(able, length, 0).argmax())
    tokens = int(length[row])
    if not lessons.worth(tokens):
        return None, lessons.passing()
    return Learning(int(begin[row]), int(begin[row + 1]), tokens, block_table[row], lessons), lessons.after(tokens)


def of_batch(
    common: CommonAttentionMetadata, decodes: int, lessons: Lessons, least: int
) -> tuple[Learning | None, Lessons]:
    """`choose` among the rows behind the first `decodes`, of which the host knows the lengths."""
    begin, length = host_lengths(common)
    return choose(begin, length, np.arange(len(length)) >= decodes, common.block_table_tensor, lessons, least)


def host_lengths(common: CommonAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
    """`begin` and `length` of a batch as `choose` takes them, from what the host knows."""
    rows = common.num_reqs
    return common.query_start_loc_cpu.numpy()[: rows + 1], common.seq_lens_cpu_upper_bound.numpy()[:rows]


def warn_of_none(begin: np.ndarray, length: np.ndarray, rows: list[int], least: int) -> None:
    """Say once that nothing is estimated yet, where one of `rows` is long enough and computes too little to teach."""
    if any(length[row] >= least and begin[row + 1] - begin[row] < LEAST_QUERIES for row in rows):
        logger.warning_once(
            "MAC has no maps of the index yet, and a long prompt came out of a cache: maps are learned from a prompt "
            "of which %d tokens or more are computed here. Until then everything is read", LEAST_QUERIES,
        )  # fmt: skip
