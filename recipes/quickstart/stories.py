"""The pre-training text of the embedded base: short stories that state facts and recall them in other words.

Kinds of documents: stories with recalling sentences or with notes, stories told twice, and lists and pairs that are
repeated. There are no questions, no instructions and no chat turns in them.
"""

import random

import world
from names import NamePool, words

HEADINGS = {
    "carry": ("Carried by {p}", "In the hands of {p}", "The thing of {p}"),
    "place": ("The way of {p}", "Visited by {p}", "The place of {p}"),
    "count": ("The number of {d} of {p}", "{p}'s {d}", "Count of the {d} of {p}"),
    "wear": ("Worn by {p}", "The clothes of {p}"),
    "home": ("The home of {p}", "{p}'s village", "Village of {p}"),
    "pet": ("The {d} of {p}", "{p}'s {d}", "The name of {p}'s {d}"),
    "kin": ("The {d} of {p}", "{p}'s {d}", "The name of {p}'s {d}"),
    "like": ("The food of {p}", "{p}'s favourite", "Liked by {p}"),
    "work": ("The work of {p}", "{p}'s trade"),
}
OWNERS = {
    "carry": ("Owner of {tv}", "The one with {tv}"),
    "place": ("Visitor at {v}", "The one at {v}"),
    "count": ("The one with {v} {d}", "Owner of {v} {d}"),
    "wear": ("Wearer of {tv}", "The one in {tv}"),
    "home": ("The one from {v}", "Lived in {v}"),
    "pet": ("Owner of the {d} {v}", "The one with the {d} {v}"),
    "kin": ("The one with the {d} {v}", "Has {v} as {d}"),
    "like": ("The one who liked {v}", "Eater of {v}"),
    "work": ("{tv}", "The name of {tv}"),
}
FILLERS = (
    "It was a {weather} {part}.",
    "It was {day}.",
    "On {day} the {place} was {weather}.",
    "Everybody met in the {place}.",
    "This happened on a {weather} {day}.",
    "The {part} was {weather}.",
    "Nobody was late.",
    "There was music in the {place}.",
    "The {animal} of the {trade} was asleep.",
    "They all knew each other.",
    "Then it was time to go home.",
)
WEATHERS = words("warm cold rainy windy sunny foggy quiet snowy stormy long busy")
LIST_TITLES = ("The list", "The guests", "The names", "The order", "On the wall", "In the book", "The song", "The code")
SECOND_TITLES = ("Once more", "Again", "The same list", "Copied", "Repeated", "As before")


def filler(random_: random.Random) -> str:
    """Return a sentence about nothing in particular."""
    pick = random_.choice
    return pick(FILLERS).format(
        weather=pick(WEATHERS),
        part=pick(world.DAY_PARTS),
        day=pick(world.DAYS),
        place=pick(world.PLACES),
        animal=pick(world.ANIMALS),
        trade=pick(world.TRADES),
    )


def draw_people(random_: random.Random, pool: NamePool, level: int) -> list[list[world.Fact]]:
    """Return people with facts: three or four with one each up to level 2, at level 3 up to six facts in all."""
    people = random_.choice((2, 3, 4) if level == 3 else (3, 4))
    kinds = random_.sample(world.KINDS, random_.choice((1, 2)) if level == 3 and people < 4 else 1)
    return world.draw_facts(random_, pool, tuple(kinds), people)


def story(random_: random.Random, people: list[list[world.Fact]]) -> str:
    """Return the facts of `people` as a text, with a filler before or after now and then."""
    parts = [world.tell(random_, people)]
    if random_.random() < 0.4:
        parts.insert(0, filler(random_))
    if random_.random() < 0.3:
        parts.append(filler(random_))
    return " ".join(parts)


def facts_to_recall(random_: random.Random, people: list[list[world.Fact]]) -> list[world.Fact]:
    """Return all facts of `people` in random order, six at most; where they are few, maybe all of them twice."""
    facts = [fact for person in people for fact in person]
    rounds = random_.choice((1, 2)) if len(facts) <= 3 else 1
    return [fact for _ in range(rounds) for fact in random_.sample(facts, min(6, len(facts)))]


