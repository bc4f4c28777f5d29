"""Counters on their way from a worker to whoever reads them: files, adding up, the collector, the line in the log."""

import fcntl
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from support import engine as harness
from support.scenarios import text
from support.tiny_models import write
from vllm_mac import counter_files, exporter, log_line, metrics, publisher, totals
from vllm_mac.counter_files import CounterFile
from vllm_mac.counters import Count
from vllm_mac.state import RingStore

NAMES = {Count.HIT: 3, Count.MISS: 2, Count.SHORT_CONTEXT: 1, Count.READ: 40, Count.SKIPPED: 60}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Files of these tests lie apart from those of servers on this machine."""
    found = [tmp_path / "shm", tmp_path / "tmp"]
    for folder in found:
        folder.mkdir()
    monkeypatch.setattr(counter_files, "folders", lambda: found)
    return found


def names(folders) -> list[str]:
    return sorted(path.name for folder in folders for path in folder.iterdir())


class Group:
    """Of `kv_group.Group` what is published."""

    def __init__(self, decoded, context, windowed):
        self.decoded, self.context, self.windowed = decoded, context, windowed


def worker(rank=0, engine=0, served=2, audited=False, heads=8, prefix="model.layers", model="tiny", rings=4):
    """Layers of a worker as they are when it serves: `served` of them, and one that has a sliding window."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name=model),
        parallel_config=SimpleNamespace(rank=rank, data_parallel_index=engine),
    )
    every, counts, histograms = totals.allocate(len(Count), [heads] * served, audited, "cpu")
    group = Group(5, 500, {64: 300})
    state = SimpleNamespace(store=RingStore.allocate(rings, heads, 32, 16, torch.float32, "cpu"))
    common = dict(vllm_config=config, num_heads=heads, num_kv_heads=2, group=group, publisher=None)
    layers = [
        SimpleNamespace(
            **common, name=f"{prefix}.{i}", served=True, state=state, exact=None, sliding_window=None, totals=every,
            counts=counts[i], audited=histograms[i] if audited else None,
        )
        for i in range(served)
    ]  # fmt: skip
    layers.append(
        SimpleNamespace(
            **common, name=f"{prefix}.{served}", served=False, state=None, exact="sliding_window", sliding_window=64,
            totals=None, counts=None, audited=None,
        )
    )  # fmt: skip
    return layers


def count(layers):
    for layer in layers:
        if layer.served:
            for at, value in NAMES.items():
                layer.counts[at] += value


def values(samples) -> dict:
    return {(name, *labels.values()): value for name, labels, value in samples}


def test_layers_with_an_index_publish_no_rings(folders):
    layers = worker()
    for layer in layers:
        layer.state = None
    publisher.publish(layers)
    count(layers)
    layers[0].publisher.after_batch({})
    found = values(metrics.published())
    assert found[metrics.HEADS, "model.layers.0", "hit", "tiny", "0"] == NAMES[Count.HIT]
    assert not {name for name, *_ in found} & {metrics.RINGS, metrics.RING_BYTES}


def test_a_batch_is_published_when_it_is_over(folders):
    layers = worker()
    publisher.publish(layers)
    before = values(metrics.published())
    assert before[metrics.HEADS, "model.layers.0", "hit", "tiny", "0"] == 0  # there before the first batch
    assert before[metrics.RINGS, "free", "tiny", "0"] == 4
    count(layers)
    assert values(metrics.published()) == before
    layers[0].publisher.after_batch({"active": 1, "idle": 2, "free": 1})
    after = values(metrics.published())
    expected = {
        (metrics.HEADS, "model.layers.0", "hit"): 3, (metrics.HEADS, "model.layers.1", "miss"): 2,
        (metrics.HEADS, "model.layers.1", "exact"): 1, (metrics.HEADS, "model.layers.2", "exact"): 5 * 8,
        (metrics.KV_TOKENS, "model.layers.0", "read"): 40, (metrics.KV_TOKENS, "model.layers.1", "skipped"): 60,
        (metrics.KV_TOKENS, "model.layers.2", "read"): 300 * 2, (metrics.KV_TOKENS, "model.layers.2", "skipped"): 0,
        (metrics.EXACT, "short_context"): 2, (metrics.EXACT, "sliding_window"): 40,
        (metrics.RINGS, "active"): 1, (metrics.RINGS, "idle"): 2, (metrics.RINGS, "free"): 1,
        (metrics.RING_BYTES,): 2 * 4 * 8 * 32 * (2 * 16 * 4 + 4 + 4),
    }  # fmt: skip
    assert {key: after[*key, "tiny", "0"] for key in expected} == expected
    summary = metrics.summarise(metrics.published())
    assert summary.hit_rate == 6 / (2 * 6 + 40) and summary.exact == {"short_context": 2, "sliding_window": 40}


