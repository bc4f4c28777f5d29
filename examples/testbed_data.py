"""What the testbed model is trained on: seeded synthetic documents, and the text of Python's standard library.

A document is a list of pieces (text, kind of target). Characters 0..255 stand for bytes, characters from 256
on for the tokenizer's specials, so that a piece's tokens are its code points.
"""

import multiprocessing
import queue
import random
import sysconfig
from pathlib import Path

import numpy as np
from byte_model import BYTES, SPECIALS

from vllm_mac.tools.eval import prose, tasks

BOS, EOS, _, _, _, USER, ASSISTANT, END = (chr(BYTES + i) for i in range(len(SPECIALS)))
# Kinds of target tokens; each kind's mean loss has its own weight.
KINDS = ("noise", "lookup", "long", "text", "asked")
NOISE, LOOKUP, LONG, TEXT, ASKED = range(len(KINDS))
KIND_SHIFT = 9  # a token and its kind share an int16: token | kind << 9
Piece = tuple[str, int]

# Share of the training time, and from there on the shares of the row lengths.
CURRICULUM = [
    (0.00, {1024: 1.0}),
    (0.30, {1024: 0.4, 4096: 0.6}),
    (0.45, {1024: 0.15, 4096: 0.35, 16384: 0.5}),
    (0.62, {4096: 0.25, 16384: 0.75}),
    (0.80, {4096: 0.1, 16384: 0.5, 32768: 0.4}),
]


def row_length(draw: random.Random, progress: float) -> int:
    """Length of the next rows, `progress` (0 to 1) into the training."""
    shares = [shares for start, shares in CURRICULUM if progress >= start][-1]
    return draw.choices(list(shares), list(shares.values()))[0]


def chat(episode: tasks.Episode, kind: int = LOOKUP) -> list[Piece]:
    """An episode's questions as turns of a conversation, as the chat template writes them."""
    pieces, before = [], f"{BOS}{USER}{episode.context}\n\n"
    for turn in episode.turns:
        pieces.append((f"{before}{turn.question}{END}{ASSISTANT}{turn.prefix}", NOISE))
        pieces.append((turn.reply + END, kind))
        before = USER
    return [*pieces, (EOS, NOISE)]


