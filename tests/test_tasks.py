"""The evaluation's tasks: seeded, of the length asked, with answers that their prompts determine."""

import os
import random
import re
import subprocess
import sys

import pytest

from support import ROOT
from vllm_mac.tools.eval import prose, tasks

RETRIEVAL = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")


def words(text: str) -> int:
    return len(text.split())


def make(task, seed=0, length=6000, count=len):
    return tasks.make(task, random.Random(seed), length, count)


def right_reply(task, seed, chars):
    """The reply that the episode itself holds for its first question, after the prefix."""
    return tasks.episode(task, random.Random(seed), chars).turns[0]


def test_the_groups_are_the_tasks():
    assert {*tasks.RULER, *tasks.LONG} == tasks.TASKS.keys()
    assert not set(tasks.RULER) & set(tasks.LONG)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_seed_decides_everything(task):
    assert make(task, 1) == make(task, 1)
    assert make(task, 1).prompt != make(task, 2).prompt
    assert make(task, 1).answers != make(task, 2).answers


@pytest.mark.parametrize("count", [len, words])
@pytest.mark.parametrize("length", [5000, 16384, 60000])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_prompts_have_the_length_asked(task, length, count):
    calls = []

    def counted(text):
        calls.append(text)
        return count(text)

    sample = make(task, 3, length, counted)
    assert 0.98 * length <= count(sample.prompt) <= length
    assert len(calls) <= 10


def test_frequent_words_have_the_length_asked_whatever_is_drawn():
    """Few words occur once; their number must give way where they are long."""
    shares = [len(make("frequent_words", seed, 16384).prompt) / 16384 for seed in range(60)]
    assert min(shares) >= 0.98 and max(shares) <= 1


@pytest.mark.parametrize("task", tasks.TASKS)
def test_too_short_a_length_names_the_least(task):
    with pytest.raises(ValueError, match=f"^{task} needs a length of at least .* got 20$") as error:
        make(task, 0, 20)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(make(task, 0, least).prompt) <= least
    with pytest.raises(ValueError, match=task):
        make(task, 0, least - 1)


def test_an_unknown_task_names_the_choices():
    with pytest.raises(ValueError, match="niah_single.*got 'needle'"):
        make("needle")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_right_reply_scores_one_and_wrong_ones_less(task):
    for seed in range(3):
        # A seed for the sample draws the episode's own seed first.
        turn = right_reply(task, random.Random(seed).getrandbits(64), 6000)
        sample = tasks.Sample(task, "", turn.answers, 1, turn.prefix)
        assert tasks.score(sample, turn.reply) == 1
        assert tasks.score(sample, "") == 0
        lost = turn.answers[-1]
        assert tasks.score(sample, turn.reply.replace(lost, "?")) == pytest.approx(1 - 1 / len(turn.answers))
        # A longer number or name that holds the answer is not the answer.
        assert tasks.score(sample, turn.reply.replace(lost, f"1{lost}9")) < 1


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_reply_fits_its_limit(task):
    draw = random.Random(5)
    sample = make(task, 5)
    turn = right_reply(task, draw.getrandbits(64), 6000)
    assert sum(len(answer) for answer in sample.answers) < sample.max_tokens
    assert len(turn.reply) < sample.max_tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("task", RETRIEVAL)
def test_each_number_asked_is_told_once_and_under_its_key(task, seed):
    sample = make(task, seed, 16384)
    question = sample.prompt.rsplit("\n\n", 1)[1]
    told = re.findall(r"(?:The|One) [a-z ]+? of the (\w+ \w+) is (\d+)\.", sample.prompt)
    keys = [key for key in dict.fromkeys(key for key, _ in told) if f"the {key}" in question]
    assert len(keys) == (4 if task == "niah_multiquery" else 1)
    assert sorted(number for key, number in told if key in keys) == sorted(sample.answers)
    for answer in sample.answers:
        assert len(re.findall(rf"\b{answer}\b", sample.prompt)) == 1
    if task in ("niah_multikey", "niah_multiquery"):
        assert len(told) > 20


