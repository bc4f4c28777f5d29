"""Tasks on texts that people wrote: docstrings and sources of the running Python's standard library.

The tasks have no right answer: a reply is compared with exact attention's. On one version of Python the seed decides
everything. Files are read, never imported. Left out are parts that distributions package separately or generate.
"""

import ast
import functools
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_mac.tools.eval.tasks import Episode, Sample, Turn, fit

TASKS = {
    "manual": "a reference manual made of docstrings: write a long tutorial on one of its chapters",
    "codebase": "source files: describe each function of one of them in turn",
}
REAL = tuple(TASKS)
REPLY = 1024  # most tokens of a reply; it is at most a quarter of the length
LEAST = 1000  # characters of text in the shortest prompt
ENOUGH = 0.9  # share of the length; an error where the library has less text
ENTRIES = 3  # fewest docstrings of a chapter, or functions of a file
SHORTEST, SMALLEST_CAP = 800, 6000  # characters of a chapter or file

_LEFT_OUT = {
    "test", "tests", "site-packages", "dist-packages", "lib-dynload", "tkinter", "turtledemo", "turtle.py", "idlelib", "lib2to3",
    "distutils", "ensurepip", "encodings", "pydoc_data", "sitecustomize.py", "usercustomize.py",
}  # fmt: skip
_OPENING = {
    "manual": "Below is a reference manual, and after it a request about one of its chapters.",
    "codebase": "Below are source files of one code base, and after them a request about one of them.",
}
_REQUEST = {
    "manual": (
        "Write a long tutorial on the chapter `{}` of the manual above, for programmers who have never used it. Say first what it is "
        "for. Then take its entries one after another, in the manual's order: explain each in full sentences and give a short example "
        "of its use. Keep to what the manual says, and go on to the chapter's last entry."
    ),
    "codebase": (
        "Go through the file `{}` above from its beginning to its end. For each function and method, in the order of the file, write "
        "its name and two or three sentences: what it does, what its arguments are, what it returns or raises, and which others it "
        "calls. Leave none out."
    ),
}


def make(task: str, draw: random.Random, length: int, count: Callable[[str], int], reply: int) -> Sample:
    """A sample without answers, whose prompt has at most `length` tokens by `count`. reply: most tokens of a reply.

    Raises ValueError where the task alone exceeds `length`, and where the standard library has too little text.
    """
    seed = draw.getrandbits(64)
    # So a prompt has several chapters, whether a token is one character or five.
    cap = max(SMALLEST_CAP, length)
    prompt = fit(task, lambda chars: episode(task, random.Random(seed), chars, cap), length, count).prompt
    if (tokens := count(prompt)) < ENOUGH * length:
        raise ValueError(
            f"{task} is at most {tokens} tokens long: the standard library in {_root()} has no more, got {length}"
        )
    return Sample(task, prompt, (), reply, "")


def episode(task: str, draw: random.Random, chars: int, cap: int) -> Episode:
    """About `chars` characters of chapters or files in random order. Each has at most `cap`; the last one is cut.

    The request is about a complete one, if there is any. Raises ValueError where there is no text at all.
    """
    room, kept, left = max(LEAST, chars - len(_OPENING[task]) - len(_REQUEST[task])), [], 0
    for title, text in _texts(task, draw, cap):
        kept.append((title, text[: room - left]))
        left += len(text) + 1
        if left >= room:
            break
    if not kept:
        raise ValueError(f"{task} needs the standard library's sources, got none of use in {_root()}")
    title, last = kept[-1]
    kept[-1] = title, last[: last.rfind("\n") + 1]
    asked = draw.choice([title for title, _ in kept[:-1]] or [title])
    context = "\n".join([_OPENING[task] + "\n", *(text for _, text in kept)])
    return Episode(context.rstrip(), (Turn(_REQUEST[task].format(asked), "", "", ()),))


def _texts(task: str, draw: random.Random, cap: int) -> Iterator[tuple[str, str]]:
    """Title and text of chapters or files in random order; each is read only when it is needed."""
    for path in draw.sample(files(), len(files())):
        title, text, entries = (_chapter if task == "manual" else _source)(path)
        if entries >= ENTRIES and SHORTEST <= len(text) <= cap:
            yield title, text


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@functools.cache
def files() -> tuple[str, ...]:
    """The library's public modules, sorted, as paths below its folder."""
    found = (path.relative_to(_root()) for path in _root().rglob("*.py"))
    return tuple(sorted(path.as_posix() for path in found if _public(path)))


def _public(path: Path) -> bool:
    hidden = any(part.startswith("_") and part != "__init__.py" for part in path.parts)
    built = any(part.startswith("config-") for part in path.parts)
    return not hidden and not built and not _LEFT_OUT.intersection(path.parts)


@functools.cache
def _parsed(path: str) -> tuple[str, ast.Module | None]:
    with tokenize.open(_root() / path) as file:  # uses the encoding that the file declares
        text = file.read()
    try:
        return text, ast.parse(text)
    except SyntaxError:  # some files have one on purpose
        return text, None


@functools.cache
def _source(path: str) -> tuple[str, str, int]:
    """Name, text and number of functions of a file."""
    text, tree = _parsed(path)
    functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree)) if tree else 0
    return path, f"==> {path} <==\n{text.rstrip()}\n", functions


@functools.cache
def _chapter(path: str) -> tuple[str, str, int]:
    """Name, text and number of entries of a module's chapter: its docstring, then those of its public members."""
    _, tree = _parsed(path)
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    entries = list(_entries(tree.body, f"{name}.")) if tree else []
    about = tree and ast.get_docstring(tree)
    return name, "\n\n".join([f"# {name}", *([about] if about else []), *entries]) + "\n", len(entries)


def _entries(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Signature and docstring of public classes, functions and methods that have one, in the order of the source."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        is_class = isinstance(node, ast.ClassDef)
        if docstring := ast.get_docstring(node):
            of = ", ".join(map(ast.unparse, node.bases)) if is_class else ast.unparse(node.args)
            yield f"## {'class ' * is_class}{prefix}{node.name}({of})\n\n{docstring}"
        if is_class:
            yield from _entries(node.body, f"{prefix}{node.name}.")
