"""The prompts of an evaluation: generated tasks, JSON lines and LongBench v2, as token ids."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_mac.tools.eval import EvalError, longbench, stdlib, tasks

GROUPS = {"ruler": tasks.RULER, "long": tasks.LONG, "real": stdlib.REAL}
TASKS = tuple(task for group in GROUPS.values() for task in group)
PROMPTS, LONGBENCH = "prompts", "longbench"  # groups that come from files
PROMPT_TOKENS = 256  # generated for a line of a file without max_tokens


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt.

    ids: its tokens, with the chat template and the `prefix` of the reply. length: the tokens that prompt and reply may
    have together, or None. answers: texts that a right reply has; empty where nothing is scored.
    """

    id: str
    group: str
    task: str
    length: int | None
    ids: tuple[int, ...]
    max_tokens: int
    prompt: str
    answers: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def total(self) -> int:
        return len(self.ids) + self.max_tokens


class Encoder:
    """Turns texts into prompts of a model. tokenizer: vLLM's. longest: tokens of the model's longest sequence."""

    def __init__(self, tokenizer, longest: int):
        self.tokenizer, self.longest = tokenizer, longest

    def prompt(self, text: str, prefix: str = "") -> tuple[int, ...]:
        """The tokens of a prompt: `text` in the chat template, if the model has one, then the beginning of the reply."""
        if not getattr(self.tokenizer, "chat_template", None):
            return tuple(self.tokenizer.encode(text + prefix))
        chat = [{"role": "user", "content": text}]
        whole = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer.encode(whole + prefix, add_special_tokens=False))

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def cut(self, text: str, most: int) -> str:
        """The text without its middle, so that `most` tokens are left."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= most:
            return text
        head = most - most // 2
        return self.tokenizer.decode(ids[:head]) + self.tokenizer.decode(ids[len(ids) - most // 2 :])


def score(request: Request, reply: str) -> float | None:
    """The score of a reply, from 0 to 1; None where the request has no answers."""
    if not request.answers:
        return None
    if request.group == LONGBENCH:
        return float(longbench.answer(reply) == request.answers[0])
    if request.group == PROMPTS:
        return sum(answer.lower() in reply.lower() for answer in request.answers) / len(request.answers)
    sample = tasks.Sample(request.task, request.prompt, request.answers, request.max_tokens, request.prefix)
    return tasks.score(sample, reply)


def generated(
    names: tuple[str, ...], lengths: tuple[int, ...], samples: int, seed: int, encoder: Encoder
) -> Iterator[Request]:
    """`samples` requests for each task and length. A length includes prompt, template and reply."""
    for length in lengths:
        if names and length > encoder.longest:
            raise EvalError(f"--lengths: received {length}; the model's longest sequence is {encoder.longest} tokens")
    for group, members in GROUPS.items():
        for length in lengths:
            for task in [name for name in names if name in members]:
                for i in range(samples):
                    request = _sample(group, task, length, f"{seed}/{task}/{length}/{i}", encoder)
                    yield replace(request, id=f"{group}/{length}/{task}/{i}")


def _sample(group: str, task: str, length: int, seed: str, encoder: Encoder) -> Request:
    """A sample that has at most `length` tokens with template and reply. The first try measures these two."""
    size = length
    for spare in range(4):
        try:
            if task in stdlib.TASKS:
                sample = stdlib.make(task, random.Random(seed), size, encoder.count, min(stdlib.REPLY, length // 4))
            else:
                sample = tasks.make(task, random.Random(seed), size, encoder.count)
        except ValueError as error:
            raise EvalError(f"--lengths: {length} is too short for task {task} and its reply: {error}") from error
        ids = encoder.prompt(sample.prompt, sample.prefix)
        request = Request("", group, task, length, ids, sample.max_tokens, sample.prompt, sample.answers, sample.prefix)
        if request.total <= length:
            return request
        # In another try the reply may be longer and tokens may merge otherwise: leave more space each time.
        size = length - (request.total - encoder.count(sample.prompt)) - 8 * spare
    raise EvalError(
        f"--lengths: {length}: no prompt for task {task} that fits with its reply; the last took {request.total}"
    )


def from_lines(path: Path, encoder: Encoder) -> Iterator[Request]:
    """A request for each line {"prompt": ..., "answers": [...], "max_tokens": ...} of a file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise EvalError(f"--prompts: {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--prompts: {path}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise EvalError(f"{where}: not JSON: {error}") from error
        text, answers, most = _line(item, where)
        ids = encoder.prompt(text)
        if len(ids) + most > encoder.longest:
            raise EvalError(
                f"{where}: the prompt has {len(ids)} tokens and {most} may follow; "
                f"the model's longest sequence is {encoder.longest}"
            )
        yield Request(f"{PROMPTS}/{number}", PROMPTS, PROMPTS, None, ids, most, text, answers)


def _line(item, where: str) -> tuple[str, tuple[str, ...], int]:
    fields = ("prompt", "answers", "max_tokens")
    if not isinstance(item, dict):
        raise EvalError(f"{where}: received {item!r}; must be an object with {', '.join(fields)}")
    if unknown := sorted(item.keys() - set(fields)):
        raise EvalError(f"{where}: unknown key {unknown[0]!r}; choose from {', '.join(fields)}")
    text, answers, most = item.get("prompt"), item.get("answers", []), item.get("max_tokens", PROMPT_TOKENS)
    if not isinstance(text, str) or not text:
        raise EvalError(f"{where}: prompt: received {text!r}; must be a text")
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer for answer in answers):
        raise EvalError(f"{where}: answers: received {answers!r}; must be a list of texts")
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise EvalError(f"{where}: max_tokens: received {most!r}; must be a whole number of at least 1")
    return text, tuple(answers), most


