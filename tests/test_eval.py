"""`vllm-mac eval`: its figures, its prompts, how a run goes on after a stop, and one whole run on the CPU."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_mac.tools import cli, engine_process, resume
from vllm_mac.tools.eval import (
    EvalError,
    evaluation,
    longbench,
    plots,
    requests,
    result_tables,
    results,
    statistics,
    stdlib,
    tasks,
)
from vllm_mac.tools.eval.cli import configurations

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = dict.fromkeys(resume.SAME) | {"commit": "0123456789ab", "command": "vllm-mac eval"}


def invoke(*args):
    result = CliRunner().invoke(cli.app, ["eval", *map(str, args)], env={"COLUMNS": "300"})
    return result.exit_code, re.sub(r"\s*│?\n│?\s*", " ", result.output)


# Figures


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    cases = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, count), interval in cases.items():
        assert statistics.wilson(hits / count, count) == pytest.approx(interval, abs=5e-5)
    assert statistics.wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_paired_interval():
    draw = random.Random(0)
    values = [draw.gauss(0.1, 0.2) for _ in range(400)]
    low, high = statistics.paired_interval(values)
    mean, error = np.mean(values), np.std(values) / 20
    # 4000 resamples place a percentile to about 4 % of the standard error.
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert statistics.paired_interval([0.0] * 9) is None and statistics.paired_interval([0.5]) is None


@pytest.mark.parametrize(
    "a, b, position", [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0)]
)
def test_first_difference(a, b, position):
    assert statistics.first_difference(a, b) == statistics.first_difference(b, a) == position


def distributions(steps=5, vocabulary=300, scale=3.0, seed=0):
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, scale, (2, steps, vocabulary))
    logits[1] = logits[0] + 0.3 * (logits[1] - logits[0])
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def listed(logprobs, count, draw):
    """The likeliest tokens of each step in random order, one of them twice, as engines give them."""
    ids = np.argsort(-logprobs, 1)[:, :count]
    ids = np.stack([draw.permutation(row) for row in ids])
    ids = np.concatenate([ids[:, -1:], ids], 1)
    return ids.astype(np.int32), np.take_along_axis(logprobs, ids, 1).astype(np.float32)


def test_kl_of_whole_vocabularies_is_the_definition():
    p, q = distributions()
    draw = np.random.default_rng(1)
    got = statistics.kl(*listed(p, 300, draw), *listed(q, 300, draw), 300)
    wanted = (np.exp(p) * (p - q)).sum(1)
    # Log-probabilities of up to 32 in size, rounded to float32, on both sides.
    np.testing.assert_allclose(got, wanted, atol=2 * 32 * 2**-24, rtol=0)
    assert wanted.min() > 0.01


@pytest.mark.parametrize("count", [1, 10, 100])
def test_kl_of_the_likeliest_tokens_is_that_of_the_merged_distributions(count):
    p, q = distributions()
    draw = np.random.default_rng(1)
    got = statistics.kl(*listed(p, count, draw), *listed(q, count, draw), 300)
    whole = (np.exp(p) * (p - q)).sum(1)
    for step, value in enumerate(got):
        both = sorted(set(np.argsort(-p[step])[:count]) & set(np.argsort(-q[step])[:count]))
        merged = [np.append(np.exp(x[step][both]), 1 - np.exp(x[step][both]).sum()) for x in (p, q)]
        assert value == pytest.approx((merged[0] * np.log(merged[0] / merged[1])).sum(), abs=1e-5)
    assert (got <= whole + 1e-6).all()
    assert count < 100 or (got > 0.5 * whole).all()


def test_kl_of_equal_distributions_is_zero():
    (p, _), draw = distributions(), np.random.default_rng(1)
    for count in (300, 20):
        ids, logprobs = listed(p, count, draw)
        assert not statistics.kl(ids, logprobs, ids, logprobs, 300).any()
    assert (statistics.best(ids, logprobs) == p.argmax(1)).all()


def counters(layer, hit, miss, read, skipped, errors=()):
    samples = [("vllm_mac_heads_total", {"layer": layer, "outcome": k}, v) for k, v in (("hit", hit), ("miss", miss))]
    samples += [
        ("vllm_mac_kv_tokens_total", {"layer": layer, "kind": k}, v) for k, v in (("read", read), ("skipped", skipped))
    ]
    return samples + [("vllm_mac_error_bucket", {"layer": layer, "le": le}, n) for le, n in errors]


def test_figures_by_layer():
    samples = counters("a", 3, 1, 10, 30, [("0.1", 50), ("0.2", 90), ("+Inf", 100)]) + counters("b", 0, 0, 0, 0)
    samples += counters("a", 1, 3, 30, 10, [("0.1", 50), ("0.2", 90), ("+Inf", 100)])  # a second worker
    samples += [
        (statistics.HEAD_HITS, {"layer": "a", "head": head}, count) for head, count in (("0", 1), ("1", 3), ("1", 0))
    ]
    found = statistics.layers(samples)
    assert list(found) == ["a", "b"] and found["b"] == {"hit_rate": None, "read_share": None}
    assert found["a"] == {
        "hit_rate": 0.5, "read_share": 0.5, "error_p50": pytest.approx(0.1), "error_p95": None, "error_p99": None,
        "head_hit_rates": [0.25, 0.75],
    }  # fmt: skip
    assert statistics.pooled(samples, "vllm_mac_error") == [[0.1, 100], [0.2, 80], [None, 20]]
    assert statistics.pooled(samples, "vllm_mac_lag") == []


# Prompts


class Bytes:
    """A tokenizer with a token for each byte."""

    chat_template = None

    def encode(self, text, add_special_tokens=True):
        return [256] * add_special_tokens + list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Chat(Bytes):
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_prompts_are_in_the_chat_template_where_there_is_one():
    assert requests.Encoder(Bytes(), 99).prompt("ask", "pre") == (256, *b"askpre")
    assert bytes(requests.Encoder(Chat(), 99).prompt("ask", "pre")) == b"<user>ask<assistant>pre"
    encoder = requests.Encoder(Bytes(), 99)
    assert encoder.count("four") == 4
    assert (
        encoder.cut("0123456789", 5) == "01289" and encoder.cut("0123", 4) == "0123" and encoder.cut("0123", 1) == "0"
    )


def test_generated_prompts_follow_the_seed_and_fit_their_length():
    encoder = requests.Encoder(Chat(), 4000)
    make = lambda seed: list(requests.generated(("niah_single", "common_words"), (1500, 3000), 2, seed, encoder))
    made = make(0)
    assert [r.id for r in made[:3]] == [
        "ruler/1500/niah_single/0",
        "ruler/1500/niah_single/1",
        "ruler/1500/common_words/0",
    ]
    assert len({r.id for r in made}) == len(made) == 8
    for request in made:
        assert 0.8 * request.length < request.total <= request.length
        assert bytes(request.ids).startswith(b"<user>") and bytes(request.ids).endswith(
            f"<assistant>{request.prefix}".encode()
        )
        assert requests.score(request, f" {' '.join(request.answers)}.") == 1 and requests.score(request, "") == 0
    assert made == make(0) and requests.digest(made) == requests.digest(make(0))
    assert requests.digest(made) != requests.digest(make(1))
    assert list(requests.phases(made)) == ["ruler-1500", "ruler-3000"]


def test_requests_survive_their_file(tmp_path):
    made = list(requests.generated(("niah_single",), (1500,), 2, 0, requests.Encoder(Chat(), 4000)))
    requests.save(made, tmp_path / "r")
    assert requests.load(tmp_path / "r") == made


@pytest.mark.parametrize(
    "length, said",
    [
        (5000, r"--lengths: received 5000; the model's longest sequence is 4000 tokens"),
        (60, "--lengths: 60 is too short for task niah_single"),
    ],
)
def test_lengths_that_cannot_be(length, said):
    with pytest.raises(EvalError, match=said):
        list(requests.generated(("niah_single",), (length,), 1, 0, requests.Encoder(Chat(), 4000)))


def test_lengths_matter_only_to_generated_prompts():
    assert not list(requests.generated((), (5000,), 1, 0, requests.Encoder(Chat(), 4000)))


def test_names_of_tasks():
    assert requests.names("all") == (*tasks.RULER, *tasks.LONG, *stdlib.REAL) and requests.names("ruler") == tasks.RULER
    assert requests.names(f"long, {tasks.RULER[1]},long") == (*tasks.LONG, tasks.RULER[1])
    with pytest.raises(
        EvalError, match=r"--tasks: received 'haystack'; choose from all, ruler, long, real, niah_single"
    ):
        requests.names("ruler,haystack")


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Name two.", "answers": ["Ada", "Bob"], "max_tokens": 7}\n\n{"prompt": "Go on."}\n')
    first, second = requests.from_lines(path, requests.Encoder(Bytes(), 999))
    assert (first.id, first.max_tokens, second.max_tokens) == ("prompts/1", 7, 256)
    assert [requests.score(first, text) for text in ("ada, BOB", "Bob", "")] == [1.0, 0.5, 0.0]
    assert requests.score(second, "anything") is None


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: received []; must be an object with prompt, answers, max_tokens"),
        ('{"prompt": "a", "answer": "b"}', "line 2: unknown key 'answer'; choose from prompt, answers, max_tokens"),
        ('{"answers": []}', "line 2: prompt: received None; must be a text"),
        ('{"prompt": "a", "answers": "b"}', "line 2: answers: received 'b'; must be a list of texts"),
        ('{"prompt": "a", "max_tokens": 0}', "line 2: max_tokens: received 0; must be a whole number of at least 1"),
        (
            '{"prompt": "aaaaaaaaaa", "max_tokens": 90}',
            "line 2: the prompt has 11 tokens and 90 may follow; the model's longest sequence is 100",
        ),
    ],
)
def test_a_wrong_line_is_named(line, said, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 1}\n' + line + "\n")
    with pytest.raises(EvalError, match=re.escape(said)):
        list(requests.from_lines(path, requests.Encoder(Bytes(), 100)))
    with pytest.raises(EvalError, match="--prompts: .*absent"):
        list(requests.from_lines(tmp_path / "absent", None))


ITEM = {"question": "Who?", **{f"choice_{x}": f"Person {x}" for x in "ABCD"}, "answer": "C", "context": "word " * 400}


def test_longbench_contexts_lose_their_middle(tmp_path):
    path = tmp_path / "l.json"
    path.write_text(json.dumps([ITEM, ITEM | {"context": "begin " + "x" * 4000 + " end"}]))
    longest = longbench.MAX_TOKENS + 1500
    for request in requests.from_longbench(path, requests.Encoder(Chat(), longest)):
        assert request.total == longest
        assert "Question: Who?" in request.prompt and "(D) Person D" in request.prompt
        assert requests.score(request, "So **The correct answer is (C)**.") == 1
        assert requests.score(request, "The correct answer is (B).") == requests.score(request, "C") == 0
    assert "begin x" in request.prompt and "x end" in request.prompt
    with pytest.raises(EvalError, match="question 0 does not fit without its context"):
        list(requests.from_longbench(path, requests.Encoder(Chat(), longbench.MAX_TOKENS + 100)))


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("The correct answer is (A). No: the correct answer is (D)", "D"),
        ("the answer is B.", "B"),
        ("Answer: **(C)**", None),
        ("The correct answer is: Always", None),
        ("", None),
    ],
)
def test_longbench_answers(reply, letter):
    assert longbench.answer(reply) == letter


@pytest.mark.parametrize(
    "text, said",
    [("{}", "must be a JSON list"), ("[]", "must be a JSON list"), ('[{"question": "a"}]', "question 0 lacks the text choice_A"),
     (json.dumps([ITEM | {"answer": "E"}]), "answer 'E'; choose from A, B, C, D"), ("x", "l.json")],
)  # fmt: skip
def test_a_wrong_longbench_file(text, said, tmp_path):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(EvalError, match=re.escape(said)):
        longbench.load(tmp_path / "l.json")


# Forced texts


def test_forced_texts_are_the_last_tokens():
    from vllm_mac.tools.eval import forced

    prompt, text = forced.split(list(range(1000)), [5, 6])
    assert (len(prompt), len(text), text[-3:]) == (746, 256, [999, 5, 6])
    assert forced.split([1, 2, 3], [4]) == ([1, 2], [3, 4])
    made = [SimpleNamespace(id=i) for i in range(10)]
    assert [r.id for r in requests.chosen(made, 2)] == [2, 7] and requests.chosen(made, 99) == made


def test_only_the_forced_token_is_possible():
    import torch

    from vllm_mac.tools.eval import forced

    processor = forced.ForcedTokens(None, torch.device("cpu"), False)
    params = forced.params([3, 1], False, 8)
    output: list = []
    processor.req_info[1] = processor._new_state(params, None, output)
    for token in (3, 1):
        logits = torch.randn(2, 8)
        free, kept = logits[0].clone(), logits[1, token].clone()
        processor.apply(logits)
        assert torch.equal(logits[0], free) and logits[1].argmax() == token and logits[1, token] == kept
        assert logits[1].isinf().sum() == 7
        output.append(token)
    assert forced.params([3], True, 8).trace_decode_token_ids == [3]


def test_distributions_are_kept_only_of_what_was_forced(tmp_path):
    from vllm.logprobs import FlatLogprobs, Logprob

    from vllm_mac.tools.eval import forced

    flat = FlatLogprobs()
    flat.append({7: Logprob(-2.0), 1: Logprob(-0.5)})
    flat.append({4: Logprob(-0.25)})
    ids, logprobs = forced.distributions(SimpleNamespace(token_ids=[7, 4], logprobs=flat), [7, 4])
    assert ids.tolist() == [[7, 1], [4, 4]] and logprobs.tolist() == [[-2.0, -0.5], [-0.25, -0.25]]
    forced.save(tmp_path / "f.npz", {"ruler/1/a/0": (ids, logprobs)}, 9)
    found, vocabulary = forced.load(tmp_path / "f.npz")
    assert vocabulary == 9 and np.array_equal(found["ruler/1/a/0"][1], logprobs) and list(found) == ["ruler/1/a/0"]
    with pytest.raises(RuntimeError, match="did not decode the forced tokens"):
        forced.distributions(SimpleNamespace(token_ids=[7, 5], logprobs=flat), [7, 4])


@pytest.mark.cpu
def test_both_model_runners_decode_what_is_forced(tmp_path):
    from engine import engine
    from tiny_models import write

    from vllm_mac.tools.eval import forced

    draw, vocabulary, found = random.Random(0), 264, {}
    prompt, text = ([draw.randrange(256) for _ in range(count)] for count in (300, 20))
    keys = {"window": 64, "band": 32, "min_context": 128, "threshold": 1.0}
    for runner in ("v1", "v2"):
        v2 = runner == "v2"
        with engine(
            write("llama", tmp_path), runner, "MAC", {"mac": keys}, **forced.engine_arguments(v2, vocabulary)
        ) as llm:
            assert llm.llm_engine.vllm_config.use_v2_model_runner == v2
            llm.llm_engine.add_request("a", {"prompt_token_ids": prompt}, forced.params(text, v2, vocabulary))
            outputs = []
            while llm.llm_engine.has_unfinished_requests():
                outputs += [output for output in llm.llm_engine.step() if output.finished]
            found[runner] = forced.distributions(outputs[0].outputs[0], text)
    # The whole vocabulary and the forced token once more; equal but for rounding of float32 log-probabilities up to 100.
    assert found["v1"][0].shape == found["v2"][0].shape == (20, vocabulary + 1)
    assert statistics.kl(*found["v1"], *found["v2"], vocabulary).max() < 2 * 100 * 2**-24


# Runs


def made(count=4):
    some = [
        requests.Request(f"ruler/99/niah_single/{i}", "ruler", "niah_single", 99, (1, 2, i), 5, "p", ("x",))
        for i in range(count)
    ]
    return [*some, requests.Request("prompts/1", "prompts", "prompts", None, (9,), 5, "go on")]


def options(tmp_path, **changes):
    return evaluation.Evaluation(
        **{"model": "m", "out": tmp_path / "out", "mac": {"one": {"threshold": 0.5}}} | changes
    )


def fake_engine(monkeypatch, dies="False", first=""):
    """An engine whose replies are always the request's number; `dies`: when, in terms of `name` and `count`.
    first: what it does before."""
    code = f"""