def recalled_story(random_: random.Random, pool: NamePool, level: int) -> tuple[str, str]:
    """Return a story and sentences that recall every fact of it."""
    people = draw_people(random_, pool, level)
    separator = random_.choice((" ", " ", "\n"))
    sentences = [world.recall(random_, fact) for fact in facts_to_recall(random_, people)]
    return story(random_, people), random_.choice((" ", "\n", "\n\n")) + separator.join(sentences)


def noted_story(random_: random.Random, pool: NamePool, level: int) -> tuple[str, str]:
    """Return a story and notes of it, one a line: the value or the person after a heading, or on a line of its own."""
    people = draw_people(random_, pool, level)
    layout = random_.choice(("{h}: {a}", "{h}:\n{a}", "{h}\n{a}\n", "{h} - {a}", "{h}:\n{a}\n"))
    lines = []
    for fact in facts_to_recall(random_, people):
        if fact.first == "person":
            heading, answer = fact.fill(random_.choice(HEADINGS[fact.kind])), fact.value
        else:
            heading, answer = fact.fill(random_.choice(OWNERS[fact.kind])), fact.person
        if fact.kind == "wear" and answer == fact.value and random_.random() < 0.5:
            _, answer, garment = fact.value.split(" ")
            heading = f"Colour of the {garment} of {fact.person}"
        lines.append(layout.format(h=world.upper_first(heading), a=answer))
    return story(random_, people), random_.choice(("\n", "\n\n")) + "\n".join(lines)


def pairs(random_: random.Random, pool: NamePool, level: int) -> tuple[str, str]:
    """Return pairs of names and values of one kind, and the same pairs in another order."""
    people = world.draw_facts(random_, pool, (random_.choice(world.KINDS),), random_.randint(3, 6))
    layout = random_.choice(("{p}{s}{v}", "{v}{s}{p}"))
    sign = random_.choice((" ", ": ", " - ", " = ", " had ", ":\n", " with ", " and "))
    lines = [layout.format(p=fact.person, v=fact.value, s=sign) for (fact,) in people]
    separator = random_.choice(("\n", "; ", ". ")) if "\n" not in sign else "\n"
    again = random_.sample(lines, len(lines)) + random_.sample(lines, len(lines))
    return separator.join(lines) + separator, separator.join(again)


def retold_story(random_: random.Random, pool: NamePool, level: int) -> tuple[str, str]:
    """Return a story told twice, with other words and in another order."""
    people = draw_people(random_, pool, level)
    again = random_.sample(people, len(people))
    return story(random_, people), random_.choice((" Told again: ", "\n", "\n\nOnce more. ")) + story(random_, again)


def repeated_list(random_: random.Random, pool: NamePool, level: int) -> tuple[str, str]:
    """Return a list of names and words, and the same list again; at level 0 three times, in the same form."""
    entries = pool.draw(random_, random_.randint(2, 5)) + random_.sample(
        world.THINGS + world.TRADES, random_.randint(0, 4)
    )
    random_.shuffle(entries)
    separators = [random_.choice((", ", "\n", " ", "; ")) for _ in range(2)]
    if level == 0:
        lists = [separators[0].join(entries)] * 4
        return lists[0] + "\n", "\n".join(lists[1:])
    titles = random_.choice(LIST_TITLES), random_.choice(SECOND_TITLES)
    first, second = (
        f"{title}:{random_.choice((' ', chr(10)))}{separator.join(entries)}"
        for title, separator in zip(titles, separators, strict=True)
    )
    return first, random_.choice(("\n", "\n\n")) + second


DOCUMENTS = {
    1: ((pairs, 70), (repeated_list, 10), (recalled_story, 10), (noted_story, 10)),
    2: ((recalled_story, 45), (noted_story, 35), (pairs, 15), (repeated_list, 5)),
    3: ((recalled_story, 45), (noted_story, 35), (pairs, 10), (retold_story, 5), (repeated_list, 5)),
}
"""For each level, the kinds of documents and their shares in per cent."""


def document(random_: random.Random, pool: NamePool, level: int) -> tuple[str, str]:
    """Return the two parts of a document, told and recalled, as long and rich as `level` (0 to 3) says.

    Their concatenation is the document; what the second part says follows from the first.
    """
    if level == 0:
        return repeated_list(random_, pool, level)
    makers, shares = zip(*DOCUMENTS[level], strict=True)
    return random_.choices(makers, shares)[0](random_, pool, level)
