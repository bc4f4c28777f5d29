"""Tasks on the standard library's docstrings and sources: seeded, of the length asked, without a right answer."""

import ast
import json
import os
import random
import re
import subprocess
import sys

import pytest

from vllm_mac.tools.eval import EvalError, requests, stdlib

TOKEN = re.compile(r"\w{1,5}|[^\w\s]|\s\s+")  # about as long as a tokenizer's


def tokens(text: str) -> int:
    return len(TOKEN.findall(text))


def make(task, seed=0, length=8192, count=tokens):
    return stdlib.make(task, random.Random(seed), length, count, 100)


def titles(task, prompt):
    """Chapters or files that a prompt holds, in order."""
    pattern = r"^# (\S+)\n\n" if task == "manual" else r"^==> (\S+) <==$"
    return re.findall(pattern, prompt, re.MULTILINE)


def asked(prompt):
    return re.search(r"the (?:chapter|file) `([^`]+)`", prompt.rpartition("\n\n")[2])[1]


@pytest.mark.parametrize("task", stdlib.REAL)
def test_a_seed_decides_everything(task):
    """In another process too, whose hashes and caches are others."""
    first = make(task, 1)
    assert first == make(task, 1) and first.prompt != make(task, 2).prompt
    code = (
        "import json, random, sys; from vllm_mac.tools.eval import stdlib; import test_tasks_real as t\n"
        f"print(json.dumps(t.make({task!r}, 1).prompt))"
    )
    folder = os.path.dirname(__file__)
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join((os.path.dirname(folder), folder)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == first.prompt


@pytest.mark.parametrize("count", [len, tokens])
@pytest.mark.parametrize("length", [4096, 16384, 131072])
@pytest.mark.parametrize("task", stdlib.REAL)
def test_prompts_have_the_length_asked(task, length, count):
    prompt = make(task, 3, length, count).prompt
    assert 0.97 * length <= count(prompt) <= length
    assert count is len or len(titles(task, prompt)) >= 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("task", stdlib.REAL)
def test_what_is_asked_about_is_there_whole(task, seed):
    prompt = make(task, seed).prompt
    found = titles(task, prompt)
    assert len(set(found)) == len(found) and asked(prompt) in found[:-1]  # the last one is cut short
    if task == "codebase":
        for name in found[:-1]:
            text = prompt.split(f"==> {name} <==\n")[1].split("\n==> ")[0]
            functions = [
                node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
            assert len(functions) >= stdlib.ENTRIES
    else:
        assert prompt.count("\n## ") >= stdlib.ENTRIES * (len(found) - 1)


def test_a_chapter_holds_what_is_public_and_documented():
    name, text, entries = stdlib._chapter("heapq.py")
    assert name == "heapq" and text.startswith("# heapq\n\nHeap queue algorithm") and entries == text.count("\n## ") > 5
    assert (
        "\n## heapq.heappush(heap, item)\n\nPush item onto heap" in text
        and "_siftdown" not in text.partition("\n## ")[2]
    )
    assert (
        "\n## class queue.Queue(" in stdlib._chapter("queue.py")[1]
        and "\n## queue.Queue.put(self, item, " in stdlib._chapter("queue.py")[1]
    )


def test_modules_are_read_and_not_imported():
    """`this` prints and `antigravity` opens a browser when they are imported."""
    code = (
        "import sys, random; from vllm_mac.tools.eval import stdlib\n"
        "before = set(sys.modules)\n"
        "for path in (*stdlib.files()[::10], 'this.py', 'antigravity.py'): stdlib._chapter(path); stdlib._source(path)\n"
        "print(len(stdlib.files()), sorted(set(sys.modules) - before))"
    )
    folder = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": folder},
        capture_output=True,
        text=True,
        check=True,
    )
    count, names = done.stdout.split(" ", 1)
    assert int(count) > 150 and "antigravity" not in names and "this" not in names.replace("'", " ").split()


def test_only_public_modules_of_the_library_count():
    files = stdlib.files()
    assert {"heapq.py", "email/message.py", "json/__init__.py"} <= set(files) and list(files) == sorted(files)
    for path in files:
        assert not {"test", "tests", "site-packages", "tkinter", "idlelib"} & set(path.split("/")), path
        assert all(part == "__init__.py" or not part.startswith("_") for part in path.split("/")), path


def test_requests_have_no_score_and_keep_their_length():
    class Words:
        chat_template = None

        def encode(self, text, add_special_tokens=True):
            return TOKEN.findall(text)

    encoder = requests.Encoder(Words(), 10_000)
    some = list(requests.generated(requests.names("real"), (4096, 9000), 2, 0, encoder))
    assert [r.id for r in some[:3]] == ["real/4096/manual/0", "real/4096/manual/1", "real/4096/codebase/0"] and len(
        some
    ) == 8
    for request in some:
        assert 0.96 * request.length <= request.total <= request.length and request.max_tokens == stdlib.REPLY
        assert request.answers == () and requests.score(request, "anything") is None
    assert list(requests.phases(some)) == ["real-4096", "real-9000"]
    short = list(requests.generated(("manual",), (1200,), 1, 0, encoder))
    assert short[0].max_tokens == 300  # a quarter


@pytest.mark.parametrize("task", stdlib.REAL)
def test_lengths_that_cannot_be(task, monkeypatch):
    with pytest.raises(ValueError, match=f"^{task} needs a length of at least .* got 20$"):
        make(task, 0, 20)
    monkeypatch.setattr(stdlib, "files", lambda: ("heapq.py", "queue.py"))
    with pytest.raises(
        ValueError, match=f"^{task} is at most .* tokens long: the standard library in .* has no more, got 131072$"
    ):
        make(task, 0, 131072)
    monkeypatch.setattr(stdlib, "files", lambda: ())
    with pytest.raises(ValueError, match=f"^{task} needs the standard library's sources, got none of use in "):
        make(task)


def test_groups_name_the_tasks():
    assert requests.names("real") == ("manual", "codebase") and set(requests.names("real")) <= set(
        requests.names("all")
    )
    with pytest.raises(
        EvalError,
        match=r"--tasks: received 'real2'; choose from all, ruler, long, real, niah_single, .*, manual, codebase$",
    ):
        requests.names("real2")