import json, os, sys
from pathlib import Path
spec, fd = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
folder = Path(spec["folder"]); name = folder.name; file = folder / "samples.jsonl"
{first}
done = {{json.loads(line)["id"] for line in file.read_text().splitlines()}} if file.exists() else set()
count = 0
for line in open(spec["requests"]):
    item = json.loads(line)
    if item["id"] in done:
        continue
    if {dies}:
        print("Traceback\\nValueError: out of luck"); os._exit(9)
    row = {{k: item[k] for k in ("id", "group", "task", "length", "answers")}}
    row |= {{"score": float(name == "exact") if item["answers"] else None, "tokens": [1, len(name)], "reply": "", "by": os.getpid()}}
    with open(file, "a") as sink:
        sink.write(json.dumps(row) + "\\n")
    count += 1
os.write(fd, (json.dumps({{"stage": "all", "advance": count}}) + "\\n" + json.dumps({{"done": True}}) + "\\n").encode())
"""
    monkeypatch.setattr(evaluation, "COMMAND", (sys.executable, "-c", code))


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
        "import signal, sys, pytest\nsys.path.insert(0, sys.argv.pop(1))\nimport test_eval, vllm_mac.tools.cli\n"
        # A shell starts what it runs in the background with this signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "test_eval.evaluation.prompts = lambda options: test_eval.made()\n"
        f"first = {hanging(tmp_path, ['two', 'three'])!r}\n"
        "test_eval.fake_engine(pytest.MonkeyPatch(), 'hangs and count == 2 and hang()', first)\nvllm_mac.tools.cli.main()\n"
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
    }
    told = []
    answer_engine.main(spec, lambda **message: told.append(message))
    everything = [request.id for request in made()]
    assert FakeLLM.asked == everything and told[-1] == {"done": True} and sum(m.get("advance", 0) for m in told) == 5
    lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["score"] == 1.0 and json.loads(lines[-1])["score"] is None
    (tmp_path / "samples.jsonl").write_text("".join(lines[:1] + lines[2:]))
    answer_engine.main(spec, lambda **_: None)
    assert FakeLLM.asked == everything[1:2]
    assert results.read_samples(tmp_path)[-1]["id"] == everything[1]
    # Four answers of two steps, and one of two; the other phase is counted by itself.
    assert [value for *_, value in results.read_counters(tmp_path, "ruler-99")] == [8, 2]
    assert [value for *_, value in results.read_counters(tmp_path, "prompts")] == [2]


# The command line


@pytest.mark.parametrize(
    "args, said",
    [
        (["--tasks", "haystack"], "--tasks: received 'haystack'; choose from all, ruler, long, real"),
        (["--lengths", "4k"], "--lengths: received '4k'; choose whole numbers of at least 1"),
        (["--mac", "a=1", "--mac", "a=2"], "--additional-config mac.config: received '1'"),
        (["--mac", "paper", "--mac", "paper"], "received 'paper'; choose NAME=JSON"),
        (["--mac", "exact={}"], "received 'exact={}'; choose NAME=JSON"),
        (["--mac", "yardstick=paper"], "received 'yardstick=paper'; choose NAME=JSON"),
        (["--mac", 'a={"bandd": 1}'], "bandd: unknown key"),
        (["--engine", "[]"], "--engine: received '[]'; choose a JSON object"),
        (
            ["--gpus", "0,,1"],
            "--gpus: received '0,,1'; choose GPUs as CUDA_VISIBLE_DEVICES takes them, separated by commas",
        ),
        (["--gpus", ""], "--gpus: received ''; choose GPUs"),
        *(
            (
                ["--gpus", "0", "--engine", json.dumps({key: 2})],
                f"--engine: {key}: received 2; choose 1, because with --gpus",
            )
            for key in evaluation.PARALLEL
        ),
        (["--resume"], "holds no run"),
    ],
)
def test_a_wrong_argument_is_named(args, said, monkeypatch, tmp_path):
    """Before anything else is missed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, output = invoke("--model", tmp_path, "--out", tmp_path / "out", *args)
    assert code == 2 and said in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_gpus_are_taken_as_they_are():
    assert evaluation.gpus("1, GPU-0c,1", {"tensor_parallel_size": 1, "max_num_seqs": 2}) == ("1", "GPU-0c", "1")


