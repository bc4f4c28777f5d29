"""A run of `vllm-mac eval`: its engines side by side, how it stops and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import ROOT
from support.eval_runs import ENVIRONMENT, fake_engine, made, options
from vllm_mac.tools import engine_process
from vllm_mac.tools.eval import (
    EvalError,
    evaluation,
    requests,
    result_tables,
    results,
)


def test_a_run_from_its_answers_to_its_tables(monkeypatch, tmp_path):
    fake_engine(monkeypatch)
    opts, told = options(tmp_path), []
    found = evaluation.run(opts, made(), ENVIRONMENT, lambda what, advance: told.append((what, advance)))
    assert told == [("exact: all", 5), ("one: all", 5)] and evaluation.steps(opts, made()) == 10
    exact, one = found["totals"]
    assert (exact["score"], one["score"], one["difference"], one["same_answers"]) == (1.0, 0.0, -1.0, 0.0)
    assert found["divergence"] == {"one": [1] * 5} and "difference_low" not in one
    assert [(r["configuration"], r["group"], r["requests"], "score" in r) for r in found["rows"]] == [
        ("exact", "ruler", 4, True), ("exact", "prompts", 1, False), ("one", "ruler", 4, True), ("one", "prompts", 1, False),
    ]  # fmt: skip
    assert json.loads((opts.out / "results.json").read_text()) == found
    text = result_tables.markdown(found)
    assert "| one | 5 (4 scored) | 0.0 (0.0 to 49.0) | -100.0 (on each) | 0.0 | 50.0 | 1 |" in text
    # A finished run is shown again, and no engine starts.
    monkeypatch.setattr(evaluation, "COMMAND", ("/nonexistent",))
    assert evaluation.run(options(tmp_path, resume=True), made(), ENVIRONMENT, None) == found


def test_a_stopped_run_goes_on_where_it_was(monkeypatch, tmp_path):
    fake_engine(monkeypatch, "name == 'exact' and count == 2")
    with pytest.raises(
        EvalError, match="(?s)^exact: .*ended with code 9 and gave no result: ValueError: out of luck$"
    ) as caught:
        evaluation.run(options(tmp_path), made(), ENVIRONMENT, lambda *_: None)
    assert "Traceback" in str(caught.value)
    with open(tmp_path / "out" / "exact" / "samples.jsonl", "a") as file:
        file.write('{"id": "ruler/99/ni')  # cut short
    assert results.left(tmp_path / "out" / "exact", made(), 3) == (3, True)
    fake_engine(monkeypatch)
    told = []
    evaluation.run(options(tmp_path, resume=True), made(), ENVIRONMENT, lambda *said: told.append(said))
    assert told == [("exact: 2 were done before", 2), ("exact: all", 3), ("one: all", 5)]
    rows = results.read_samples(tmp_path / "out" / "exact")
    assert [row["id"] for row in rows] == [request.id for request in made()]
    assert len({row["by"] for row in rows[:2]}) == 1 and rows[0]["by"] != rows[2]["by"]


@pytest.mark.parametrize("gpus", [(), ("0",), ("0", "1")])
def test_a_configuration_that_fails_leaves_the_others(gpus, monkeypatch, tmp_path):
    fake_engine(monkeypatch, "name == 'two'")
    opts = options(tmp_path, mac={"two": {}, "one": {}}, gpus=gpus)
    found = evaluation.run(opts, made(), ENVIRONMENT, lambda *_: None)
    assert [row["configuration"] for row in found["totals"]] == ["exact", "one"]
    assert "out of luck" in found["errors"]["two"] and (opts.out / "two" / "engine.log").exists()
    assert "two has no results: " in result_tables.markdown(found)
    fake_engine(monkeypatch)
    found = evaluation.run(
        options(tmp_path, mac={"two": {}, "one": {}}, resume=True), made(), ENVIRONMENT, lambda *_: None
    )
    assert [row["configuration"] for row in found["totals"]] == ["exact", "two", "one"] and not found["errors"]


def meeting(notes, count):
    """Notes when an engine begins and ends, and its GPUs; no engine but exact's goes on until `count` others have begun."""
    return f"""
import atexit, time
def note(what):
    with open({str(notes)!r}, "a") as sink:
        sink.write(f"{{what}} {{name}} {{os.environ['CUDA_VISIBLE_DEVICES']}}\\n")
note("begin")
atexit.register(note, "end")
late = time.monotonic() + 30
while name != "exact" and open({str(notes)!r}).read().count("begin") <= {count}:
    time.sleep(0.01)
    if time.monotonic() > late:
        os._exit(7)
time.sleep(0.3)  # for others to begin, if they may
"""