@pytest.mark.cpu
@pytest.mark.parametrize("runner, model", [("v1", "gemma3"), ("v2", "llama")])
def test_an_engine_publishes_what_a_reading_of_its_worker_gives(tmp_path, runner, model):
    """Also of layers that MAC leaves exact, half of which have a sliding window."""
    config = {"mac": {"window": 32, "band": 16, "min_context": 40, "threshold": 0.5, "audit": 1.0}}
    with harness.engine(write(model, tmp_path), runner, "MAC", config) as llm:
        assert all(value == 0 for name, labels, value in metrics.published() if name == metrics.HEADS)
        harness.run_schedule(llm, [harness.Add(0, "a", text("a", 60), 8), harness.Add(2, "b", text("b", 30), 4)])
        [read] = llm.collective_rpc(metrics.counters)
        name = llm.llm_engine.vllm_config.model_config.served_model_name
        assert values(metrics.published()) == {(*key, name, "0"): value for key, value in values(read).items()}
        assert metrics.summarise(metrics.published()) == metrics.summarise(read)
        heads = sum(value for name, _, value in read if name == metrics.HEADS)
        layers = len({labels["layer"] for name, labels, _ in read if name == metrics.HEADS})
        assert heads == (7 + 3) * 8 * layers and metrics.summarise(read).hit_rate > 0


@pytest.mark.cpu
def test_layers_that_are_all_exact_are_counted_too(tmp_path):
    with harness.engine(write("llama", tmp_path), "v1", "MAC", {"mac": {"enabled": False}}) as llm:
        harness.run_schedule(llm, [harness.Add(0, "a", text("a", 60), 8)])
        summary = metrics.summarise(metrics.published())
        assert summary.hit_rate == 0 and summary.exact == {"disabled": 7 * 8 * 2}


def test_pointers_suit_what_kernels_were_compiled_for():
    every, counts, histograms = totals.allocate(7, [3, 4, 5], True, "cpu")
    for i, tensor in enumerate((*counts, *histograms)):
        assert (tensor.data_ptr() - every.data_ptr()) % 16 == 0
        tensor += i + 1
    for i, tensor in enumerate((*counts, *histograms)):  # none overlaps another
        assert bool((tensor == i + 1).all()) and tensor.storage_offset() * 8 == tensor.data_ptr() - every.data_ptr()
    assert [tuple(x.shape) for x in histograms] == [(5, 33), (6, 33), (7, 33)] and len(counts[0]) == 7


def test_histograms_are_those_that_a_reading_of_the_worker_gives():
    layers = worker(audited=True, served=1, heads=2)
    publisher.publish(layers)
    layers[0].audited[:2, 3] = torch.tensor([4, 5])
    layers[0].audited[2, 0], layers[0].audited[3, 32] = 7, 9
    layers[0].publisher.after_batch({})
    for name, at, total in ((metrics.ERROR, 3, 9), (metrics.LAG, 0, 7), (metrics.CHAIN, 32, 9)):
        found = metrics.histograms(metrics.published(), name)["model.layers.0"]
        assert [(i, n) for i, n in enumerate(found.counts) if n] == [(at, total)]
        assert values(metrics.published())[f"{name}_count", "model.layers.0", "tiny", "0"] == total


def test_workers_of_an_engine_are_added_up_and_engines_are_not(folders):
    ranks = [worker(rank=0), worker(rank=1), worker(rank=0, engine=1, served=1)]
    for i, layers in enumerate(ranks):
        publisher.publish(layers)
        count(layers)
        layers[0].publisher.after_batch({"active": i, "idle": 0, "free": 4 - i})
    assert len(names(folders)) == 3
    found = values(metrics.published())
    assert found[metrics.HEADS, "model.layers.0", "hit", "tiny", "0"] == 6
    assert found[metrics.HEADS, "model.layers.0", "hit", "tiny", "1"] == 3
    assert found[metrics.KV_TOKENS, "model.layers.2", "read", "tiny", "0"] == 2 * 600
    assert found[metrics.EXACT, "sliding_window", "tiny", "1"] == 40
    # One engine's rings are the same on all ranks; the memory is each rank's own.
    assert [found[metrics.RINGS, "active", "tiny", str(i)] for i in (0, 1)] == [0, 2]
    assert found[metrics.RING_BYTES, "tiny", "0"] == 2 * 2 * found[metrics.RING_BYTES, "tiny", "1"]


