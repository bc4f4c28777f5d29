"""Seeded tasks with known answers, at any length: retrieval as in RULER, long plans as in LongGenBench.

A task makes an `Episode`: a context, and one or more questions about it. The first question becomes a
`Sample`; training asks the others as well.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from vllm_mac.tools.eval import prose

TASKS = {
    "niah_single": "one number to find in prose",
    "niah_multikey": "many keys with a number each in prose, one of them asked",
    "niah_multivalue": "a key that has four numbers, at four places, all of them asked",
    "niah_multiquery": "many keys with a number each in prose, four of them asked",
    "variable_tracking": "a value copied from variable to variable: name all five that hold it",
    "common_words": "the five words of a list that occur ten times as often as the others",
    "frequent_words": "the three most frequent words of a text whose word counts fall off as 1 / rank^2",
    "plan": "a plan of 80 lines, each by rules and events from the prompt",
    "plan_long": "a plan of 300 lines, each by rules and events from the prompt",
}
LONG = ("plan", "plan_long")
RULER = tuple(name for name in TASKS if name not in LONG)

# One fact in so many characters.
KEY_SPACING, VALUES_SPACING, CHAIN_SPACING = 600, 4000, 2500
VALUES, QUERIES, HOPS, COMMON, FREQUENT, UNCOMMON = 4, 4, 5, 5, 3, 80
COMMON_RATIO, FREQUENT_WORDS = 10, 300
PLAN_LINES = {"plan": 80, "plan_long": 300}
ATTRIBUTES = (
    "badge number|order number|pass code|phone number|recipe number|room number|safe code|serial number|ticket number|"
    "track number"
).split("|")
# Title, unit of a line, events, places.
PLANS = [
    (
        "watch plan of the lighthouse",
        "Day",
        "fire drill|lamp repair|school visit|boat inspection|storm test|paint work|fog horn test|supply run",
        "gallery|harbour|lamp room|store room|north gate|boat house|south pier|engine room",
    ),
    (
        "cleaning plan of the tower",
        "Floor",
        "window wash|carpet change|pest control|lift service|pipe repair|light check|alarm test|wall painting",
        "red wing|blue wing|green wing|white wing|east side|west side|inner ring|outer ring",
    ),
    (
        "tour plan of the circus",
        "Week",
        "gala night|tent repair|horse fair|parade|press day|new act|free show|costume check",
        "river camp|hill camp|town square|old market|fair ground|castle park|lake side|rail yard",
    ),
    (
        "course plan of the garden school",
        "Lesson",
        "seed swap|quiz|field trip|guest talk|soil test|harvest|tool check|pond cleaning",
        "glass house|rose bed|herb bed|fruit yard|long lawn|tool shed|bee house|kitchen plot",
    ),
]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and the answers that a right reply has.

    task        key of TASKS
    prompt      the user's message: context and question
    answers     each must occur in prefix + reply, as whole words (plans: as whole lines); empty without a right answer
    max_tokens  the most tokens of a reply
    prefix      beginning of the reply, given to the model
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    max_tokens: int
    prefix: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, the given beginning of its reply, the rest of a right reply, and the answers in it."""

    question: str
    prefix: str
    reply: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Episode:
    """A context and questions about it."""

    context: str
    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> str:
        return f"{self.context}\n\n{self.turns[0].question}"