@pytest.mark.parametrize("gpus", [(), ("5", "GPU-0c"), ("0", "0"), ("1", "0", "1")])
def test_engines_run_side_by_side(gpus, monkeypatch, tmp_path):
    """As many as there are entries, each of which serves one at a time; before them exact attention, alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    entries, names, told, telling = gpus or ("7",), [f"c{i}" for i in range(5)], [], []
    fake_engine(monkeypatch, first=meeting(tmp_path / "notes", len(entries)))

    def tell(*said):
        assert not telling
        telling.append(said)
        time.sleep(0.05)
        told.append(telling.pop())

    opts = options(tmp_path, mac={key: {} for key in names}, gpus=gpus)
    found = evaluation.run(opts, made(), ENVIRONMENT, tell)
    assert not found["errors"] and [row["configuration"] for row in found["totals"]] == ["exact", *names]
    shared = len(set(entries)) < len(entries)  # then no speed says anything
    assert all(("tokens_per_s" in row) != shared for row in found["totals"])
    assert sorted(told) == sorted((f"{name}: all", 5) for name in ("exact", *names))
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    assert notes[:2] == [["begin", "exact", entries[0]], ["end", "exact", entries[0]]]
    running, most = Counter(), Counter()
    for what, _, gpu in notes[2:]:
        running[gpu] += 1 if what == "begin" else -1
        most[gpu] = max(most[gpu], running[gpu])
    assert most == Counter(entries) and not any(running.values())
    assert (
        os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        and "gpus" not in json.loads((opts.out / "run.json").read_text())["configuration"]
    )


def ended(pid):
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def hanging(folder, names):
    """Engines of these names write their process and GPU into a file, and go no further until there is one named `go`."""
    return f"""
import time
def hang(folder=Path({str(folder)!r})):
    if not (folder / "go").exists():
        (folder / f"{{name}}.part").write_text(f"{{os.getpid()}} {{os.environ['CUDA_VISIBLE_DEVICES']}}")
        (folder / f"{{name}}.part").rename(folder / f"{{name}}.pid")
        time.sleep(60); os._exit(8)
