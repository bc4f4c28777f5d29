"""With `rule: index`: what is not a finite number in one request's queries, keys or values stays in that request.

A broken computation of one request must change no other's answer, and leave nothing in blocks that others get later. A
prompt with such numbers must not teach the maps, which all requests are judged by.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from vllm.forward_context import get_forward_context

from support import engine as harness
from support.engine import Add, Limits
from support.index_engine import CONFIG, counts, layers, rest, set_tolerance
from support.indexed import Batch, Case
from support.scenarios import text
from vllm_mac import cpu
from vllm_mac.counters import Count
from vllm_mac.kernels.encode import encode
from vllm_mac.kernels.lookup import look_up
from vllm_mac.kernels.lookup_work import LookupWork
from vllm_mac.key_index import Lessons, Maps, Moments, learn

pytestmark = pytest.mark.cpu
NEW, BAD = 24, 1
PARTS = ("query", "key", "value")
NUMBERS = (math.nan, math.inf, -math.inf)


# Kernels and the oracle


def poisoned(part: str | None, number: float = 0.0) -> Batch:
    """Three rows, of which the second has some such numbers; indexed by the kernel with maps of the sound numbers."""
    batch = Batch(Case(lengths=(200, 330, 260), kv_heads=1, n=48))
    size = batch.case.d
    if part == "query":
        batch.query[BAD, :, 5] = number
    elif part is not None:
        columns = slice(0, size) if part == "key" else slice(size, None)
        for token in (3, 130, 240, 328):
            batch.kv[batch.table[BAD, token // 16], :, token % 16, columns] = number
    encode(batch.kv, torch.tensor([page * 16 + 15 for page in batch.complete]), batch.layout, batch.maps)
    return batch


def kernels(batch: Batch, work: LookupWork) -> torch.Tensor:
    out, counts = torch.full_like(batch.query, math.nan), torch.zeros(len(Count), dtype=torch.int64)
    look_up(batch.rows(), batch.query, batch.kv, batch.layout, batch.maps, batch.rule, work, (out, counts))
    return out


@pytest.mark.parametrize("number", NUMBERS[:2])
@pytest.mark.parametrize("part", PARTS)
def test_other_rows_are_as_they_were(part, number):
    """Bit for bit; and so is the next step, in the same buffers."""
    sound, broken = poisoned(None), poisoned(part, number)
    work = LookupWork.allocate(sound.geometry(), sound.layout.directions, torch.device("cpu"))
    want, found, again = kernels(sound, work), kernels(broken, work), kernels(sound, work)
    assert not found[BAD].isfinite().all() and want.isfinite().all()
    others = [row for row in range(3) if row != BAD]
    assert torch.equal(found[others], want[others]) and torch.equal(again, want)
    assert torch.equal(broken.decode().out[others], sound.decode().out[others])


# Maps


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("part", PARTS[:2])
def test_maps_are_not_made_of_such_numbers(part, number, ready):
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(80, 4, 32, generator=draw), torch.randn(2, 50, 32, generator=draw)
    maps = Maps.allocate(2, 32, 32, torch.float16, "cpu")
    assert not ready or learn([maps], [Moments.of(query, key)], making=True) == [True]
    before = {name: tensor.clone() for name, tensor in maps.own().items()}
    (query[3, 1] if part == "query" else key[1, 7])[5] = number
    for making in (False, True):
        assert learn([maps], [Moments.of(query, key)], making) == [False]
    for name, kept in before.items():
        assert torch.equal(maps.own()[name], kept), name


def test_maps_that_their_dtype_cannot_hold_are_not_made():
    """Of finite numbers: keys so small that float16 has no such map."""
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(80, 4, 32, generator=draw), torch.randn(2, 50, 32, generator=draw)
    maps = Maps.allocate(2, 32, 32, torch.float16, "cpu")
    assert learn([maps], [Moments.of(query, key * 1e-8)], making=True) == [False]
    assert not any(tensor.any() for tensor in maps.own().values())
    assert learn([maps], [Moments.of(query, key)], making=True) == [True]


# Engines


PROMPTS = {name: text(name, length) for name, length in {"a": 290, "bad": 410, "b": 333, "c": 170}.items()}
OTHERS = ("a", "b", "c")


@contextmanager
def broken(llm, part: str, number: float, layer: int = 1):
    """In one layer, the numbers of the request `bad`: of every 16th token of its prompt, and of all that it decodes."""
    runner, update, forward = (
        harness.worker(llm).model_runner,
        cpu.MacCPUImpl.do_kv_cache_update,
        cpu.MacCPUImpl.forward,
    )
    last = f"model.layers.{layer}."
    seen = []

    def spoil(impl, tensor):
        if not impl.mac.name.startswith(last):
            return tensor
        begin = get_forward_context().attn_metadata[impl.mac.name].query_start_loc.tolist()
        tensor = tensor.clone()
        for row, name in enumerate(runner.input_batch.req_ids):
            if name.rpartition("-")[0] == "bad":
                tensor[begin[row] : begin[row + 1] : 16] = number
                seen.append(name)
        return tensor

    def updated(impl, attention, key, value, *rest):
        key, value = (spoil(impl, x) if part == name else x for name, x in (("key", key), ("value", value)))
        return update(impl, attention, key, value, *rest)

    def forwarded(impl, attention, query, *rest, **scales):
        return forward(impl, attention, spoil(impl, query) if part == "query" else query, *rest, **scales)

    cpu.MacCPUImpl.do_kv_cache_update, cpu.MacCPUImpl.forward = updated, forwarded
    try:
        yield
        assert seen
    finally:
        cpu.MacCPUImpl.do_kv_cache_update, cpu.MacCPUImpl.forward = update, forward


def events(*names: str) -> list[Add]:
    return [Add(2 * i, name, PROMPTS[name], NEW) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def llm(model):
    config = {"mac": CONFIG | {"tolerance": 1.0}}
    with harness.engine(model, "v1", "MAC", config, chunk=1024, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm):
    """By tolerance, what the other requests say where no broken one is among them."""
    harness.run_schedule(llm, [Add(0, "teacher", text("teacher", 700), 2)])
    rest(llm)
    said = {}
    for tolerance in (1.0, 0.0):
        set_tolerance(llm, tolerance)
        said[tolerance] = harness.run_schedule(llm, events(*OTHERS)).tokens
    return said


@pytest.mark.parametrize("part, number", [
    ("query", math.nan), ("key", math.nan), ("key", math.inf), ("value", math.inf),
])  # fmt: skip
def test_no_other_request_is_touched(llm, alone, part, number):
    """Beside it, nor after it in its blocks."""
    for tolerance, want in alone.items():
        set_tolerance(llm, tolerance)
        with broken(llm, part, number):
            run = harness.run_schedule(llm, events("a", "bad", "b", "c"), Limits(blocks=48))
        assert run.batch == 4 and {name: run.tokens[name] for name in OTHERS} == want
        # So few blocks that each was the broken request's or is the next one's.
        again = harness.run_schedule(llm, events(*OTHERS), Limits(blocks=30))
        assert again.tokens == want
    assert all(tensor.isfinite().all() for layer in layers(llm) for tensor in layer.index.maps.own().values())


@pytest.mark.parametrize("part", PARTS[:2])
def test_a_broken_prompt_teaches_no_maps(model, monkeypatch, part):
    """Neither the first ones nor later ones; and it keeps no other prompt from teaching them."""
    said = []
    monkeypatch.setattr("vllm_mac.kv_group.logger.warning_once", said.append)
    config = {"mac": CONFIG | {"tolerance": 1.0}}
    with harness.engine(model, "v1", "MAC", config, chunk=1024) as llm:
        first, last = layers(llm)
        group = first.group
        with broken(llm, part, math.nan):
            harness.run_schedule(llm, events("bad"))
        assert said and "not finite numbers" in said[0]
        # The layer before it is sound, and so are its maps.
        assert first.index.maps.ready.item() and not last.index.maps.ready.item() and counts(llm)["NO_MAPS"] > 0
        assert group.lessons == Lessons()
        harness.run_schedule(llm, events("a"))
        assert last.index.maps.ready.item() and group.lessons.longest == len(PROMPTS["a"])
        before = {name: tensor.clone() for name, tensor in last.index.maps.own().items()}
        with broken(llm, part, math.inf):
            harness.run_schedule(llm, events("bad"))
        assert all(torch.equal(last.index.maps.own()[name], kept) for name, kept in before.items())
        assert group.lessons.longest == len(PROMPTS["a"]) and len(PROMPTS["bad"]) > 1.25 * len(PROMPTS["a"])
        harness.run_schedule(llm, [Add(0, "next", text("next", len(PROMPTS["bad"])), 2)])
        assert group.lessons.longest == len(PROMPTS["bad"]) and not torch.equal(
            last.index.maps.to_key, before["to_key"]
        )