def make(task: str, draw: random.Random, length: int, count: Callable[[str], int]) -> Sample:
    """A sample whose prompt has at most `length` tokens by `count`, and as many of them as its units allow.

    Raises ValueError for an unknown task, and for a length that the task's facts alone exceed.
    """
    _known(task)
    seed = draw.getrandbits(64)
    built = fit(task, lambda chars: episode(task, random.Random(seed), chars), length, count)
    turn = built.turns[0]
    return Sample(task, built.prompt, turn.answers, count(turn.reply) * 5 // 4 + 64, turn.prefix)


def fit(task: str, build: Callable[[int], Episode], length: int, count: Callable[[str], int]) -> Episode:
    """An episode whose prompt has at most `length` tokens by `count`, and as many of them as `build` reaches.

    build(chars): an episode of about `chars` characters; the shortest one for 0. Raises ValueError where the shortest
    one is too long.
    """
    shortest = build(0)
    least = count(shortest.prompt)
    if least > length:
        raise ValueError(f"{task} needs a length of at least {least} tokens, got {length}")
    best, most = shortest, least
    ratio = len(shortest.prompt) / least
    chars = int(length * ratio)
    for _ in range(6):
        tried = build(chars)
        tokens = count(tried.prompt)
        if most < tokens <= length:
            best, most = tried, tokens
        if 0.985 * length <= tokens <= length:
            break
        ratio = len(tried.prompt) / tokens
        # After a prompt that was too long, aim lower, so that rounding cannot keep it too long.
        chars += int((length * (0.995 if tokens > length else 0.998) - tokens) * ratio)
    return best


def score(sample: Sample, reply: str) -> float:
    """Share of the answers that occur in the sample's prefix and the reply: 0 to 1."""
    text = sample.prefix + reply
    if sample.task in LONG:
        lines = {" ".join(line.lower().split()) for line in text.splitlines()}
        found = sum(answer.lower() in lines for answer in sample.answers)
    else:
        found = sum(
            re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None
            for answer in sample.answers
        )
    return found / len(sample.answers)


def episode(task: str, draw: random.Random, chars: int, turns: int = 1) -> Episode:
    """An episode whose prompt has about `chars` characters, or as few as its facts need, and up to `turns` questions."""
    _known(task)
    return _MAKERS[task](draw, chars, turns)


def _known(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")


def _hidden(draw: random.Random, chars: int, facts: list[str], opening: str, turns: list[Turn]) -> Episode:
    """Facts, in random order within prose that fills the prompt up to `chars` characters."""
    draw.shuffle(facts)
    spent = len(opening) + len(turns[0].question) + 4 + sum(len(fact) + 1 for fact in facts)
    sentences = prose.scatter(draw, facts, prose.sentences(draw, chars - spent))
    return Episode(f"{opening}\n\n{prose.paragraphs(sentences)}", tuple(turns))


_READ = "Somewhere in the text below there are facts about {}. Remember them."


def needles(draw: random.Random, chars: int, turns: int, keys: int) -> Episode:
    """Each key has one number; a question asks one key."""
    attribute = draw.choice(ATTRIBUTES)
    names = prose.keys(draw, keys)
    pairs = list(zip(names, prose.numbers(draw, keys), strict=True))
    facts = [f"The {attribute} of the {key} is {number}." for key, number in pairs]
    asked = [
        Turn(f"What is the {attribute} of the {key}?", f"The {attribute} of the {key} is", f" {number}.", (number,))
        for key, number in draw.sample(pairs, min(turns, keys))
    ]
    return _hidden(draw, chars, facts, _READ.format(f"{attribute}s"), asked)


def _single(draw: random.Random, chars: int, turns: int) -> Episode:
    return needles(draw, chars, turns, 1)


def _multikey(draw: random.Random, chars: int, turns: int) -> Episode:
    return needles(draw, chars, turns, max(4, chars // KEY_SPACING))


def _multivalue(draw: random.Random, chars: int, turns: int) -> Episode:
    return several_values(draw, chars, turns, 1 + max(0, chars) // VALUES_SPACING)


def several_values(draw: random.Random, chars: int, turns: int, keys: int) -> Episode:
    """Each key has four numbers; a question asks one key."""
    attribute = draw.choice(ATTRIBUTES)
    names = prose.keys(draw, keys)
    values = prose.numbers(draw, VALUES * len(names))
    facts = [f"One {attribute} of the {names[i // VALUES]} is {value}." for i, value in enumerate(values)]
    opening = _READ.format(f"{attribute}s")
    asked = f"Which {VALUES} {attribute}s does the {{}} have?"
    built = _hidden(draw, chars, facts, opening, [Turn(asked.format(names[0]), "", "", ())])
    turns_made = []
    for name in names[:turns]:
        # In the order of the text.
        found = tuple(re.findall(rf"of the {name} is (\d+)\.", built.context))
        turns_made.append(
            Turn(asked.format(name), f"The {attribute}s of the {name} are", f" {', '.join(found)}.", found)
        )
    return Episode(built.context, tuple(turns_made))


def _multiquery(draw: random.Random, chars: int, turns: int) -> Episode:
    return several_keys(draw, chars, turns, max(QUERIES, chars // KEY_SPACING))


def several_keys(draw: random.Random, chars: int, turns: int, keys: int) -> Episode:
    """Each key has one number; a question asks four keys."""
    attribute = draw.choice(ATTRIBUTES)
    names = prose.keys(draw, keys)
    pairs = list(zip(names, prose.numbers(draw, len(names)), strict=True))
    facts = [f"The {attribute} of the {key} is {number}." for key, number in pairs]
    draw.shuffle(pairs)
    asked = []
    for start in range(0, min(len(pairs) - QUERIES + 1, turns * QUERIES), QUERIES):
        four = pairs[start : start + QUERIES]
        *others, last = [f"the {key}" for key, _ in four]
        sentences = " ".join(f"The {attribute} of the {key} is {number}." for key, number in four)
        prefix = f"The {attribute} of the {four[0][0]} is"
        asked.append(
            Turn(
                f"Say the {attribute}s of {', '.join(others)} and {last}, a sentence for each.",
                prefix,
                sentences.removeprefix(prefix),
                tuple(number for _, number in four),
            )
        )
    return _hidden(draw, chars, facts, _READ.format(f"{attribute}s"), asked)


def _variables(draw: random.Random, chars: int, turns: int) -> Episode:
    return variables(draw, chars, turns, 1 + max(0, chars) // CHAIN_SPACING)


def variables(draw: random.Random, chars: int, turns: int, chains: int) -> Episode:
    """Each chain hands a number through five variables; a question asks one chain."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: dict[str, None] = {}
    while len(names) < chains * HOPS:
        names["".join(draw.choices(letters, k=5))] = None
    left = list(names)
    values = prose.numbers(draw, chains, (5, 5))
    queues, asked = [], []
    for i, value in enumerate(values):
        chain = left[i * HOPS : (i + 1) * HOPS]
        queues.append([f"Put {source} into {target}." for source, target in zip([value, *chain], chain)])
        question = (
            f"Which {HOPS} variables hold {value} in the end? "
            f"Follow it from one to the next, as in: {value} into first into second."
        )
        asked.append(Turn(question, f"{value} into", f" {' into '.join(chain)}.", tuple(chain)))
    # A chain keeps its order; chains mix.
    facts = []
    while queues:
        queue = draw.choice(queues)
        facts.append(queue.pop(0))
        if not queue:
            queues.remove(queue)
    opening = "The text below puts values into variables, and variables into variables. Remember what goes where."
    spent = len(opening) + len(asked[0].question) + 4 + sum(len(fact) + 1 for fact in facts)
    sentences = prose.scatter(draw, facts, prose.sentences(draw, chars - spent))
    return Episode(f"{opening}\n\n{prose.paragraphs(sentences)}", tuple(asked[:turns]))


def _words(
    draw: random.Random, chars: int, opening: str, question: str, prefix: str, words: list[str], weights: list, n: int
) -> Episode:
    """A list of `words` with counts in proportion to `weights`; the first `n`, in order, are asked."""
    room = chars - len(opening) - len(question) - 4
    each = sum(weight * (len(word) + 1) for word, weight in zip(words, weights, strict=True))
    # A word's count is at least its share at the least size, where the rarest word occurs once.
    scale = max(1 / min(weights), room / each)
    counts = [int(weight * scale) for weight in weights]
    spare = room - sum(times * (len(word) + 1) for word, times in zip(words, counts, strict=True))
    for i in draw.sample(range(n, len(words)), len(words) - n):
        if spare < len(words[i]) + 1:
            break
        counts[i] += 1
        spare -= len(words[i]) + 1
    text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
    draw.shuffle(text)
    answers = tuple(words[:n])
    return Episode(f"{opening}\n\n{' '.join(text)}", (Turn(question, prefix, f" {', '.join(answers)}.", answers),))


def _common(draw: random.Random, chars: int, turns: int) -> Episode:
    words = prose.coined(draw, COMMON + UNCOMMON)
    words[:COMMON] = sorted(words[:COMMON])
    # As many uncommon words as there is room for while each occurs once, up to UNCOMMON.
    room = (chars - 250) // 8 - COMMON * COMMON_RATIO
    words = words[: COMMON + min(UNCOMMON, max(20, room))]
    weights = [COMMON_RATIO] * COMMON + [1] * (len(words) - COMMON)
    return _words(
        draw,
        chars,
        f"Below is a long list of words. {COMMON} of them occur about {COMMON_RATIO} times as often as the others.",
        f"Which {COMMON} words are the most common ones in the list? Name them in alphabetical order.",
        f"The {COMMON} most common words are",
        words,
        weights,
        COMMON,
    )


def _frequent(draw: random.Random, chars: int, turns: int) -> Episode:
    opening = "Below is a text in a secret code. Watch how often its words occur."
    question = f"Which {FREQUENT} coded words occur most often? Name the most frequent one first."
    # The first ranks of 1 / rank^2, as many as there is room for while the rarest occurs once.
    words = prose.coined(draw, max(8, min(FREQUENT_WORDS, int((max(0, chars) / 13) ** 0.5))))
    room = chars - len(opening) - len(question) - 4
    while len(words) > 8 and sum(len(words) ** 2 // i**2 * (len(word) + 1) for i, word in enumerate(words, 1)) > room:
        words.pop()
    weights = [1 / rank**2 for rank in range(1, len(words) + 1)]
    return _words(
        draw, chars, opening, question, f"The {FREQUENT} most frequent words are", words, weights, FREQUENT
    )  # fmt: skip


def plan(draw: random.Random, chars: int, lines: int) -> Episode:
    """A plan of so many lines (30 or more), and one that ends it.

    With the last line the prompt also tells the model where to stop.
    """
    title, unit, *choices = draw.choice(PLANS)
    kinds, places = (choice.split("|") for choice in choices)
    people = draw.sample(prose.PEOPLE, 10)
    decades = [draw.choice(places) for _ in range(lines // 10 + 1)]
    events = {i: draw.choice(kinds) for i in sorted(draw.sample(range(1, lines + 1), lines // 5))}
    first = draw.randrange(1, lines // 10 - 1) * 10
    closed = range(first, first + 10 * draw.randint(1, 2))

    def line(i: int) -> str:
        if i in closed:
            return f"{unit} {i}: closed"
        return f"{unit} {i}: {events.get(i, 'none')}, {people[i % 10]}, {decades[i // 10]}"

    last = f"{unit} {lines + 1}: end"
    written = [*map(line, range(1, lines + 1)), last]
    rules = [
        f"Who is on duty goes by the last digit of the {unit.lower()}.",
        *(f"{unit} ending in {digit}: {person}" for digit, person in enumerate(people)),
        "Where the duty is changes every ten.",
        *(f"{unit} {max(1, 10 * ten)} to {10 * ten + 9}: {place}" for ten, place in enumerate(decades)),
        "Nothing takes place at all in one range.",
        f"{unit} {closed.start} to {closed.stop - 1}: closed",
        "These have an event, all others have none.",
        *(f"{unit} {i}: {event}" for i, event in events.items()),
    ]
    opening = f"Here are the rules for the {title}. Notes that have nothing to do with it follow them."
    question = (
        f"Write the {title}: {unit.lower()} 1 to {lines}, one line each and in order, in the form "
        f"`{unit} 0: event, person, place`. Where there is no event, write `none` for it; "
        f"where all is closed, write `{unit} 0: closed`. End with the line `{last}`. Write nothing else."
    )
    text = "\n".join(rules)
    notes = prose.paragraphs(prose.sentences(draw, chars - len(opening) - len(text) - len(question) - 6))
    context = "\n\n".join(part for part in (opening, text, notes) if part)
    prefix = f"{unit} 1:"
    reply = "\n".join(written).removeprefix(prefix)
    return Episode(context, (Turn(question, prefix, reply, tuple(written)),))


def _plan_of(lines: int) -> Callable[[random.Random, int, int], Episode]:
    return lambda draw, chars, turns: plan(draw, chars, lines)


_MAKERS: dict[str, Callable[[random.Random, int, int], Episode]] = {
    "niah_single": _single,
    "niah_multikey": _multikey,
    "niah_multivalue": _multivalue,
    "niah_multiquery": _multiquery,
    "variable_tracking": _variables,
    "common_words": _common,
    "frequent_words": _frequent,
} | {task: _plan_of(lines) for task, lines in PLAN_LINES.items()}