def as_asked(draw: random.Random, room: int) -> list[Piece]:
    """A RULER-style task as the evaluation asks it, with further questions where there is room."""
    task = draw.choice(tasks.RULER)
    turns = draw.choice((1, 1, 4, max(1, room // 800)))
    reply = {"niah_multiquery": 600, "niah_multivalue": 250, "variable_tracking": 300}.get(task, 160)
    return chat(tasks.episode(task, draw, room - turns * reply, turns), ASKED)


def dense(draw: random.Random, room: int) -> list[Piece]:
    """The same tasks with many facts, all of them asked: every row trains retrieval many times over."""
    share = draw.uniform(0.4, 0.7)
    kind = draw.choice(("one", "one", "one", "four", "values", "values", "variables", "variables"))
    left = int(room * (1 - share))
    chars = int(room * share)
    if kind == "one":
        keys = max(2, min(left // 130, chars // 90))
        return chat(tasks.needles(draw, chars, keys, keys))
    if kind == "four":
        turns = max(1, min(left // 520, chars // 360))
        return chat(tasks.several_keys(draw, chars, turns, turns * tasks.QUERIES))
    if kind == "values":
        keys = max(1, min(left // 180, chars // 260))
        return chat(tasks.several_values(draw, chars, keys, keys))
    chains = max(1, min(left // 260, chars // 160))
    return chat(tasks.variables(draw, chars, chains, chains))


def recall(draw: random.Random, room: int) -> list[Piece]:
    """Prose in which facts are told, and told again later: the second time is to be known."""
    attribute = draw.choice(tasks.ATTRIBUTES)
    n = max(2, room // draw.choice((90, 120, 200)))
    facts = list(zip(prose.keys(draw, n), prose.numbers(draw, n), strict=True))
    between = prose.sentences(draw, room)
    sparse = draw.random()
    pieces, told, left = [(BOS, NOISE)], [], room
    while left > 0 and between:
        if draw.random() < sparse:
            added = [(between.pop() + " ", NOISE)]
        elif told and (draw.random() < 0.6 or not facts):
            key, number = draw.choice(told)
            added = [(f"The {attribute} of the {key} is", NOISE), (f" {number}.", LOOKUP), (" ", NOISE)]
        else:
            told.append(facts.pop())
            added = [("The {} of the {} is {}. ".format(attribute, *told[-1]), NOISE)]
        pieces += added
        left -= sum(len(text) for text, _ in added)
    return pieces


def pairs(draw: random.Random, room: int) -> list[Piece]:
    """Lines of keys and values, without anything between them; more than half have been there before."""
    before, middle, after = draw.choice([("", "=", "\n"), ('"', '": ', ",\n"), ("", " -> ", "\n"), ("", ": ", "\n")])
    n = max(4, room // 40)
    coin = draw.choice((prose.coined, prose.keys, prose.numbers))
    keys = coin(draw, min(n, 2000))
    values = draw.choice((prose.coined, prose.numbers))(draw, len(keys))
    fresh = list(zip(keys, values, strict=True))
    draw.shuffle(fresh)
    again = draw.uniform(0.4, 0.75)
    pieces, told, left = [(BOS, NOISE)], [], room
    while left > 0:
        if told and (not fresh or draw.random() < again):
            key, value = draw.choice(told)
            pieces += [(before + key + middle, NOISE), (value + after, LOOKUP)]
        else:
            key, value = fresh.pop()
            told.append((key, value))
            pieces.append((before + key + middle + value + after, NOISE))
        left -= len(before + key + middle + value + after)
    return pieces


def plan(draw: random.Random, room: int) -> list[Piece]:
    # Of any length: of a few lengths a model learns to stop there, whatever was asked.
    lines = draw.randint(30, max(30, min(draw.choice((60, 120, 300)), room // 55)))
    return chat(tasks.plan(draw, room - 36 * lines, lines), LONG)


def copy(draw: random.Random, room: int) -> list[Piece]:
    room = min(room, 6000) // 2 - 20
    text = draw.choice(
        (
            lambda: " ".join(prose.coined(draw, max(2, room // 8))),
            lambda: " ".join(prose.numbers(draw, max(2, room // 7))),
            lambda: prose.paragraphs(prose.sentences(draw, max(120, room))),
            lambda: "\n".join(prose.keys(draw, max(2, min(400, room // 15)))),
        )
    )()[:room]
    return [(f"{BOS}{USER}Repeat this text.\n\n{text}{END}{ASSISTANT}", NOISE), (text + END, LONG), (EOS, NOISE)]


def arithmetic(draw: random.Random, room: int) -> list[Piece]:
    """A table of sums or products, or an account whose balance runs on."""
    asked = "Write on, row by row."
    rows = max(3, min(room // 20, 300))
    kind, step, start = draw.choice("+x="), draw.randint(2, 19), draw.randint(1, 90)
    if kind == "=":
        lines, balance = [], start
        for i in range(1, rows + 1):
            change = draw.randint(1, 9)
            lines.append((f"{i}. {balance} + {change} =", f" {balance + change}\n"))
            balance += change
    else:
        lines = [(f"{i} {kind} {step} =", f" {i + step if kind == '+' else i * step}\n") for i in range(1, rows + 1)]
    pieces = [(f"{BOS}{USER}{asked}{END}{ASSISTANT}", NOISE)]
    for line, result in lines:
        pieces += [(line, NOISE), (result, LONG)]
    return [*pieces, (END + EOS, NOISE)]


def table(draw: random.Random, room: int) -> list[Piece]:
    """A numbered table, every row of which goes by the rules above it."""
    columns = [
        [w.capitalize() for w in prose.coined(draw, draw.choice((2, 3, 5, 10)))] for _ in range(draw.randint(1, 4))
    ]
    rules = "\n".join(f"Column {i + 1} repeats: {', '.join(column)}" for i, column in enumerate(columns))
    width = sum(len(column[0]) + 3 for column in columns) + 7
    rows = max(3, min((room - len(rules) - 60) // width, 400))
    lines = [f"| {i} | {' | '.join(column[i % len(column)] for column in columns)} |" for i in range(rows)]
    ask = f"{BOS}{USER}{rules}\n\nWrite the table with rows 0 to {rows - 1}.{END}{ASSISTANT}"
    return [(ask, NOISE), ("\n".join(lines) + END, LONG), (EOS, NOISE)]


def code(draw: random.Random, room: int) -> list[Piece]:
    """Small functions and their calls; a call names what was defined."""
    names = [key.replace(" ", "_") for key in prose.keys(draw, max(2, min(160, room // 200)))]
    made, text, left = [], [(BOS, NOISE)], room
    while left > 0:
        if made and (draw.random() < 0.5 or not names):
            name, values, factor = draw.choice(made)
            text += [(f"assert {name}({', '.join(values)}) ==", TEXT), (f" {values[0]} * {factor}\n", LOOKUP)]
            left -= 60
        else:
            name, values, factor = names.pop(), prose.coined(draw, draw.randint(1, 3)), str(draw.randint(2, 9999))
            made.append((name, values, factor))
            body = f"def {name}({', '.join(values)}):\n    result = {values[0]} * {factor}\n    return result\n\n\n"
            text.append((body, TEXT))
            left -= len(body)
    return text


def library() -> str:
    """Source and documentation of Python's standard library (PSF licence), without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return "".join(p.read_bytes().decode("latin-1") for p in files)


SMALL, SHORT_PLAN = 800, 2000  # tokens: no task's facts and questions fit below
SMALL_MIX = {recall: 3, pairs: 4, copy: 2, arithmetic: 1, table: 1, code: 1}
MIX = {as_asked: 30, dense: 20, recall: 10, pairs: 11, plan: 11, copy: 3, arithmetic: 2, table: 3, code: 3}
TEXT_WEIGHT = 7


def row(draw: random.Random, length: int, text: str) -> list[Piece]:
    """Documents of together `length` tokens or somewhat more."""
    pieces, left = [], length
    while left > 0:
        # Most documents fill the row: it is the long distances that are to be learned.
        room = left if left < SMALL or draw.random() < 0.7 else draw.randint(SMALL, left)
        mix = MIX if room >= SMALL else SMALL_MIX
        maker = draw.choices([*mix, None], [*mix.values(), TEXT_WEIGHT])[0]
        if maker is plan and room < SHORT_PLAN:
            maker = table
        if maker is None:
            start = draw.randrange(max(1, len(text) - room))
            found = [(BOS + text[start : start + min(room, 4096)], TEXT)]
        else:
            found = maker(draw, room - 2)
        pieces += found
        left -= sum(len(piece) for piece, _ in found)
    return pieces


def encode(pieces: list[Piece]) -> np.ndarray:
    """Tokens with their kinds, int16 [tokens]."""
    tokens = np.frombuffer("".join(text for text, _ in pieces).encode("utf-16-le"), dtype="<i2")
    kinds = np.repeat(np.array([kind for _, kind in pieces], np.int16), [len(text) for text, _ in pieces])
    return tokens | (kinds << KIND_SHIFT)


def rows(draw: random.Random, length: int, n: int, text: str) -> np.ndarray:
    """int16 [n, length + 1]: the last column is the last token's target."""
    return np.stack([encode(row(draw, length + 1, text))[: length + 1] for _ in range(n)])


class Feed:
    """Workers that make rows ahead of time. Fork it before CUDA starts."""

    def __init__(self, tokens: int, workers: int, run: int, longest: int):
        context = multiprocessing.get_context("fork")
        self.progress = context.Value("d", 0.0)
        self._ready = context.Queue(maxsize=24)
        text = library()
        self._workers = [
            context.Process(target=self._work, args=(tokens, f"train/{run}/{i}", longest, text), daemon=True)
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def __len__(self) -> int:
        return len(self._workers)

    def _work(self, tokens: int, seed: str, longest: int, text: str) -> None:
        made = 0
        while True:
            draw = random.Random(f"{seed}/{made}")
            length = min(longest, row_length(draw, self.progress.value))
            self._ready.put(rows(draw, length, tokens // length, text))
            made += 1

    def take(self) -> np.ndarray:
        """The next rows [n, length + 1], n * length tokens. Raises RuntimeError when the workers died."""
        while True:
            try:
                return self._ready.get(timeout=30)
            except queue.Empty:
                if not any(worker.is_alive() for worker in self._workers):
                    raise RuntimeError("all data workers ended") from None

    def stop(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
