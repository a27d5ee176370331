"""The little world of the quickstart: what people have, where they go, and how one says so in English.

A *fact* is (kind, person, value), for example ("carry", "Mira", "a green kite"). Every kind has ways of stating it and
ways of recalling it later; `stories.py` makes the pre-training text of both, `make_data.py` asks about it.
"""

import random
from dataclasses import dataclass

from names import NamePool, words

COLOURS = words(
    "red green blue yellow white black brown grey orange purple pink golden silver turquoise crimson violet "
    "scarlet amber ivory copper"
)
THINGS = words(
    "kite lamp basket drum rope kettle ladder flute umbrella bucket blanket candle mirror hammer clock whistle "
    "barrel saddle violin letter box book jar cup bowl spoon bell flag tent net broom brush pencil map mask chair "
    "stool table pillow ribbon chain ring coin key lantern shovel saw cart wheel boat trumpet guitar puppet doll "
    "ball balloon telescope compass bottle plate knife thimble button cushion carpet curtain sack purse suitcase "
    "wallet"
)
GARMENTS = words("coat scarf hat shirt cap dress jacket cloak belt sweater apron vest")
PLACE_WORDS = words("old new little big quiet stone wooden empty sunny dark cold northern southern lower upper hidden")
PLACES = words(
    "mill bridge market harbour garden school library station bakery forge chapel barn orchard tower well field "
    "forest lake river beach castle inn kitchen cellar attic museum theatre stable workshop square hill meadow "
    "cave island farm vineyard lighthouse windmill courtyard greenhouse"
)
NUMBERS = words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
GOODS = words(
    "apples pears plums eggs nails candles onions potatoes lemons cherries walnuts buttons stamps tiles bricks "
    "cups roses tulips melons carrots mushrooms biscuits pancakes ribbons marbles postcards spoons bottles seeds "
    "figs"
)
FLAVOURS = words(
    "plum apple onion carrot mushroom cheese honey lemon cherry walnut pumpkin potato garlic ginger pepper"
)
WARMTHS = words("warm cold sweet salty spicy fresh creamy thick")
DISHES = words("soup pie cake bread stew pudding salad tea pancakes dumplings porridge sauce")
ANIMALS = words("dog cat horse goat parrot donkey rabbit pony goose hen turtle mouse")
RELATIVES = words("sister brother mother father cousin grandmother grandfather neighbour teacher friend daughter son")
TRADES = words(
    "baker potter weaver sailor miller tailor smith doctor painter singer teacher farmer gardener cook carpenter "
    "fisherman barber butcher printer clockmaker shoemaker shepherd hunter mason roofer glassblower beekeeper "
    "librarian driver nurse pilot judge lawyer dancer poet drummer postman plumber tanner saddler"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
DAY_PARTS = words("morning evening afternoon night")

LEXICON = (COLOURS, THINGS, GARMENTS, PLACES, NUMBERS, GOODS, FLAVOURS, WARMTHS, DISHES, ANIMALS, RELATIVES, TRADES)
"""The lists whose words the tokenizer shall know at the beginning of a line, too."""


def with_article(noun_phrase: str) -> str:
    """Return `noun_phrase` with "a" or "an" before it."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def with_the(value: str) -> str:
    """Return a value that begins with "a" or "an" with "the" instead; other values stay as they are."""
    head, _, tail = value.partition(" ")
    return f"the {tail}" if head in ("a", "an") else value


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one person; `first` says what its statement begins with, "person" or "value"."""

    kind: str
    person: str
    value: str
    detail: str
    first: str

    def fill(self, template: str) -> str:
        """Return `template` with {p} person, {v} value, {tv} value with "the" and {d} detail filled in."""
        return template.format(p=self.person, v=self.value, tv=with_the(self.value), d=self.detail)


STATEMENTS = {
    "carry": ("{p} carried {v}", "{p} brought {v}", "{p} had {v}", "{p} held {v}", "{p} took along {v}"),
    "place": ("{p} went to {v}", "{p} walked to {v}", "{p} ran to {v}", "{p} travelled to {v}", "{p} set out for {v}"),
    "count": ("{p} bought {v} {d}", "{p} counted {v} {d}", "{p} sold {v} {d}", "{p} got {v} {d}", "{p} found {v} {d}"),
    "wear": ("{p} wore {v}", "{p} put on {v}", "{p} was dressed in {v}", "{p} was seen in {v}"),
    "home": ("{p} came from {v}", "{p} lived in {v}", "{p} grew up in {v}", "{p} was born in {v}"),
    "pet": ("{p} had a {d} called {v}", "{p} owned a {d} named {v}", "{p} came with a {d} called {v}"),
    "kin": ("{p} had a {d} called {v}", "{p} was there with a {d} named {v}", "{p} talked about a {d} called {v}"),
    "like": ("{p} liked {v}", "{p} loved {v}", "{p} ate {v}", "{p} cooked {v}", "{p} asked for {v}"),
    "work": ("{p} was {v}", "{p} worked as {v}", "{p} became {v}", "{p} earned a living as {v}"),
}
"""Ways of stating a fact; the subject {p} comes first, so that it may become "She" or "He" in a second sentence."""

KINDS = tuple(STATEMENTS)
FIRSTS = ("person", "person", "value")

STATEMENTS_BY_VALUE = {
    "carry": ("{tv} was carried by {p}", "{tv} belonged to {p}", "{tv} was brought by {p}"),
    "place": ("{v} was visited by {p}", "at {v} stood {p}", "at {v} waited {p}"),
    "count": ("the {v} {d} belonged to {p}", "the {v} {d} were bought by {p}", "the {v} {d} were found by {p}"),
    "wear": ("{tv} was worn by {p}", "in {tv} came {p}", "{tv} belonged to {p}"),
    "home": ("{v} was the home of {p}", "from {v} came {p}", "in {v} lived {p}"),
    "pet": ("the {d} {v} belonged to {p}", "the {d} called {v} followed {p}"),
    "kin": ("{v} was the {d} of {p}", "the {d} {v} came with {p}"),
    "like": ("{v} was cooked for {p}", "{v} was loved by {p}", "{v} was eaten by {p}"),
    "work": ("{tv} was {p}", "{tv} was called {p}", "the work of {v} was done by {p}"),
}
"""The same with the value first and the person last."""

RECALLS = {
    "carry": (
        "what {p} carried was {v}",
        "what {p} brought was {v}",
        "the thing that {p} had was {v}",
        "in the hands of {p} was {v}",
        "{p} was the one with {v}",
    ),
    "place": (
        "where {p} went was {v}",
        "the place that {p} visited was {v}",
        "the way of {p} led to {v}",
        "{p} could be found at {v}",
        "nobody forgot where {p} was: at {v}",
    ),
    "count": (
        "the number of {d} that {p} had was {v}",
        "as for the {d} of {p}, there were {v}",
        "how many {d} {p} had was well known: {v}",
        "the {d} of {p} numbered {v}",
    ),
    "wear": (
        "what {p} wore was {v}",
        "{p} could be known by {v}",
        "the colour of the {n} that {p} wore was {c}",
        "the {n} of {p} was {c}",
    ),
    "home": (
        "the home of {p} was {v}",
        "the village that {p} came from was {v}",
        "where {p} lived was {v}",
        "the letters of {p} went to {v}",
    ),
    "pet": ("the name of {p}'s {d} was {v}", "{p}'s {d} was called {v}", "the {d} of {p} was {v}"),
    "kin": ("the name of {p}'s {d} was {v}", "{p}'s {d} was called {v}", "the {d} of {p} was {v}"),
    "like": (
        "what {p} liked was {v}",
        "{p}'s favourite was {v}",
        "the dish that {p} wanted was {v}",
        "nothing was better for {p} than {v}",
    ),
    "work": ("the work of {p} was that of {v}", "{p}'s trade was that of {v}", "people knew {p} as {v}"),
}
"""Ways of recalling the value of a person that was named first in the statement."""

RECALLS_BY_VALUE = {
    "carry": ("the one who carried {tv} was {p}", "whoever saw {tv} also saw {p}", "{tv} had been brought by {p}"),
    "place": ("the one who went to {v} was {p}", "the one at {v} was {p}", "at {v} one could meet {p}"),
    "count": ("the one with {v} {d} was {p}", "the {v} {d} were those of {p}"),
    "wear": ("the one who wore {tv} was {p}", "the one in {tv} was {p}"),
    "home": ("the one who came from {v} was {p}", "the one from {v} was {p}", "in {v} everybody knew {p}"),
    "pet": ("the one with the {d} {v} was {p}", "the owner of {v} was {p}", "{v} was the {d} of {p}"),
    "kin": ("the one with the {d} {v} was {p}", "the {d} {v} belonged to {p}"),
    "like": ("the one who liked {v} was {p}", "the one who ate {v} was {p}"),
    "work": ("the one who was {v} was {p}", "the name of {tv} was {p}"),
}
"""Ways of recalling the person of a value that was named first in the statement."""


def upper_first(text: str) -> str:
    """Return `text` with its first letter as a capital."""
    return text[0].upper() + text[1:]


def fill_garment(fact: Fact, text: str) -> str:
    """Return `text` with {n} garment and {c} colour filled in where `fact` is about clothes."""
    if fact.kind != "wear":
        return text
    _, colour, garment = fact.value.split(" ")
    return text.replace("{n}", garment).replace("{c}", colour)


def state(random_: random.Random, fact: Fact) -> str:
    """Return one statement of `fact`, without a full stop."""
    table = STATEMENTS if fact.first == "person" else STATEMENTS_BY_VALUE
    return fact.fill(random_.choice(table[fact.kind]))


def recall(random_: random.Random, fact: Fact) -> str:
    """Return one sentence that recalls `fact` in other words; it ends with what is looked up."""
    table = RECALLS if fact.first == "person" else RECALLS_BY_VALUE
    return upper_first(fact.fill(fill_garment(fact, random_.choice(table[fact.kind])))) + "."


def draw_facts(random_: random.Random, pool: NamePool, kinds: tuple[str, ...], people: int) -> list[list[Fact]]:
    """Return the facts of `people` people, every person with one fact of each of `kinds`; no value occurs twice.

    All people share the detail of a kind (all counted pears, all had a dog), so that only the name tells them apart.
    """
    draw = random_.choice
    names = pool.draw(random_, 3 * people)
    values: dict[str, tuple[list[str], str]] = {}
    for kind in kinds:
        detail = ""
        if kind == "carry":
            colours, things = random_.sample(COLOURS, people), random_.sample(THINGS, people)
            column = [with_article(f"{c} {t}") for c, t in zip(colours, things, strict=True)]
        elif kind == "place":
            places = random_.sample(PLACES, people)
            column = [
                f"the {word} {place}" for word, place in zip(random_.sample(PLACE_WORDS, people), places, strict=True)
            ]
        elif kind == "count":
            column, detail = random_.sample(NUMBERS, people), draw(GOODS)
        elif kind == "wear":
            garment = draw(GARMENTS)
            column = [with_article(f"{colour} {garment}") for colour in random_.sample(COLOURS, people)]
        elif kind == "home":
            column = pool.draw_villages(random_, people)
        elif kind == "pet":
            column, detail = names[people : 2 * people], draw(ANIMALS)
        elif kind == "kin":
            column, detail = names[2 * people :], draw(RELATIVES)
        elif kind == "like":
            flavours, dishes = random_.sample(FLAVOURS, people), random_.sample(DISHES, people)
            column = [f"{draw(WARMTHS)} {f} {d}" for f, d in zip(flavours, dishes, strict=True)]
        else:
            column = [with_article(trade) for trade in random_.sample(TRADES, people)]
        values[kind] = (column, detail)
    return [
        [Fact(kind, names[index], values[kind][0][index], values[kind][1], draw(FIRSTS)) for kind in kinds]
        for index in range(people)
    ]


def tell(random_: random.Random, people: list[list[Fact]]) -> str:
    """Return a short text that states every fact once; a second fact of a person may follow with "and" or "She"."""
    sentences = []
    for facts in people:
        style, pronoun = random_.random(), random_.choice(("She", "He"))
        said: list[str] = []
        for fact in random_.sample(facts, len(facts)):
            statement = state(random_, fact)
            tail = statement.removeprefix(fact.person + " ")
            follows = fact.first == "person" and bool(said) and said[-1].startswith(fact.person + " ")
            if style < 0.2 and follows:
                said[-1] += f" and {tail}"
            elif style < 0.4 and follows:
                said.append(f"{pronoun} {tail}")
            else:
                said.append(upper_first(statement))
        sentences.extend(f"{sentence}." for sentence in said)
    return " ".join(sentences)
