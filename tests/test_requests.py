"""What a model runner's batches say to `RingOwners`, and which ring each row of a batch is given."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_mac import requests
from vllm_mac.config import MacConfig
from vllm_mac.counters import OPTED_OUT
from vllm_mac.owners import RingOwners

pytestmark = pytest.mark.cpu


def scheduled(new=(), going_on=(), tokens=None, resumed=(), finished=(), preempted=None, verifying=(), extra=None):
    """A scheduler's output. new: `(request, computed, blocks)`. going_on: the same, blocks None for none.
    extra: by request, what a client sent as vllm_xargs."""
    params = lambda request: SimpleNamespace(extra_args=(extra or {}).get(request))
    names, computed, blocks = zip(*going_on, strict=True) if going_on else ((), (), ())
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=r, num_computed_tokens=n, block_ids=b, sampling_params=params(r), prompt_token_ids=[1] * len(r),
                prompt_embeds=None,
            )
            for r, n, b in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(names), num_computed_tokens=list(computed), new_block_ids=list(blocks), resumed_req_ids=set(resumed)
        ),
        finished_req_ids=set(finished), preempted_req_ids=preempted, num_scheduled_tokens=tokens or {},
        scheduled_spec_decode_tokens={r: [0] for r in verifying},
    )  # fmt: skip


class Runner:
    """Rows in the order of `rows`: V1 keeps one `input_batch`, V2 makes one for each step."""

    def __init__(self, v2: bool, rings: int = 4, audits: bool = False):
        self.v2, self.rows = v2, []
        if not v2:
            self.input_batch = SimpleNamespace(req_ids=self.rows)
        # The second of three KV-cache groups is MAC's.
        settings = MacConfig(rule="match", audit=0.01 if audits else 0.0)
        requests._followed[self] = requests.Followed(RingOwners(rings, 8, (4,)), (1,), settings=settings)

    def step(self, rows: list[str], output, padding: int = 0) -> requests.RowRings:
        self.rows[:] = rows
        with requests._executing(self, output):
            assert requests.executing()
            if self.v2:
                requests._batch.inputs = SimpleNamespace(req_ids=rows)
            found = requests.row_rings(SimpleNamespace(num_reqs=len(rows) + padding))
        assert not requests.executing()
        return found


def blocks(*ids):
    return [99], list(ids), [98]


@pytest.mark.parametrize("v2", [False, True])
def test_each_row_has_the_ring_of_its_request(v2):
    runner = Runner(v2)
    new = [("a", 0, blocks(1, 2)), ("b", 0, blocks(3, 4)), ("short", 0, blocks(5))]
    first = runner.step(["b", "short", "a"], scheduled(new, tokens={"a": 8, "b": 8, "short": 4}), padding=2)
    b, none, a, *pads = first.ring.tolist()
    assert none == -1 and pads == [-1, -1] and sorted((a, b)) == [0, 1]
    assert first.fresh.tolist() == [True, False, True, False, False] and not first.skips.any()
    going_on = [("a", 8, blocks(6)), ("b", 8, None), ("short", 4, None)]
    second = runner.step(["a", "b", "short"], scheduled((), going_on, {"a": 1, "b": 1, "short": 4}))
    assert second.ring.tolist()[:2] == [a, b] and second.ring[2] not in (a, b, -1)
    assert second.fresh.tolist() == [False, False, True]
    assert requests.ring_states(runner) == {"active": 3, "idle": 0, "free": 1}


def test_rows_that_verify_speculated_tokens_skip_their_ring():
    runner = Runner(True)
    (ring,) = runner.step(["a"], scheduled([("a", 0, blocks(1, 2))], tokens={"a": 8})).ring
    found = runner.step(["a"], scheduled((), [("a", 8, None)], {"a": 3}, verifying=["a"]))
    assert found.ring.tolist() == [ring] and found.skips.tolist() == [True]


@pytest.mark.parametrize("v2", [False, True])
def test_what_resumes_arrives_anew(v2):
    """V2 names what is preempted and makes it a new request; V1 says of one that goes on that it was resumed."""
    runner = Runner(v2)
    (ring,) = runner.step(["a"], scheduled([("a", 0, blocks(1, 2, 3))], tokens={"a": 9})).ring
    if v2:
        output = scheduled([("a", 0, blocks(4, 5, 6))], tokens={"a": 9}, preempted={"a"})
    else:
        output = scheduled((), [("a", 0, blocks(4, 5, 6))], {"a": 9}, resumed=["a"])
    found = runner.step(["a"], output)
    assert found.fresh.tolist() == [True] and found.ring[0] != ring
    # Found in the cache, in the very blocks that it wrote: it has its ring again.
    if v2:
        output = scheduled([("a", 8, blocks(4, 5, 7))], tokens={"a": 1}, preempted={"a"})
    else:
        output = scheduled((), [("a", 8, blocks(4, 5, 7))], {"a": 1}, resumed=["a"])
    again = runner.step(["a"], output)
    assert again.ring.tolist() == found.ring.tolist() and again.fresh.tolist() == [False]


def test_a_ring_is_free_when_its_request_has_finished():
    runner = Runner(True, rings=1)
    assert runner.step(["a"], scheduled([("a", 0, blocks(1, 2))], tokens={"a": 8})).ring.tolist() == [0]
    output = scheduled([("b", 0, blocks(3, 4))], [("a", 8, None)], {"a": 1, "b": 8})
    assert runner.step(["a", "b"], output).ring.tolist() == [0, -1]
    assert runner.step(["b"], scheduled((), [("b", 8, None)], {"b": 1}, finished=["a"])).ring.tolist() == [0]


@pytest.mark.parametrize("ended", [{"finished": ["a"]}, {"preempted": {"a"}}])
def test_who_shares_all_of_an_ended_request_inherits_its_ring(ended):
    """The prefix ends in a block that the request was given as it grew."""
    runner = Runner(True)
    (ring,) = runner.step(["a"], scheduled([("a", 0, blocks(1, 2))], tokens={"a": 8})).ring
    runner.step(["a"], scheduled((), [("a", 8, blocks(3))], {"a": 4}))
    found = runner.step(["b"], scheduled([("b", 12, blocks(1, 2, 3, 4))], tokens={"b": 1}, **ended))
    assert found.ring.tolist() == [ring] and found.fresh.tolist() == [False]


@pytest.mark.parametrize("v2", [False, True])
def test_each_row_gets_what_its_request_asked_for(v2):
    runner = Runner(v2, audits=True)
    asked = {
        "off": {"mac": "off"}, "strict": {"mac_threshold": 0.75}, "audited": {"mac": "audit", "other": 1}, "on": {"mac": "on"},
    }  # fmt: skip
    names = ["plain", *asked]
    new = [(name, 0, blocks(3 * i, 3 * i + 1)) for i, name in enumerate(names, 1)]
    first = runner.step(names, scheduled(new, tokens=dict.fromkeys(names, 8), extra=asked), padding=1)
    assert first.ring[1] == OPTED_OUT and first.ring[5] == -1 and sorted(first.ring[[0, 2, 3, 4]]) == [0, 1, 2, 3]
    assert first.fresh.tolist() == [True, False, True, True, True, False]
    assert first.slack.tolist() == [1, 1, 0.0625, 1, 1, 1] and first.slack.dtype == np.float32
    assert first.audited.tolist() == [False, False, False, True, False, False]
    assert requests.ring_states(runner) == {"active": 4, "idle": 0, "free": 0}
    # As long as they run, in any order; those that verify speculated tokens too.
    order = names[::-1]
    output = scheduled((), [(name, 8, None) for name in order], dict.fromkeys(order, 1), verifying=["off"])
    second = runner.step(order, output)
    assert second.ring[3] == OPTED_OUT and not second.skips.any()
    assert second.slack.tolist() == [1, 1, 0.0625, 1, 1]
    assert second.audited.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("v2", [False, True])
def test_what_was_asked_for_outlasts_preemption_and_ends_with_the_request(v2):
    runner = Runner(v2)
    asked = {"a": {"mac": "off"}}
    first = runner.step(["a"], scheduled([("a", 0, blocks(1, 2))], tokens={"a": 8}, extra=asked))
    assert first.ring.tolist() == [OPTED_OUT]
    if v2:
        runner.step([], scheduled(preempted={"a"}))
        resumed = scheduled([("a", 0, blocks(4, 5, 6))], tokens={"a": 9}, extra=asked)
    else:
        resumed = scheduled((), [("a", 0, blocks(4, 5, 6))], {"a": 9}, resumed=["a"])
    assert runner.step(["a"], resumed).ring.tolist() == [OPTED_OUT]
    # The name may be used again in the very step that says that the request has finished.
    again = runner.step(["a"], scheduled([("a", 8, blocks(4, 5, 7))], tokens={"a": 1}, finished=["a"]))
    assert again.ring[0] >= 0 and again.fresh.tolist() == [True]  # no ring was recorded over those blocks
    runner.step([], scheduled(finished=["a"]))
    assert not requests._followed[runner].asks


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("connected", [False, True])
def test_rows_that_begin_with_computed_tokens_are_read_whole_where_a_connector_may_have_loaded_them(v2, connected):
    """Once: in their first step, and in the first after they were thrown out."""
    runner = Runner(v2)
    requests._followed[runner] = requests.Followed(None, (1,), begun=set() if connected else None)
    step = lambda *given, **named: runner.step(["a", "b"], scheduled(*given, **named))
    first = step([("a", 8, blocks(1, 2, 3)), ("b", 0, blocks(4))], tokens={"a": 1, "b": 4})
    second = step((), [("a", 9, None), ("b", 4, None)], {"a": 1, "b": 1})
    again, going_on = ("b", 4, blocks(5, 6)), ("a", 10, None)
    if v2:
        third = step([again], [going_on], {"a": 1, "b": 1}, preempted={"b"})
    else:
        third = step((), [going_on, again], {"a": 1, "b": 1}, resumed=["b"])
    begun = [found.begun.tolist() for found in (first, second, third)]
    assert begun == ([[True, False], [False, False], [False, True]] if connected else [[False, False]] * 3)
    for found in (first, second, third):
        assert found.ring.tolist() == [OPTED_OUT if one else -1 for one in found.begun]


def test_what_a_front_end_should_have_refused_is_decoded_exactly(monkeypatch):
    """Not every front end checks requests, and an exception here would end the engine for all of them."""
    said = []
    monkeypatch.setattr(requests.logger, "warning", lambda text, *args: said.append(text % args))
    runner = Runner(True)
    new = [("a", 0, blocks(1, 2)), ("b", 0, blocks(3, 4))]
    found = runner.step(["a", "b"], scheduled(new, tokens={"a": 8, "b": 8}, extra={"a": {"mac": "offf"}}))
    assert found.ring.tolist() == [OPTED_OUT, 0]
    assert len(said) == 1 and "MAC decodes request a exactly" in said[0] and "'offf'" in said[0]


def test_a_publisher_that_fails_ends_no_batch(monkeypatch):
    said = []
    monkeypatch.setattr(requests.logger, "exception", said.append)

    def fail(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    runner = Runner(True)
    layer = requests._followed[runner].layer = SimpleNamespace(publisher=SimpleNamespace(after_batch=fail))
    for length in (0, 8):
        new, going_on = ([("a", 0, blocks(1, 2))], ()) if not length else ((), [("a", 8, None)])
        assert runner.step(["a"], scheduled(new, going_on, {"a": 8 if not length else 1})).ring.tolist() == [0]
    assert layer.publisher is None and len(said) == 1


def test_a_request_that_opted_out_takes_over_no_ring_and_lends_none():
    runner = Runner(True, rings=1)
    (ring,) = runner.step(["a"], scheduled([("a", 0, blocks(1, 2))], tokens={"a": 8})).ring
    new = [("b", 8, blocks(1, 2, 3))]
    off = {"b": {"mac": "off"}}
    assert runner.step(["b"], scheduled(new, tokens={"b": 4}, finished=["a"], extra=off)).ring.tolist() == [OPTED_OUT]
    assert requests.ring_states(runner) == {"active": 0, "idle": 1, "free": 0}
    # Of a's blocks, a's ring; of those that b wrote, none.
    found = runner.step(["c"], scheduled([("c", 12, blocks(1, 2, 3, 4))], tokens={"c": 1}, finished=["b"]))
    assert found.ring.tolist() == [ring] and found.fresh.tolist() == [True]
    assert not requests._followed[runner].asks


def test_owners_are_of_the_kv_cache_groups_that_hold_a_served_layer(monkeypatch):
    """Each with the size of its own blocks; as many batches may be in flight as a pipeline has stages."""
    config, state = SimpleNamespace(min_context=8), SimpleNamespace(store=SimpleNamespace(rings=3))
    layer = lambda name, served: SimpleNamespace(
        name=name, served=served, state=state, index=None, config=config, audited=None
    )
    group = lambda size, *names: SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=size), layer_names=names)
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=2), kv_transfer_config=None),
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[group(96, "state"), group(16, "exact"), group(4, "a"), group(8, "b", "exact too")]
        ),
    )
    found = [layer("exact", False), layer("a", True), layer("exact too", False), layer("b", True)]
    monkeypatch.setattr(requests, "mac_layers", lambda _: found)
    made = requests._make(runner)
    owners = made.owners
    assert made.groups == (2, 3) and owners.block_sizes == (4, 8)
    assert (owners.rings, owners.min_context, owners.idle_steps) == (3, 8, 2)
    found[1].served = found[3].served = False
    assert requests._make(runner).owners is None
    runner.vllm_config.kv_transfer_config = SimpleNamespace(is_kv_transfer_instance=True)
    found[1].served = True
    assert made.begun is None and requests._make(runner).begun == set()
    found.clear()
    assert requests._make(runner) is None


def test_each_row_has_the_length_of_its_prompt():
    """And what of it was there at first; while its request runs: one that finished is forgotten."""
    found, runner = [], Runner(v2=False)
    for rows, output in (
        (["a", "bcd"], scheduled([("bcd", 2, blocks(1)), ("a", 0, blocks(2))])),
        (["bcd"], scheduled([], [("bcd", 3, None)], finished=["a"])),
    ):
        runner.rows[:] = rows
        with requests._executing(runner, output):
            found.append([one.tolist() for one in requests.prompt_lengths(3)])
    assert found == [[[1, 3, 0], [0, 2, 0]], [[3, 0, 0], [2, 0, 0]]]
    assert list(requests._followed[runner].prompts) == ["bcd"]
    assert [one.tolist() for one in requests.prompt_lengths(2)] == [[0, 0], [0, 0]]


def test_dummy_batches_have_no_requests(monkeypatch):
    """Profiling, graph capture, and the batches that keep data-parallel ranks in step."""
    seen, rings = [], []

    class GPUModelRunner:
        vllm_config = None

        def prepare_inputs(self, names):
            return SimpleNamespace(req_ids=names)

        def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False):
            seen.append(requests.executing())
            assert self.prepare_inputs(["a"]).req_ids == ["a"]
            rings.append(requests.row_rings(SimpleNamespace(num_reqs=1)).ring.tolist())

    monkeypatch.setattr(
        requests.importlib, "import_module", lambda name: SimpleNamespace(GPUModelRunner=GPUModelRunner)
    )
    for _ in range(2):  # each layer asks for it
        requests.follow(SimpleNamespace(use_v2_model_runner=True))
    assert not hasattr(GPUModelRunner.execute_model.__wrapped__, "followed_by_mac")  # wrapped once
    runner = GPUModelRunner()
    requests._followed[runner] = requests.Followed(RingOwners(1, 8, (4,)), (1,))
    runner.execute_model(scheduled(), None, True)
    runner.execute_model(scheduled(), dummy_run=True)
    runner.execute_model(scheduled([("a", 0, blocks(1, 2))], tokens={"a": 8}))
    going_on = scheduled((), [("a", 8, None)], {"a": 1})
    runner.execute_model(scheduler_output=going_on, intermediate_tensors=None)
    assert seen == [False, False, True, True] and rings == [[-1], [-1], [0], [0]]
    rows = requests.row_rings(SimpleNamespace(num_reqs=3))
    assert rows.ring.tolist() == [-1] * 3 and not rows.fresh.any() and not rows.skips.any()