def test_a_stage_without_rings_leaves_them_to_the_next():
    first, second = worker(rank=0, served=0, prefix="a"), worker(rank=1, prefix="b")
    for layers in (first, second):
        publisher.publish(layers)
    assert values(metrics.published())[metrics.RINGS, "free", "tiny", "0"] == 4


CHILD = """
import sys, time
from pathlib import Path
from vllm_mac import counter_files
counter_files.folders = lambda: [Path(sys.argv[1])]
file = counter_files.CounterFile({"rank": 0, "series": "[[], [], [], 1]"}, 1)
file.values[0] = 42
print("made", flush=True)
if sys.argv[2] == "waits":
    time.sleep(600)
if sys.argv[2] == "fails":
    raise SystemExit(3)
"""


def child(folder: Path, what: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), what], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "made\n"
    return process


def test_a_worker_that_is_killed_leaves_nothing_to_see(folders):
    process = child(folders[0], "waits")
    try:
        (file,) = folders[0].iterdir()
        assert file.name.startswith(f"vllm-mac-{process.pid}-") and stat.S_IMODE(file.stat().st_mode) == 0o600
        [(header, found)] = counter_files.read(os.getpid())  # a child's
        assert header["pid"] == process.pid and os.getpid() in header["ancestors"] and found[0] == 42
        # Another server's: it neither is that process nor descends from it.
        assert list(counter_files.read(process.pid + 1)) == [] and len(list(counter_files.read(process.pid))) == 1
        process.send_signal(signal.SIGKILL)
        begin = time.monotonic()
        counter_files.sweep(patience=30)
        assert names(folders) == [] and time.monotonic() - begin < 29
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("what", ["ends", "fails"])
def test_a_worker_s_file_goes_with_it(folders, what):
    child(folders[0], what).wait(60)
    assert names(folders) == []


def test_a_file_goes_when_its_layers_do(folders):
    layers = worker()
    publisher.publish(layers)
    publisher.publish(layers)  # the groups were made anew
    assert len(names(folders)) == 1
    del layers
    gc.collect()  # layers and what publishes them refer to each other
    assert names(folders) == []


def test_what_is_not_a_worker_s_file_is_left_alone(folders, monkeypatch):
    (folders[0] / "vllm-mac-eval-1").mkdir()
    (folders[0] / "vllm-mac-1-folder").mkdir()
    (folders[0] / "vllm-mac-1-link").symlink_to(folders[1] / "target")
    (folders[1] / "target").write_text("")
    os.mkfifo(folders[0] / "vllm-mac-1-pipe")
    for name in ("vllm-mac-0.1-backup.tar", "vllm-mac-2-results0", "vllm-mac-3-notes___"):
        (folders[0] / name).write_text("somebody's own\n")
    before = names(folders)
    assert list(counter_files.read(os.getpid())) == [] and names(folders) == before
    other = folders[0] / "vllm-mac-1-other"
    other.write_text("")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert list(counter_files.read(os.getpid())) == [] and other.exists()  # another user's


def test_a_file_of_another_version_stops_nobody(folders):
    """Its worker lives: it holds the lock."""
    with open(folders[0] / "vllm-mac-1-abcdefgh", "wb") as file:
        file.write(b'{"pid": 1, "format": "another"}\n')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        own = CounterFile({}, 1)
        assert [header["pid"] for header, _ in counter_files.read(os.getpid())] == [os.getpid()]
        assert len(names(folders)) == 2 and own.path.exists()


def test_containers_that_share_memory_tell_their_workers_apart(folders, monkeypatch):
    monkeypatch.setattr(counter_files, "_namespace", lambda: 1)
    file = CounterFile({}, 1)
    assert len(list(counter_files.read(os.getpid()))) == 1
    monkeypatch.setattr(counter_files, "_namespace", lambda: 2)
    assert list(counter_files.read(os.getpid())) == [] and file.path.exists()


