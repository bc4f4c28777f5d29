"""What a model runner's batches say to `RingOwners`, and which ring each row of a batch is given."""

from types import SimpleNamespace

import pytest

from vllm_mac import requests
from vllm_mac.owners import RingOwners

pytestmark = pytest.mark.cpu


def scheduled(new=(), going_on=(), tokens=None, resumed=(), finished=(), preempted=None, verifying=()):
    """A scheduler's output. new: `(request, computed, blocks)`. going_on: the same, blocks None for none."""
    names, computed, blocks = zip(*going_on, strict=True) if going_on else ((), (), ())
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=r, num_computed_tokens=n, block_ids=b) for r, n, b in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(names), num_computed_tokens=list(computed), new_block_ids=list(blocks), resumed_req_ids=set(resumed)
        ),
        finished_req_ids=set(finished), preempted_req_ids=preempted, num_scheduled_tokens=tokens or {},
        scheduled_spec_decode_tokens={r: [0] for r in verifying},
    )  # fmt: skip


class Runner:
    """Rows in the order of `rows`: V1 keeps one `input_batch`, V2 makes one for each step."""

    def __init__(self, v2: bool, rings: int = 4):
        self.v2, self.rows = v2, []
        if not v2:
            self.input_batch = SimpleNamespace(req_ids=self.rows)
        # The second of three KV-cache groups is MAC's.
        requests._followed[self] = requests.Followed(RingOwners(rings, 8, (4,)), (1,))

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

    monkeypatch.setattr(requests.importlib, "import_module", lambda name: SimpleNamespace(GPUModelRunner=GPUModelRunner))
    for _ in range(2):  # each layer asks for it
        requests.follow(SimpleNamespace(use_v2_model_runner=True))
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
