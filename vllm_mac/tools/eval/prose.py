"""Synthetic English prose from a small grammar: the haystack that the tasks hide their facts in."""

import random
import re

# Keys never occur in the prose: their words are kept out of the grammar.
KEY_ADJECTIVES = (
    "amber ancient azure bitter blunt bold brass brave brisk bronze calm carved cedar chalk civic clever cobalt copper "
    "coral cosmic crimson crystal curious dapper daring desert dusty eager ebony elastic emerald faded fearless fierce "
    "flint floral frosty gallant gentle ghostly gilded glassy golden granite grumpy hasty hazel hollow humble icy idle "
    "indigo iron ivory jade jolly keen lacquer lavish leaden lemon lilac limber lofty loyal lunar magenta marble mellow "
    "misty modest mossy mystic nimble noble oaken olive onyx opal pearly pewter plucky polar proud purple quartz rapid "
    "regal rugged russet rusty sable saffron scarlet secret shiny silken silver sleepy solar spry stark stormy sturdy "
    "subtle sunny swift tawny teal tender timid topaz tribal upbeat urban vast velvet violet vivid wicker witty woolen "
    "zealous zesty"
).split()
KEY_NOUNS = (
    "acorn anchor antler anvil arrow badger banjo barrel basket beacon beetle bison bobcat bonnet bottle bucket buckle "
    "bugle cactus camel candle canoe carpet castle cello chisel cobra comet compass condor cougar cradle crane crayon "
    "cricket crown cymbal dagger dolphin domino donkey dragon drum eagle easel engine falcon feather ferret fiddle flute "
    "fossil gazelle gecko geyser giraffe goblet gopher guitar hammer hamster harp hatchet hawk helmet heron hornet hyena "
    "iguana inkwell jackal jaguar jigsaw kayak kettle kitten ladder lantern lemur leopard lizard llama lobster locket "
    "lynx magnet magpie mallet mammoth mantis marlin meteor mitten monkey moose muffin narwhal needle ocelot octopus "
    "orchid osprey otter paddle panda panther parrot pebble pelican pencil penguin piano pigeon pillow piston planet "
    "puffin puma puppet quail rabbit raccoon radish raven ribbon robin rocket saddle salmon scooter scorpion shovel "
    "sickle sparrow spider spindle squirrel stallion statue sundial tambourine teapot thimble tiger toucan tractor "
    "trumpet tulip turnip turtle unicorn vase violin viper vulture walnut walrus warbler weasel whistle wolf wombat "
    "yak zebra zeppelin zither"
).split()
PEOPLE = (
    "Ada Agnes Albert Alma Anton Astrid Basil Beatrix Bruno Carla Cecil Clara Conrad Dora Edgar Edith Elias Elsa Emil "
    "Enid Ernst Esther Felix Flora Frieda Gerda Gregor Greta Hanna Harald Hector Hilda Hugo Ida Ingrid Irma Ivan Jonas "
    "Judith Karl Klara Lars Leona Linus Lotte Magda Marta Milo Mina Nadia Nils Nora Olga Oscar Otto Paula Petra Rosa "
    "Rufus Selma Simon Stella Sven Thea Theo Tilda Ulric Vera Viktor Walter Wanda Yvonne Zelda"
).split()

