"""LongBench v2 with chain of thought, from a local copy of its JSON."""

import json
import re
from pathlib import Path

from vllm_mac.tools.eval import EvalError

CHOICES = "ABCD"
FIELDS = ("question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "context")
MAX_TOKENS = 1024

_STATED = re.compile(r"(?:correct answer|answer)(?: is|:)\s*\(?([A-D])\b")


def load(path: Path) -> list[dict]:
    """The questions of a file: a list of objects with FIELDS. Raises EvalError for anything else."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"--longbench: {path}: {error}") from error
    if not isinstance(items, list) or not items:
        raise EvalError(f"--longbench: {path}: must be a JSON list of questions, as LongBench v2 is distributed")
    for i, item in enumerate(items):
        missing = [name for name in FIELDS if not isinstance(item, dict) or not isinstance(item.get(name), str)]
        if missing:
            raise EvalError(f"--longbench: {path}: question {i} lacks the text {', '.join(missing)}")
        if item["answer"] not in tuple(CHOICES):
            raise EvalError(f"--longbench: {path}: question {i}: answer {item['answer']!r}; choose from A, B, C, D")
    return items


def prompt(item: dict, context: str) -> str:
    choices = "\n".join(f"({letter}) {item[f'choice_{letter}'].strip()}" for letter in CHOICES)
    return (
        f"Below is a text, then a question about it with four choices.\n\n<text>\n{context.strip()}\n</text>\n\n"
        f"Question: {item['question'].strip()}\n{choices}\n\n"
        "Think it through step by step, using the text. Finish with a line of exactly this form, with one "
        'letter in the brackets: "The correct answer is (A)".'
    )


def answer(reply: str) -> str | None:
    """The letter that a reply states last, or None."""
    stated = _STATED.findall(reply.replace("*", ""))
    return stated[-1] if stated else None