hangs = name in {tuple(names)!r}
"""


def test_what_is_raised_beside_other_engines_ends_them(monkeypatch, tmp_path):
    fake_engine(monkeypatch, "hangs and hang()", hanging(tmp_path, ["one"]))
    note = tmp_path / "one.pid"

    def follow(command, *args, **rest):
        if Path(command[-1]).stem == "two":
            while not note.exists():
                time.sleep(0.01)
            raise OSError("no space left")
        return engine_process.follow(command, *args, **rest)

    monkeypatch.setattr(evaluation, "follow", follow)
    opts, begin = options(tmp_path, mac={"one": {}, "two": {}, "three": {}}, gpus=("0", "1")), time.monotonic()
    with pytest.raises(OSError, match="^no space left$"):
        evaluation.run(opts, made(), ENVIRONMENT, lambda *_: None)
    assert ended(note.read_text().split()[0]) and time.monotonic() < begin + 50  # it would have slept for 60 s
    assert len(results.read_samples(opts.out / "exact")) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_all_engines(number, tmp_path):
    """What is finished is kept, and the run goes on with other GPUs."""
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(
        "import signal, sys, pytest\nsys.path.insert(0, sys.argv.pop(1))\nfrom support import eval_runs\nimport vllm_mac.tools.cli\n"
        # A shell starts what it runs in the background with this signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import vllm_mac.tools.eval.evaluation as evaluation\nevaluation.prompts = lambda options: eval_runs.made()\n"
        f"first = {hanging(tmp_path, ['two', 'three'])!r}\n"
        "eval_runs.fake_engine(pytest.MonkeyPatch(), 'hangs and count == 2 and hang()', first)\nvllm_mac.tools.cli.main()\n"
    )
    configurations = [part for name in ("one", "two", "three", "four") for part in ("--mac", f"{name}=paper")]
    command = [
        sys.executable,
        str(script),
        str(ROOT / "tests"),
        "eval",
        "--model",
        "m",
        "--out",
        str(out),
        *configurations,
    ]
    output = {"cwd": ROOT, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--kl", "0", "--gpus", "4,5"], env=environment, **output)
    notes, deadline = [tmp_path / "two.pid", tmp_path / "three.pid"], time.monotonic() + 120
    while not all(note.exists() for note in notes) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and f"--resume --out {out} goes on" in err and "Traceback" not in err, err
    pids, gpus = zip(*(note.read_text().split() for note in notes), strict=True)
    assert all(map(ended, pids)) and sorted(gpus) == ["4", "5"] and not (out / "four").exists()
    found = json.loads((out / "results.json").read_text())
    assert [row["configuration"] for row in found["totals"]] == ["exact", "one"]
    assert found["errors"] == dict.fromkeys(["two", "three", "four"], evaluation.INTERRUPTED)
    assert [len(results.read_samples(out / name)) for name in ("two", "three")] == [2, 2]
    (tmp_path / "go").touch()
    done = subprocess.run(
        [*command, "--kl", "0", "--gpus", "6", "--resume"], env=environment, timeout=120, check=False, **output
    )
    assert done.returncode == 0, done.stderr
    assert "two: 2 were done before" in done.stderr
    assert len(json.loads((out / "results.json").read_text())["totals"]) == 5


@pytest.mark.parametrize("name, counted", [("exact", 0), ("two", 2)])
def test_an_interrupted_run_shows_what_was_finished(monkeypatch, tmp_path, name, counted):
    """And goes on with the rest."""
    fake_engine(monkeypatch)
    configurations = {"one": {}, "two": {}, "three": {}}

    def follow(command, log, tell, **_):
        if Path(json.loads(Path(command[-1]).read_text())["folder"]).name == name:
            raise KeyboardInterrupt
        return engine_process.follow(command, log, tell)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "follow", follow)
        opts = options(tmp_path, mac=configurations)
        if not counted:
            with pytest.raises(KeyboardInterrupt):
                evaluation.run(opts, made(), ENVIRONMENT, lambda *_: None)
            assert not (opts.out / "results.json").exists()
        else:
            found = evaluation.run(opts, made(), ENVIRONMENT, lambda *_: None)
            assert [row["configuration"] for row in found["totals"]] == ["exact", "one"]
            assert found["errors"] == {"two": evaluation.INTERRUPTED, "three": evaluation.INTERRUPTED}
            assert "three has no results: interrupted" in result_tables.markdown(found)
    found = evaluation.run(options(tmp_path, mac=configurations, resume=True), made(), ENVIRONMENT, lambda *_: None)
    assert len(found["totals"]) == 4 and not found["errors"]


@pytest.mark.parametrize(
    "changes, environment, said",
    [
        (
            {"mac": {"one": {"threshold": 0.6}}},
            {},
            "mac: there {'one': {'threshold': 0.5}}, now {'one': {'threshold': 0.6}}",
        ),
        ({"seed": 1}, {}, "seed: there 0, now 1"),
        ({}, {"gpu": "H200"}, "gpu: there None, now 'H200'"),
        ({}, {"commit": "f00-dirty"}, "commit: there '0123456789ab', now 'f00'"),
    ],
)
def test_a_run_does_not_go_on_with_another_configuration(changes, environment, said, monkeypatch, tmp_path):
    fake_engine(monkeypatch)
    evaluation.run(options(tmp_path), made(), ENVIRONMENT, lambda *_: None)
    with pytest.raises(EvalError, match=re.escape(said)):
        evaluation.run(options(tmp_path, resume=True, **changes), made(), ENVIRONMENT | environment, None)
    with pytest.raises(EvalError, match="requests: there"):
        evaluation.run(options(tmp_path, resume=True), made(5), ENVIRONMENT, None)
    # The folder may be what makes the checkout dirty.
    evaluation.run(options(tmp_path, resume=True), made(), ENVIRONMENT | {"commit": "0123456789ab-dirty"}, None)


class FakeLLM:
    """Answers two steps after it was asked; its counters count the steps."""

    def __init__(self, **arguments):
        FakeLLM.asked, self.left, self.ticks = [], [], 0
        self.llm_engine = self
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, id, prompt, params):
        FakeLLM.asked.append(id)
        self.left.append(id)

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        self.ticks += 1
        reply = SimpleNamespace(text="x", token_ids=(1, 2), finish_reason="stop")
        return (
            [SimpleNamespace(request_id=self.left.pop(0), finished=True, outputs=[reply])]
            if self.ticks % 2 == 0
            else []
        )

    def collective_rpc(self, method):
        assert method == "mac_counters"
        return [[("vllm_mac_heads_total", {"layer": "a", "outcome": "hit"}, self.ticks)]]


def test_an_engine_answers_only_what_is_left(monkeypatch, tmp_path):
    import vllm

    from vllm_mac.tools.eval import answer_engine

    monkeypatch.setattr(vllm, "LLM", FakeLLM)
    requests.save(made(), tmp_path / "requests.jsonl")
    spec = {
        "llm": {},
        "requests": str(tmp_path / "requests.jsonl"),
        "folder": str(tmp_path),
        "exact": str(tmp_path),
        "kl": 0,
        "timed": True,
    }
    told = []
    answer_engine.main(spec, lambda **message: told.append(message))
    everything = [request.id for request in made()]
    assert FakeLLM.asked == everything and told[-1] == {"done": True} and sum(m.get("advance", 0) for m in told) == 5
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["score"] == 1.0 and json.loads(lines[-1])["score"] is None
    (tmp_path / "samples.jsonl").write_text("".join(lines[:1] + lines[2:]))
    answer_engine.main(spec | {"timed": False}, lambda **_: None)
    assert FakeLLM.asked == everything[1:2]
    first, *_, again = results.read_samples(tmp_path)
    assert again["id"] == everything[1] and "seconds" in first and "seconds" not in again
    # Four answers of two steps, and one of two; the other phase is counted by itself.
    assert [value for *_, value in results.read_counters(tmp_path, "ruler-99")] == [8, 2]
    assert [value for *_, value in results.read_counters(tmp_path, "prompts")] == [2]