_WORDS = {
    "n": "archive bakery bench bridge building cabin canal carriage cellar chapel chart clinic clock college corner "
    "corridor cottage counter courtyard crossing dairy ditch dock document door drawer exhibit factory farm fence ferry "
    "field fountain gallery garage garden gate greenhouse hall harbour hedge hill hotel house inn island kitchen "
    "laboratory lake lane ledger letter library lift lighthouse list lodge machine map market meadow mill mine "
    "museum newspaper office orchard oven park path pavement pharmacy picture pier plan platform pond porch port press "
    "quarry railway record reservoir restaurant river road roof room route school shelf shed shop shore square stable "
    "staircase station stone store street studio table theatre tower town tram tunnel valley village wall warehouse "
    "well wharf window workshop yard",
    "a": "bare black bright broad brown busy careful cheap clean closed cold common cool crowded damp dark deep dry dull "
    "early empty expensive familiar famous far fine flat foreign fresh full good green grey heavy high huge late light "
    "little local long loud low main narrow near new northern odd old open ordinary pale patient plain pleasant poor "
    "private public quiet rare red regular rough round rural safe shallow short simple slow small smooth soft southern "
    "square steep straight strange strong tall thick thin tidy warm weak wet white wide wooden young",
    "v": "admired built checked cleaned closed copied counted crossed described drew entered fixed forgot found guarded "
    "improved inspected kept left liked located lost managed measured mentioned moved noticed opened ordered owned "
    "painted passed photographed planned praised preferred rebuilt remembered rented repaired reported restored saw "
    "sketched sold studied surveyed swept visited watched",
    "i": "appeared arrived changed continued departed dreamt failed grew hesitated laughed listened paused remained rested "
    "returned slept smiled sneezed spoke stayed stopped succeeded travelled waited walked wandered woke worked",
    "d": "again alone already badly calmly carefully cheerfully daily early easily gladly hardly late mostly nearly "
    "never often patiently politely quickly quietly rarely seldom silently slowly smoothly sometimes soon suddenly "
    "thoroughly twice usually weekly yesterday",
    "p": "artist baker barber builder butcher captain carpenter cashier clerk cook curator dentist director doctor driver "
    "editor engineer farmer fisherman gardener guest guide inspector janitor journalist judge lawyer librarian "
    "mason mayor mechanic merchant miller neighbour nurse officer painter pilot plumber poet porter postman priest "
    "printer professor sailor secretary shepherd singer student surveyor tailor teacher tourist trader visitor watchman "
    "weaver writer",
    "t": "after breakfast|after dark|after the storm|all summer|at dawn|at dusk|at lunch|at midnight|at noon|before sunrise|"
    "before the meeting|by the evening|during the holidays|during the strike|every spring|every week|for a month|"
    "for many years|in autumn|in the afternoon|in the end|in the rain|in winter|last year|later that day|most days|"
    "on Friday|on Monday|on Sunday|on Thursday|on Tuesday|on market days|once a year|over the weekend|since the war|"
    "that morning|this year|towards the end|until the harvest|when the snow melted",
    "m": "bread|butter|canvas|cheese|clay|cloth|coal|coffee|flour|fruit|fuel|gravel|hay|honey|ink|leather|linen|milk|mortar|"
    "oil|paper|rope|salt|sand|soap|steel|straw|sugar|tar|tea|timber|tobacco|water|wax|wheat|wine|wire|wool|yarn",
    "r": "above|across from|against|along|around|behind|below|beside|beyond|close to|inside|near|next to|on top of|opposite|"
    "outside|past|under",
    "c": "although|because|before|but|even though|once|since|so|though|until|when|whenever|where|while",
    "N": "|".join(PEOPLE),
}
_FORMS = """
The {a} {n} {r} the {n} {i} {t}.
{N} {v} the {a} {n} {t}.
The {p} {d} {v} the {n} {r} the {a} {n}.
Nobody {v} the {n} {t}, {c} the {p} {i} {d}.
{N} and {N} {v} the {n} together {t}.
There was {m} in the {n}, and {m} {r} the {a} {n}.
{c2} the {p} {i}, the {p} {d} {v} the {n}.
A {a} {n} and a {a} {n} were all that the {p} {v}.
Every {p} in the {n} {v} the {a} {m} {t}.
The {n} was {a}, the {n} was {a}, and the {n} between them was {a}.
{N} bought {m} from the {p} {r} the {n}.
It was {t} that {N} {d} {v} the {a} {n}.
What the {p} {v} was a {n}, not a {n}.
The {a} {p} {i} {d} {r} the {n}.
Most of the {m} came from the {n} {r} the {a} {n}.
The {p} asked {N} whether the {n} was still {a}.
{N} wrote about the {n} {t}, and about the {m} too.
Some said that the {p} {v} the {n}; others said that {N} did.
The {n} sold {m}, {m} and {m} {t}.
{N}, the {a} {p}, {d} {i} {t}.
If the {n} had been {a}, the {p} would have stayed {r} it.
The {p} and the {p} shared a {a} {n} {r} the {n}.
No {n} was as {a} as the one that {N} {v}.
{c2} the {m} ran out, {N} {i} {r} the {n}.
The road to the {n} was {a} and {a} {t}.
A {p} from the {n} {d} {v} our {a} {n}.
{N} left the {m} {r} the {n} and {i} {d}.
How {a} the {n} looked {t}, {c} nobody {v} it!
The {p} {v} it {d}, and the {p} {v} it {d} as well.
Two {a} things were kept in the {n}: {m} and {m}.
The {n} belongs to a {p} who {d} {v} the {n}.
{t2}, {N} {v} the {n} and {i}.
{t2}, the {a} {n} smelled of {m}.
The price of {m} rose {t}, {c} the {n} {r} the {n} was {a}.
Was the {n} {a} when {N} {i}?
{N} compared the {a} {n} with the {a} one {r} the {n}.
The {p} trusted {N} with the {m}, {c} {N} {i} {d}.
Neither the {p} nor {N} {v} the {a} {n} {t}.
Visitors {d} {v} the {n}, the {n} and the {a} {n}.
The old rules of the {n} did not allow {m} {r} the {n}.
{N} said little about the {p}, and less about the {a} {m}.
On the wall of the {n} hung a {a} picture of a {n}.
The {n} closed {t}; the {n} {r} it stayed {a}.
To reach the {n}, the {p} {v} a {a} {n} and a {n}.
""".strip().splitlines()

