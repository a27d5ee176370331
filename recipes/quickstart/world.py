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


def with_article(noun_phrase: str) -> str:
    """Return `noun_phrase` with "a" or "an" before it."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def with_the(value: str) -> str:
    """Return a value that begins with "a" or "an" with "the" instead; other values stay as they are."""
    head, _, tail = value.partition(" ")
    return f"the {tail}" if head in ("a", "an") else value


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one person: `value` is the answer, `detail` is what the statement also needs."""

    kind: str
    person: str
    value: str
    detail: str = ""

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

RECALLS = {
    "carry": (
        "What {p} carried was {v}.",
        "What {p} brought was {v}.",
        "{p} was the one with {v}.",
        "The thing that {p} had was {v}.",
        "In the hands of {p} was {v}.",
        "{p}'s thing was {v}.",
        "It was {p} who had {tv}.",
        "{tv} was carried by {p}.",
        "{tv} belonged to {p}.",
        "The one who carried {tv} was {p}.",
        "Whoever saw {tv} also saw {p}.",
        "{tv} had been brought by {p}.",
    ),
    "place": (
        "Where {p} went was {v}.",
        "The place that {p} visited was {v}.",
        "The way of {p} led to {v}.",
        "{p} could be found at {v}.",
        "{p} was seen at {v}.",
        "Nobody forgot where {p} was: at {v}.",
        "It was {p} who went to {v}.",
        "{v} was visited by {p}.",
        "The one at {v} was {p}.",
        "At {v} one could meet {p}.",
        "The one who went to {v} was {p}.",
    ),
    "count": (
        "The number of {d} that {p} had was {v}.",
        "As for the {d} of {p}, there were {v}.",
        "{p}'s {d} were {v}.",
        "How many {d} {p} had was well known: {v}.",
        "Of {d}, {p} had exactly {v}.",
        "The {d} of {p} numbered {v}.",
        "It was {p} who had {v} {d}.",
        "The {v} {d} were those of {p}.",
        "The one with {v} {d} was {p}.",
    ),
    "wear": (
        "What {p} wore was {v}.",
        "{p} could be known by {v}.",
        "The clothes of {p} were easy to remember: {v}.",
        "The colour of the {n} that {p} wore was {c}.",
        "{p}'s {n} was {c}.",
        "The {n} of {p} was {c}.",
        "It was {p} who wore {tv}.",
        "{tv} was worn by {p}.",
        "The one in {tv} was {p}.",
        "The one who wore {tv} was {p}.",
    ),
    "home": (
        "The home of {p} was {v}.",
        "The village that {p} came from was {v}.",
        "{p}'s village was {v}.",
        "Where {p} lived was {v}.",
        "{p} often dreamed of {v}.",
        "The letters of {p} went to {v}.",
        "It was {p} who came from {v}.",
        "{v} was the home of {p}.",
        "The one from {v} was {p}.",
        "In {v} everybody knew {p}.",
    ),
    "pet": (
        "The name of {p}'s {d} was {v}.",
        "{p}'s {d} was called {v}.",
        "The {d} of {p} was {v}.",
        "The {d} that followed {p} was {v}.",
        "The {d} {v} belonged to {p}.",
        "{v} was the {d} of {p}.",
        "The owner of {v} was {p}.",
        "It was {p} who had the {d} {v}.",
    ),
    "kin": (
        "The name of {p}'s {d} was {v}.",
        "{p}'s {d} was called {v}.",
        "The {d} of {p} was {v}.",
        "As {d}, {p} had {v}.",
        "{v} was the {d} of {p}.",
        "It was {p} whose {d} was {v}.",
        "The one with the {d} {v} was {p}.",
    ),
    "like": (
        "What {p} liked was {v}.",
        "{p}'s favourite was {v}.",
        "The food of {p} was {v}.",
        "The dish that {p} wanted was {v}.",
        "Nothing was better for {p} than {v}.",
        "It was {p} who liked {v}.",
        "{v} was eaten by {p}.",
        "The one who loved {v} was {p}.",
        "{v} was cooked for {p}.",
    ),
    "work": (
        "The work of {p} was that of {v}.",
        "What {p} did for a living was the work of {v}.",
        "{p}'s trade was that of {v}.",
        "People knew {p} as {v}.",
        "It was {p} who worked as {v}.",
        "{tv} was {p}.",
        "{tv} was called {p}.",
        "The one who worked as {v} was {p}.",
    ),
}
"""Ways of recalling a fact that was stated before; what is looked up comes last in most of them."""


def upper_first(text: str) -> str:
    """Return `text` with its first letter as a capital."""
    return text[0].upper() + text[1:]


def recall(random_: random.Random, fact: Fact) -> str:
    """Return one sentence that recalls `fact` in other words than it was stated."""
    template = random_.choice(RECALLS[fact.kind])
    if fact.kind == "wear":
        _, colour, garment = fact.value.split(" ")
        template = template.replace("{n}", garment).replace("{c}", colour)
    return upper_first(fact.fill(template))


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
        [Fact(kind, names[index], values[kind][0][index], values[kind][1]) for kind in kinds] for index in range(people)
    ]


def tell(random_: random.Random, people: list[list[Fact]]) -> str:
    """Return a short text that states every fact once, person by person, in one of several styles."""
    sentences = []
    for facts in people:
        style = random_.random()
        first, *others = random_.sample(facts, len(facts))
        said = [first.fill(random_.choice(STATEMENTS[first.kind]))]
        pronoun = random_.choice(("She", "He"))
        for fact in others:
            statement = fact.fill(random_.choice(STATEMENTS[fact.kind]))
            tail = statement.removeprefix(fact.person + " ")
            if style < 0.4 and len(said) == 1 and " and " not in said[-1]:
                said[-1] += f" and {tail}"
            elif style < 0.7:
                said.append(f"{pronoun} {tail}")
            else:
                said.append(statement)
        sentences.extend(f"{sentence}." for sentence in said)
    return " ".join(sentences)