@pytest.mark.parametrize("seed", range(5))
def test_variables_follow_from_the_text(seed):
    sample = make("variable_tracking", seed, 16384)
    into = dict(re.findall(r"Put (\w+) into (\w+)\.", sample.prompt))
    at = re.search(r"hold (\d+) in the end", sample.prompt)[1]
    chain = []
    while at in into:
        chain.append(at := into[at])
    assert tuple(chain) == sample.answers and len(chain) == 5 and len(into) > 5


@pytest.mark.parametrize("length", [2000, 16384])
@pytest.mark.parametrize("task, n", [("common_words", 5), ("frequent_words", 3)])
def test_the_words_asked_are_the_most_frequent(task, n, length):
    sample = make(task, 1, length)
    listed = sample.prompt.split("\n\n")[1].split()
    often = sorted(set(listed), key=listed.count, reverse=True)
    assert listed.count(often[n - 1]) > 1.5 * listed.count(often[n])
    assert sample.answers == tuple(sorted(often[:n]) if task == "common_words" else often[:n])


@pytest.mark.parametrize("task", tasks.LONG)
def test_plans_follow_from_their_rules(task):
    """Every line is rebuilt from the prompt alone."""
    sample = make(task, 2, 12000)
    rules = sample.prompt.split("\n\n")[1]
    unit, count = re.search(r"in the form `(\w+) 0", sample.prompt)[1], tasks.PLAN_LINES[task]
    people = {int(d): who for d, who in re.findall(rf"^{unit} ending in (\d): (.+)$", rules, re.M)}
    ranges = [(int(a), int(b), what) for a, b, what in re.findall(rf"^{unit} (\d+) to (\d+): (.+)$", rules, re.M)]
    events = {int(i): what for i, what in re.findall(rf"^{unit} (\d+): (.+)$", rules, re.M)}
    *lines, last = sample.answers
    assert len(lines) == count and len(events) == count // 5
    assert last == f"{unit} {count + 1}: end" and f"End with the line `{last}`" in sample.prompt
    for i, line in enumerate(lines, 1):
        inside = [what for a, b, what in ranges if a <= i <= b]
        if "closed" in inside:
            assert line == f"{unit} {i}: closed"
        else:
            assert line == f"{unit} {i}: {events.get(i, 'none')}, {people[i % 10]}, {inside[0]}"


def test_prose_is_varied_and_holds_no_key():
    text = prose.sentences(random.Random(0), 200_000)
    assert sum(len(sentence) + 1 for sentence in text) <= 200_000
    assert len(set(text)) > 0.98 * len(text)
    used = set(re.findall(r"[a-z]+", " ".join(text).lower()))
    assert len(used) > 500 and not used & {*prose.KEY_NOUNS, *prose.KEY_ADJECTIVES}
    assert not re.search(r"\ba [aeiou]", " ".join(text))


def test_the_training_script_writes_what_transformers_loads(tmp_path):
    """Two steps on a tiny model; the folder's logits are those of the model that was trained."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    command = [
        sys.executable,
        "examples/train_testbed.py",
        "--tiny",
        "--device",
        "cpu",
        "--steps",
        "2",
        "--samples",
        "1",
    ]
    command += ["--workers", "1", "--folder", str(folder), "--checkpoint", str(tmp_path / "checkpoint.pt")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step      2" in done.stdout

    sys.path.insert(0, str(ROOT / "examples"))
    import train_testbed

    ours = train_testbed.read(folder, train_testbed.TINY, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = make("niah_multikey", 0, 1000)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": sample.prompt}], add_generation_prompt=True, return_dict=False
    )
    expected = [ord(c) for c in f"{train_testbed.data.BOS}{train_testbed.data.USER}{sample.prompt}"]
    assert ids[: len(expected)] == expected and ids[-1] == ord(train_testbed.data.ASSISTANT)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        a, b = ours.logits(ours.hidden(tokens)), theirs(tokens).logits[0]
        # The same sums in another order, in float32: what float64 leaves of theirs is one such error, and two may meet.
        exact = theirs.double()(tokens).logits[0]
    error = (b - exact).abs().max().item()
    assert b.std() > 0.01
    assert (a - b).abs().max().item() <= 4 * error + 1e-6
    assert theirs.generation_config.eos_token_id == [train_testbed.EOS, train_testbed.END]
