"""With `rule: index`, two workers: each has half of the heads, or half of the layers, and maps of its own.

A KV head that workers cannot share out is in each of them, beside its own query heads.
"""

import functools

import pytest

from support import engine as harness
from support.engine import Add, mac_counters
from support.index_engine import CONFIG
from support.scenarios import text
from vllm_mac import maps_file

pytestmark = pytest.mark.cpu
NEW, LAYERS, HEADS = 12, 2, 8
EVENTS = [Add(3 * i, name, text(name, length), NEW) for i, (name, length) in enumerate({"a": 290, "b": 170}.items())]


@pytest.fixture(scope="module")
def exact(models):
    @functools.cache
    def tokens(name: str) -> dict[str, list[int]]:
        with harness.engine(models(name)) as llm:
            return harness.run_schedule(llm, EVENTS).tokens

    return tokens


TENSOR, PIPELINE = "tensor_parallel_size", "pipeline_parallel_size"


# Llama has two KV heads, Mistral one.
@pytest.mark.parametrize("split, name", [(TENSOR, "llama"), (PIPELINE, "llama"), (TENSOR, "mistral")])
def test_two_workers_say_what_one_says(models, exact, monkeypatch, tmp_path, split, name):
    """At tolerance 0. At another every worker's layers decode as the rule says of their own keys, in each step.

    Each keeps what its own layers have learned.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options = {split: 2, "distributed_executor_backend": "mp", "worker_extension_cls": "support.workers.Extension"}
    config = {"mac": CONFIG | {"tolerance": 0.0, "maps": str(tmp_path / "maps.safetensors")}}
    with harness.engine(models(name), "v1", "MAC", config, **options) as llm:
        llm.collective_rpc("make_room")
        assert harness.run_schedule(llm, EVENTS).tokens == exact(name)
        counted = mac_counters(llm)
        llm.collective_rpc("watch", args=(1.0,))
        harness.run_schedule(llm, EVENTS)
        watched, skipped = llm.collective_rpc("watched"), mac_counters(llm)["skipped"]
    rows = len(EVENTS) * (NEW - 1) * LAYERS
    assert counted["hit"] == rows * HEADS and counted["skipped"] == 0 < counted["read"]
    assert len(watched) == 2 and skipped > 0
    kept = [maps_file.read(maps_file.path_of(config["mac"]["maps"], rank, 2), models(name).name) for rank in range(2)]
    assert [len(one) for one in kept] == [LAYERS // (1 if split == TENSOR else 2)] * 2
    assert (kept[0].keys() == kept[1].keys()) == (split == TENSOR)
    own = rows if split == TENSOR else rows // 2
    for found in watched:
        assert found["looked"] == found["rows"] == own and found["pages"] > 0
        assert found["worst"] < 1e-4 and found["undecided"] <= own / 20