def from_longbench(path: Path, encoder: Encoder) -> Iterator[Request]:
    """A request for each question. A context that is too long is cut in the middle, as in the benchmark."""
    for i, item in enumerate(longbench.load(path)):
        context, room = item["context"], encoder.longest - longbench.MAX_TOKENS
        text = longbench.prompt(item, context)
        ids, most = encoder.prompt(text), None
        while len(ids) > room:
            # Encoded again, the cut text may have a few more tokens.
            most = (encoder.count(context) if most is None else most) - (len(ids) - room)
            if most < 1:
                raise EvalError(
                    f"--longbench: {path}: question {i} does not fit without its context: the model's longest sequence is "
                    f"{encoder.longest} tokens, {longbench.MAX_TOKENS} of them for the reply"
                )
            text = longbench.prompt(item, encoder.cut(context, most))
            ids = encoder.prompt(text)
        yield Request(
            f"{LONGBENCH}/{i}", LONGBENCH, LONGBENCH, None, ids, longbench.MAX_TOKENS, text, (item["answer"],)
        )


def names(text: str) -> tuple[str, ...]:
    """The tasks that a list such as `ruler,long` means. Raises EvalError for unknown ones."""
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part == "all":
            found += TASKS
        elif part in GROUPS:
            found += GROUPS[part]
        elif part in TASKS:
            found.append(part)
        else:
            raise EvalError(f"--tasks: received {part!r}; choose from all, {', '.join(GROUPS)}, {', '.join(TASKS)}")
    return tuple(dict.fromkeys(found))


def _json(request: Request) -> str:
    # dataclasses.asdict copies the ids one by one.
    return json.dumps({field.name: getattr(request, field.name) for field in fields(request)})


def save(requests: list[Request], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for request in requests:
            file.write(_json(request) + "\n")


def load(path: Path) -> list[Request]:
    found = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            found.append(Request(**item | {"ids": tuple(item["ids"]), "answers": tuple(item["answers"])}))
    return found


def digest(requests: list[Request]) -> str:
    """A hash of everything in the requests that a reply or a score depends on."""
    whole = hashlib.sha256()
    for request in requests:
        whole.update(_json(request).encode())
    return whole.hexdigest()[:16]


def phases(requests: list[Request]) -> dict[str, list[Request]]:
    """Requests that run together and have their own counters: one group of tasks at one length."""
    found: dict[str, list[Request]] = {}
    for request in requests:
        name = request.group if request.length is None else f"{request.group}-{request.length}"
        found.setdefault(name, []).append(request)
    return found


def chosen(requests: list[Request], count: int) -> list[Request]:
    """`count` of the requests, evenly spread over them."""
    count = min(count, len(requests))
    return [requests[(2 * i + 1) * len(requests) // (2 * count)] for i in range(count)]


def prepare(model: str, engine: dict, make: Callable[[Encoder], list[Request]], quiet: bool = True) -> list[Request]:
    """The requests that `make` makes for a model. engine: arguments of `vllm.LLM`.

    Raises EvalError where the model or its tokenizer cannot be read.
    """
    from vllm_mac.tools.tokenizer_files import has_tokenizer

    folder = Path(model).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        raise EvalError(
            f"--model: no folder {model!r}; choose a folder with config.json, or a name on the Hugging Face hub"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise EvalError(f"--model: {model} has no config.json; choose a folder in Hugging Face's format")
    if not has_tokenizer(engine.get("tokenizer") or model):
        raise EvalError(
            f"--model: {model} has no tokenizer (tokenizer.json or the like), and prompts are text; add the model's"
        )
    if quiet:
        import logging

        logging.getLogger("vllm").setLevel(logging.WARNING)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import cached_tokenizer_from_config

    with_model: dict[str, Any] = {"model": model, **engine}
    try:
        arguments = EngineArgs(**with_model)
    except (ValueError, TypeError) as error:
        raise EvalError(f"--engine: received {engine}; {error}") from error
    try:
        config = arguments.create_model_config()
        tokenizer = cached_tokenizer_from_config(config)
    except (OSError, ValueError) as error:  # as raised by Transformers and vLLM
        raise EvalError(f"--model: {model} cannot be read: {error}") from error
    if tokenizer is None:
        raise EvalError("--engine: skip_tokenizer_init is set, and prompts are text; leave it out")
    return make(Encoder(tokenizer, config.max_model_len))