_LISTS = {kind: words.split("|") if "|" in words else words.split() for kind, words in _WORDS.items()}
_LISTS |= {f"{kind}2": [word[0].upper() + word[1:] for word in _LISTS[kind]] for kind in "ct"}
# "a {a}" becomes one slot, whose words bring their article.
_LISTS |= {
    f"{article}_{kind}": [f"{article}n {word}" if word[0] in "aeiou" else f"{article} {word}" for word in _LISTS[kind]]
    for kind in "nap"
    for article in "aA"
}
_FORMS = [re.sub(r"\b([aA]) \{([nap])\}", r"{\1_\2}", form) for form in _FORMS]
_TEMPLATES = [(re.sub(r"\{\w+\}", "%s", form), tuple(re.findall(r"\{(\w+)\}", form))) for form in _FORMS]
_DRAWN = 64  # words of each kind drawn at a time; one call for many is several times faster
_PARAGRAPH = 8  # sentences


def sentences(draw: random.Random, chars: int) -> list[str]:
    """Random sentences of together at most `chars` characters, a separator after each included."""
    waiting: dict[str, list[str]] = {kind: [] for kind in _LISTS}
    made, left = [], chars
    while True:
        for template, kinds in draw.choices(_TEMPLATES, k=_DRAWN):
            words = []
            for kind in kinds:
                stock = waiting[kind]
                if not stock:
                    stock = waiting[kind] = draw.choices(_LISTS[kind], k=_DRAWN)
                words.append(stock.pop())
            sentence = template % tuple(words)
            left -= len(sentence) + 1
            if left < 0:
                return made
            made.append(sentence)


def paragraphs(pieces: list[str]) -> str:
    """Joins sentences with spaces, and with a line break after every eighth."""
    return "\n".join(" ".join(pieces[i : i + _PARAGRAPH]) for i in range(0, len(pieces), _PARAGRAPH))


def scatter(draw: random.Random, facts: list[str], prose: list[str]) -> list[str]:
    """The prose's sentences with the facts between them, in their order, at uniformly random places."""
    places = sorted(draw.randrange(len(prose) + 1) for _ in facts)
    pieces, start = [], 0
    for fact, place in zip(facts, places, strict=True):
        pieces += prose[start:place]
        pieces.append(fact)
        start = place
    return pieces + prose[start:]


def keys(draw: random.Random, n: int) -> list[str]:
    """`n` different names such as "amber falcon"; their nouns differ too, while there are enough nouns."""
    if n > len(KEY_NOUNS) * len(KEY_ADJECTIVES):
        raise ValueError(f"at most {len(KEY_NOUNS) * len(KEY_ADJECTIVES)} different keys can be made, not {n}")
    if n <= len(KEY_NOUNS):
        return [f"{draw.choice(KEY_ADJECTIVES)} {noun}" for noun in draw.sample(KEY_NOUNS, n)]
    pairs = draw.sample(range(len(KEY_NOUNS) * len(KEY_ADJECTIVES)), n)
    nouns = len(KEY_NOUNS)
    return [f"{KEY_ADJECTIVES[pair // nouns]} {KEY_NOUNS[pair % nouns]}" for pair in pairs]


def numbers(draw: random.Random, n: int, digits: tuple[int, int] = (4, 7)) -> list[str]:
    """`n` different numbers of so many digits (least, most)."""
    found: dict[str, None] = {}
    while len(found) < n:
        size = draw.randint(*digits)
        found[str(draw.randrange(10 ** (size - 1), 10**size))] = None
    return list(found)


_ONSETS = "b br c cl d dr f fl g gr h j k l m n p pl qu r s sh sl st t tr v w z".split()
_VOWELS = "a e i o u ai ea oo ou".split()
_CODAS = "b ck d ff g l ll m n nd nt p r rn s sh st t x".split()


def coined(draw: random.Random, n: int) -> list[str]:
    """`n` different made-up words of two syllables, such as "plorain"."""
    found: dict[str, None] = {}
    while len(found) < n:
        first, second = draw.choices(_ONSETS, k=2)
        vowels = draw.choices(_VOWELS, k=2)
        found[first + vowels[0] + second + vowels[1] + draw.choice(_CODAS)] = None
    return list(found)