def test_a_full_folder_is_passed_over_and_nowhere_is_said(folders, monkeypatch):
    reserve, full = os.posix_fallocate, [folders[0]]

    def posix_fallocate(fd, offset, size):
        if Path(os.readlink(f"/proc/self/fd/{fd}")).parent in full:
            raise OSError(28, "No space left on device")
        reserve(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    file = CounterFile({}, 1)
    assert file.path.parent == folders[1] and names(folders) == [file.path.name]
    said = []
    monkeypatch.setattr(publisher.logger, "warning", lambda *args: said.append(args[0] % args[1:]))
    full.append(folders[1])
    layers = worker()
    publisher.publish(layers)
    assert layers[0].publisher is None and len(said) == 1 and "No space left on device" in said[0]


def scraped(registry) -> dict:
    return {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}


def test_what_a_scrape_says(folders):
    layers = worker(audited=True)
    publisher.publish(layers)
    count(layers)
    layers[0].audited[0, :] = 1
    layers[0].publisher.after_batch({"active": 1, "idle": 0, "free": 3})
    registry = CollectorRegistry(auto_describe=True)
    registry.register(exporter.Exporter())
    found = scraped(registry)
    assert {name: family.type for name, family in found.items()} == {
        "vllm_mac_heads": "counter", "vllm_mac_kv_tokens": "counter", "vllm_mac_exact": "counter",
        "vllm_mac_rings": "gauge", "vllm_mac_ring_bytes": "gauge",
        "vllm_mac_error": "histogram", "vllm_mac_lag": "histogram", "vllm_mac_chain": "histogram",
    }  # fmt: skip
    own = {"model_name": "tiny", "engine": "0"}
    assert registry.get_sample_value(metrics.HEADS, {"layer": "model.layers.1", "outcome": "hit", **own}) == 3
    errors = [sample for sample in found["vllm_mac_error"].samples if sample.labels["layer"] == "model.layers.0"]
    buckets = [(float(x.labels["le"]), x.value) for x in errors if x.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == (float("inf"), 33) and len(buckets) == 33
    assert [x.value for x in errors if x.name.endswith("_count")] == [33]
    assert b"vllm_mac_rings" in generate_latest(registry.restricted_registry(["vllm_mac_rings"]))


def test_a_scrape_without_mac_says_nothing():
    registry = CollectorRegistry()
    registry.register(exporter.Exporter())
    assert generate_latest(registry) == b""


def test_a_failure_leaves_the_server_s_own_metrics(monkeypatch):
    said = []
    monkeypatch.setattr(exporter.logger, "exception", lambda *args: said.append(args))
    monkeypatch.setattr(metrics, "published", lambda: 1 / 0)
    registry = CollectorRegistry()
    registry.register(exporter.Exporter())
    assert generate_latest(registry) == generate_latest(registry) == b"" and len(said) == 1


def test_both_registries_have_the_collector_once(monkeypatch, tmp_path):
    from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics

    for _ in range(2):
        exporter.install()
    layers = worker(model="once")
    publisher.publish(layers)
    for directory in (None, str(tmp_path)):
        if directory:
            monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", directory)
        unregister_vllm_metrics()
        registry = get_prometheus_registry()
        assert (registry is REGISTRY) == (directory is None)
        answer = generate_latest(registry).decode()
        assert answer.count('vllm_mac_ring_bytes{engine="0",model_name="once"}') == 1
    assert not hasattr(MultiProcessCollector.collect.__wrapped__, "exporter")


WITHOUT = """
import sys
sys.modules["prometheus_client"] = None
from vllm_mac import exporter
exporter.install()
"""


def test_a_process_without_prometheus_goes_on():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0 and "MAC's counters are not on this process's /metrics" in done.stderr


def test_whose_files_an_api_server_reads(monkeypatch):
    here = SimpleNamespace(name="ApiServer_1")
    monkeypatch.setattr(metrics.multiprocessing, "current_process", lambda: here)
    monkeypatch.setattr(metrics.multiprocessing, "parent_process", lambda: SimpleNamespace(pid=77))
    assert metrics._root() == 77
    here.name = "APIServer_DPRank_1"  # a server with engines of its own, which a supervisor started
    assert metrics._root() == os.getpid()


def test_the_log_line():
    sample, layer = metrics.Sample, {"layer": "a"}
    since = [
        sample(metrics.HEADS, layer | {"outcome": "hit"}, 60), sample(metrics.HEADS, layer | {"outcome": "miss"}, 20),
        sample(metrics.HEADS, layer | {"outcome": "exact"}, 20),
        sample(metrics.KV_TOKENS, layer | {"kind": "read"}, 25), sample(metrics.KV_TOKENS, layer | {"kind": "skipped"}, 75), sample(metrics.EXACT, {"reason": "no_ring"}, 5),
        sample(metrics.EXACT, {"reason": "short_context"}, 15), sample(metrics.EXACT, {"reason": "error_budget"}, 0),
    ]  # fmt: skip
    now = [sample(metrics.RINGS, {"state": state}, n) for state, n in (("active", 3), ("idle", 1), ("free", 4))]
    assert log_line.line(since, now) == (
        "MAC: hit rate 60.0%, KV read 25.0%, rings 3 of 8 active, exact: short_context 15.0%, no_ring 5.0%"
    )
    assert log_line.line([name._replace(value=0) for name in since], now) is None
    # By index there are no rings; before it is used, and where no layer uses MAC, nothing is by index.
    assert log_line.line(since, []) == "MAC: by index 60.0%, KV read 25.0%, exact: short_context 15.0%, no_ring 5.0%"
    assert log_line.line(since[2:], []) == "MAC: KV read 25.0%, exact: short_context 75.0%, no_ring 25.0%"


def test_the_log_line_is_of_its_interval_and_of_rank_0(monkeypatch):
    said = []
    monkeypatch.setattr(log_line.logger, "info", lambda text, *args: said.append(text % args))
    monkeypatch.setattr(log_line.envs, "VLLM_LOG_STATS_INTERVAL", 0.05, raising=False)
    layers, other = worker(), worker(rank=1)
    layers[-1].group = other[-1].group = Group(0, 0, {64: 0})
    for each in (layers, other):
        publisher.publish(each)
    for n in (1, 2):
        layers[0].counts[Count.HIT] += 3
        layers[0].counts[Count.MISS if n == 1 else Count.HIT] += 1
        layers[0].counts[Count.READ] += 1
        for each in (layers, other):
            each[0].publisher.after_batch({"active": n, "idle": 0, "free": 4 - n})
        end = time.monotonic() + 30
        while len(said) < n and time.monotonic() < end:
            time.sleep(0.01)
    time.sleep(0.3)  # several intervals without a decode
    assert said == [
        "MAC: hit rate 75.0%, KV read 100.0%, rings 1 of 4 active",
        "MAC: hit rate 100.0%, KV read 100.0%, rings 2 of 4 active",
    ]


class Event:
    """A CUDA event whose copy arrives when a test says so."""

    arrived, made = 0, 0

    def __init__(self):
        Event.made += 1
        self.number = Event.made

    def record(self):
        pass

    def query(self):
        return self.number <= Event.arrived

    def synchronize(self):
        Event.arrived = max(Event.arrived, self.number)


def test_the_detour_shows_what_has_arrived(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: empty(tensor))
    counted, target = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    detour, seen = publisher.Detour(counted, target), []
    for arrived, idle in ((0, False), (1, False), (1, False), (3, False), (3, False), (3, True), (3, True)):
        counted += not idle
        Event.arrived = max(Event.arrived, arrived)
        detour.copy(idle)
        seen.append(target.tolist())
    # At each batch the newest that has arrived; all of it when nothing runs.
    assert seen == [[n, n] for n in (0, 1, 1, 3, 3, 5, 5)]


class Runtime:
    def __init__(self, code):
        self.code, self.calls = code, []

    def cudaHostRegister(self, address, size, flags):
        self.calls.append((address, size, flags))
        return SimpleNamespace(value=self.code)

    def cudaHostUnregister(self, address):
        self.calls.append(address)


@pytest.mark.parametrize("code", [0, 801])
def test_the_file_s_memory_is_page_locked_as_long_as_it_is_there(monkeypatch, code):
    runtime = Runtime(code)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    file = CounterFile({}, 600)
    address, size = file.memory.ctypes.data, file.memory.nbytes
    refusal = publisher.page_lock(file)
    assert (refusal is None) == (code == 0)
    assert runtime.calls == [(address, size, 0)] and address % 4096 == size % 4096 == 0
    array = file.values
    file.close()
    del file
    assert len(runtime.calls) == 1  # an array of it is still there
    array[0] = 1
    del array
    assert runtime.calls[1:] == ([address] if code == 0 else [])


def test_values_keep_their_place_in_the_file(folders):
    file = CounterFile({"note": "x" * 9000}, 3)
    file.values[:] = [1, -2, 2**40]
    [(header, found)] = counter_files.read(os.getpid())
    assert found[:3].tolist() == [1, -2, 2**40] and len(header["note"]) == 9000
    assert json.loads(file.path.read_bytes().split(b"\n")[0]) == header
    assert isinstance(found, np.ndarray)
