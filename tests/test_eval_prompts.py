"""Prompts of `vllm-mac eval`, generated and from files, and the texts that an engine is forced to decode."""

import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_mac.tools.eval import (
    EvalError,
    longbench,
    requests,
    statistics,
    stdlib,
    tasks,
)

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
    from support.engine import engine
    from support.tiny_models import write
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