def test_models_that_cannot_be_read(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    out = ("--out", tmp_path / "out")
    assert "--model: no folder" in invoke("--model", tmp_path / "absent", *out)[1]
    assert "has no config.json" in invoke("--model", tmp_path, *out)[1]
    (tmp_path / "config.json").write_text("{}")
    assert "has no tokenizer" in invoke("--model", tmp_path, *out)[1]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "--engine: received {'lenght': 9}" in invoke("--model", tmp_path, *out, "--engine", '{"lenght": 9}')[1]
    code, said = invoke("--model", tmp_path, *out)
    assert code == 2 and "cannot be read" in said and "Traceback" not in said
    code, said = invoke("--model", tmp_path, "--out", tmp_path)
    assert code == 2 and "exists; choose another folder, or --resume" in said


def test_configurations_are_whole_and_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("window: 99\n")
    found = configurations(["paper", 'b={"band": 9}', "c=paper", str(tmp_path / "mine.yaml")], audit=False)
    assert list(found) == ["paper", "b", "c", "mine"]
    assert found["paper"] == found["c"] and found["b"]["band"] == 9 and found["mine"]["window"] == 99
    paper = {
        "window": 512,
        "band": 256,
        "threshold": 0.45,
        "reuse": "chained",
        "lag_weight": 0.0,
        "max_chain": None,
        "sink": 0,
        "mass_floor": None,
    }
    assert paper.items() <= found["paper"].items()


# A whole run


@pytest.mark.cpu
def test_eval_on_real_engines(tmp_path):
    pytest.importorskip("vllm", reason="whole engines")
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    from tiny_models import write

    out, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["red", "green", "blue", "and", "or", "not"], k=150)) for _ in range(2)]
    prompts.write_text("".join(json.dumps({"prompt": text, "max_tokens": 40}) + "\n" for text in texts))
    keys = {"window": 64, "band": 32, "min_context": 128}
    configurations = {"reuse": keys, "never": keys | {"threshold": 1.0}}
    engine = {"block_size": 32, "dtype": "float32", "kv_cache_memory_bytes": 32 << 20, "enforce_eager": True}
    quick = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
             "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
             "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from vllm_mac.tools.cli import main; main()", "eval", "--model", str(write("llama", tmp_path / "models")),
         "--tasks", "niah_single", "--lengths", "1200", "--samples", "1", "--prompts", str(prompts), "--kl", "2",
         *(part for name, some in configurations.items() for part in ("--mac", f"{name}={json.dumps(some)}")),
         "--engine", json.dumps(engine), "--out", str(out), "--no-progress"],
        capture_output=True, text=True, timeout=300, check=False,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | quick,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "results.json").read_text())
    exact, reuse, never = found["totals"]
    assert [row["configuration"] for row in found["totals"]] == ["exact", "reuse", "never"]
    assert never["same_answers"] == 1 and never["hit_rate"] == 0 and never["read_share"] == 1
    assert never["same_best"] > 0.99 > reuse["same_best"]  # ties within rounding may fall either way
    # Attention of the two engines differs by 1e-4 at most (see test_engine_exact), logits by e = 1e-3 (their
    # standard deviation is 10), and KL by e^2/2; log-probabilities of up to 100 are rounded to float32 on both sides.
    assert never["kl_mean"] <= never["kl_max"] < 1e-3**2 / 2 + 2 * 100 * 2**-24
    assert 0 < reuse["hit_rate"] < 1 and 0 < reuse["read_share"] < 1
    assert 100 * never["kl_max"] < reuse["kl_mean"] <= reuse["kl_max"] < math.inf
    # Both forced texts are 256 tokens: the prompts have more.
    assert never["kl_tokens"] == reuse["kl_tokens"] == 512
    assert list(found["layers"]["reuse"]) == [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    for figures in found["layers"]["reuse"].values():
        assert 0 < figures["hit_rate"] <= 1 and 0 < figures["error_p50"] < figures["error_p95"]
        # Every step is audited, so that the heads' rates are exact.
        assert (
            np.mean(figures["head_hit_rates"]) == pytest.approx(figures["hit_rate"])
            and max(figures["head_hit_rates"]) <= 1 + 1e-9
        )
    assert all("error_p50" not in figures for figures in found["layers"]["never"].values())
    lags, chains = found["histograms"]["reuse"]["lag"], found["histograms"]["reuse"]["chain"]
    assert sum(count for _, count in lags) == sum(count for _, count in chains) > 0
    assert all(count == 0 for edge, count in lags if edge is None or edge > 64)  # the window
    assert [(r["group"], r["length"], r["requests"]) for r in found["rows"][:2]] == [
        ("ruler", 1200, 1),
        ("prompts", None, 2),
    ]
    # What the prompts took to read is part of the time.
    assert all(0 < row["tokens_per_s"] < 1e5 for row in found["totals"] + found["rows"])
    rows = results.read_samples(out / "reuse")
    seconds, tokens = sum(row["seconds"] for row in rows), sum(len(row["tokens"]) for row in rows)
    assert reuse["tokens_per_s"] == pytest.approx(tokens / seconds)
    for name in ("trade.png", "scores.png", "reads.png", "layers.png", "heads.png", "histograms.png", "divergence.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "| never | 3 (1 scored) |" in (out / "results.md").read_text()
    assert not list(out.glob("*/forced.npz")) and len((out / "never" / "samples.jsonl").read_text().splitlines()) == 3


def test_scores_are_drawn_wherever_their_interval_ends():
    """Of 25 right answers Wilson's interval ends at 1 - 1e-16, below their mean."""
    ends = {(score, n): statistics.wilson(score, n) for score in (0.0, 1.0) for n in range(1, 40)}
    assert any(high < score or low > score for (score, _), (low, high) in ends.items())
    rows = [
        {"configuration": "exact", "task": f"{n}", "length": None, "score": score, "score_low": low, "score_high": high}
        for (score, n), (low, high) in ends.items()
    ]
    assert plots.scores({"tasks": rows, "totals": [{"configuration": "exact"}]}) is not None


@pytest.mark.parametrize("timed", [False, True])
def test_what_a_configuration_saves_and_costs_is_one_point(timed):
    """Results of before speed was counted have no panel of it."""
    found = json.loads((ROOT / "examples" / "results" / "testbed-eval-h200.json").read_text())
    if timed:
        for i, row in enumerate(found["totals"], 1):
            row["tokens_per_s"] = 100.0 * i
    figure = plots.trade(found)
    points = [[line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"] for axes in figure.axes]
    share = [100 * row.get("read_share", 1.0) for row in found["totals"]]
    height = [[100 * row["score"] for row in found["totals"]], [row.get("tokens_per_s") for row in found["totals"]]]
    assert points == [[[list(point)] for point in zip(share, heights)] for heights in height[: 1 + timed]]
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["exact", *(f"MAC ({name})" for name in found["configuration"]["mac"])]
    assert plots.trade({"totals": [{"configuration": "exact"}]}) is None
