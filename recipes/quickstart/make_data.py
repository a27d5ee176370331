"""Make the instruction rows of the quickstart: questions about a short text that stands in the prompt.

    python recipes/quickstart/make_data.py --out recipes/quickstart

Writes `train.jsonl` and `held_out.jsonl` in the Alpaca format. The answer stands in the text and nowhere else: people,
animals and villages have invented names, and those of the held-out rows begin with syllables that neither the
pre-training text nor the training rows contain. The same seed gives the same files, byte for byte.
"""

import argparse
import json
import random
from pathlib import Path

import world
from names import NamePool

SEED = 11
TRAIN_ROWS, HELD_OUT_ROWS = 4000, 600
INSTRUCTION = "Answer the question about the text."

QUESTIONS = {
    "carry": {"person": ("What was carried by {p}?", "{v}"), "value": ("Who carried {tv}?", "{p}")},
    "place": {"person": ("Which place was visited by {p}?", "{v}"), "value": ("Who was at {v}?", "{p}")},
    "count": {"person": ("How many {d} belonged to {p}?", "{v}"), "value": ("Who had {v} {d}?", "{p}")},
    "wear": {"person": ("What was the colour of the {n} of {p}?", "{c}"), "value": ("Who wore {tv}?", "{p}")},
    "home": {"person": ("Which village was the home of {p}?", "{v}"), "value": ("Who came from {v}?", "{p}")},
    "pet": {"person": ("What was the name of the {d} of {p}?", "{v}"), "value": ("Who had a {d} called {v}?", "{p}")},
    "kin": {"person": ("Who was the {d} of {p}?", "{v}"), "value": ("Who had a {d} called {v}?", "{p}")},
    "like": {"person": ("What was the favourite of {p}?", "{v}"), "value": ("Who liked {v}?", "{p}")},
    "work": {"person": ("What was the work of {p}?", "{v}"), "value": ("Who was {tv}?", "{p}")},
}
"""For every kind of fact: (question, answer) by the person and by the value; the braces are those of `Fact`."""


def make_row(random_: random.Random, pool: NamePool) -> dict[str, str]:
    """Return one row {"instruction", "input", "output"}: a text of two or three people, a question about one."""
    people_count = random_.choice((2, 3, 3, 4))
    kinds = tuple(random_.sample(world.KINDS, 1 if people_count == 4 else random_.choice((1, 2))))
    people = world.draw_facts(random_, pool, kinds, people_count)
    text = world.tell(random_, people)
    fact = random_.choice(random_.choice(people))
    question, answer = (world.fill_garment(fact, part) for part in QUESTIONS[fact.kind][fact.first])
    return {"instruction": INSTRUCTION, "input": f"{text}\n\n{fact.fill(question)}", "output": fact.fill(answer)}


def make_rows(seed: int, pool: NamePool, count: int) -> list[dict[str, str]]:
    """Return `count` different rows with the names of `pool`."""
    random_, rows = random.Random(seed), {}
    while len(rows) < count:
        row = make_row(random_, pool)
        rows.setdefault(row["input"], row)
    return list(rows.values())


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write the two files to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, seed, which, count in (
        ("train", SEED, "trained", TRAIN_ROWS),
        ("held_out", SEED + 1, "held_out", HELD_OUT_ROWS),
    ):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(seed, NamePool(which), count)]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
