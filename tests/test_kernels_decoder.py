"""The hit kernel and the engine that reads the prefixes of misses, one after the other."""

import pytest
import torch

from support.hit_batches import FP32, Batch, Case, close, config, observed, two_stages
from vllm_mac.counters import Count


def test_a_decoder_takes_each_layer_s_own_threshold(device):
    """One decoder, made with one configuration, serves layers whose thresholds differ."""
    lengths = (200, 190)
    fresh = dict.fromkeys(range(2), 31)  # without the entry whose slot the first step overwrites
    batch = Batch(Case(lengths, "all", rotary=0, fresh=fresh), config(miss_engine="triton", audit=0.0), device)
    decoder = batch.decoder()
    rows = decoder.rows(batch.table)
    for threshold, hits in ((1.0, 0), (0.45, 16)):
        own = batch.config = config(threshold=threshold)
        steps, _ = batch.oracle()
        rough, _ = batch.oracle(FP32)
        batch.counters.zero_()
        decoder.begin_step(rows, batch.kv)
        decoder.decode(batch.layer(config=own), rows, batch.query, batch.kv, batch.out)
        assert batch.counters[Count.HIT] == hits
        for (i, k), step in steps.items():
            heads = slice(4 * k, 4 * k + 4)
            close(batch.out[i, heads], step.out, rough[i, k].out, torch.finfo(FP32).eps)


@pytest.mark.parametrize("sink", [0, 5, 40])
@pytest.mark.parametrize("group", [1, 4])
def test_rows_without_a_ring_are_read_in_one_go(sink, group, device):
    """The miss engine reads their band as well, whatever their length, beside rows that have a ring."""
    lengths = (1, 20, 90, 200, 190, 0, 47, 140)
    case = Case(lengths, "mixed", rotary=0, group=group, ringless=(0, 1, 2, 4, 6), dtype=FP32)
    batch = Batch(case, config(miss_engine="triton", audit=0.0, sink=sink), device)
    heads = 2 * group
    decoder = batch.decoder()
    rows = decoder.rows(batch.table)
    steps, _ = batch.oracle()
    rough, _ = batch.oracle(FP32)
    for name in ("part_out", "part_lse", "band_acc", "band_sum"):
        getattr(decoder._work, name).fill_(torch.nan)
    decoder.begin_step(rows, batch.kv)
    decoder.decode(batch.layer(), rows, batch.query, batch.kv, batch.out)
    without = [i for i, n in enumerate(lengths) if i in case.ringless and n]
    if not sink:  # else the hit path left it
        assert decoder._work.part_lse[without].isnan().all()
    for (i, k), step in steps.items():
        own = slice(group * k, group * (k + 1))
        close(batch.out[i, own], step.out, rough[i, k].out, torch.finfo(FP32).eps)
    counted = dict(zip(Count, batch.counters.tolist(), strict=True))
    short = sum(lengths[i] < batch.config.min_context for i in without)
    assert counted[Count.SHORT_CONTEXT] - heads * short == heads * sum(
        n and n < batch.config.min_context for i, n in enumerate(lengths) if i not in without
    )
    assert counted[Count.NO_RING] == heads * (len(without) - short)
    assert counted[Count.READ] + counted[Count.SKIPPED] == 2 * sum(lengths)


def test_a_group_in_many_parts_is_completed_once(device):
    """Its parts are merged in two stages, and only then is it complete; see `two_stages` of `hit_batches`."""
    fresh = {1: 31}  # without the entry whose slot the first step overwrites
    batch = Batch(Case(lengths=(0, 720), pattern="none", kv_heads=1, fresh=fresh), config(), device)
    batch._engine = two_stages(batch.engine().geometry, device)
    for _ in range(2):
        assert observed(batch.check()) == "none"
