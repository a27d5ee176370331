"""Invented names of people, animals and villages, and which of them are kept out of all training.

A name is a chain of syllables, so a new name is made of familiar pieces and still has never been seen. Which names are
held out is decided by their first two syllables: a held-out name therefore begins in a way that no trained name does.
"""

import random
import zlib


def words(text: str) -> list[str]:
    """Return the words of `text`, which keeps long lists of words readable."""
    return text.split()


STARTS = words(
    "ba be bi bo bra bre da de do dra du el fa fe fi flo ga ge gri ha he ho il in ja jo ju ka ke ki kla ko la le "
    "li lo lu ma me mi mo mu na ne ni no or pa pe pi po ra re ri ro ru sa se si so ste ta te ti to tra ul va ve "
    "vi wi ya yo za ze zo"
)
ENDS = words(
    "bel ben bo da dan del den dir do fa fin ga gan go ka kel kin ko la lan len lin lo ma men mir mo na nel nen "
    "no ra ran rel ren rik ris ro sa sel ska so ta tan ten ti to va van vi vin vo za zel zo"
)
MIDDLES = words("ba da di do fe ga ka la le li lo ma me mi na ne ni no ra re ri ro sa se so ta ti to va vi")
VILLAGE_ENDS = words("berg by croft dale field ford ham holm marsh mere mouth ness stead ton wick wold worth wood")

HELD_OUT_SHARE = 6
"""One in this many beginnings of names is kept for the held-out rows."""


def is_held_out(name: str) -> bool:
    """Return whether `name` belongs to the held-out names, by the syllables it begins with (its first four letters)."""
    return zlib.crc32(name.lower()[:4].encode()) % HELD_OUT_SHARE == 0


def all_names() -> list[str]:
    """Return every name of a person or an animal, sorted: two syllables or three, four to nine letters."""
    short = {start + end for start in STARTS for end in ENDS}
    long = {start + middle + end for start in STARTS for middle in MIDDLES for end in ENDS if start != middle}
    return sorted(name.capitalize() for name in short | long if 4 <= len(name) <= 7)


def all_villages() -> list[str]:
    """Return every name of a village, sorted."""
    roots = {start + middle for start in STARTS for middle in MIDDLES if start != middle}
    return sorted((root + end).capitalize() for root in roots for end in VILLAGE_ENDS if len(root) >= 4)


def _set_apart(name: str, ends: tuple[str, ...] | list[str]) -> str:
    """Return `name` with a NUL between its syllables."""
    end = max((end for end in ends if name.endswith(end) and len(name) - len(end) >= 2), key=len)
    root = name.removesuffix(end)
    if root.lower() in STARTS:
        return f"{root}\0{end}"
    start = max(
        (start for start in STARTS if root.lower().startswith(start) and root[len(start) :] in MIDDLES), key=len
    )
    return f"{root[: len(start)]}\0{root[len(start) :]}\0{end}"


class NamePool:
    """The names that one kind of text may use: the trained ones, or the held-out ones."""

    def __init__(self, which: str) -> None:
        """Keep the names of `which`: "trained" or "held_out"."""
        wanted = {"trained": False, "held_out": True}[which]
        self.names = [name for name in all_names() if is_held_out(name) == wanted]
        self.short_names = [name for name in self.names if len(name) <= 5]
        self.villages = [name for name in all_villages() if is_held_out(name) == wanted]

    def draw(self, random_: random.Random, count: int) -> list[str]:
        """Return `count` different names, no two of which begin or end alike (three or two letters)."""
        chosen: list[str] = []
        while len(chosen) < count:
            name = random_.choice(self.short_names if random_.random() < 0.6 else self.names)
            if all(name[:3] != other[:3] and name[-2:] != other[-2:] for other in chosen):
                chosen.append(name)
        return chosen

    def syllables(self) -> "NamePool":
        """Return a pool with the same names, their syllables set apart by a NUL, for the training of the tokenizer.

        The tokenizer then learns syllables as its pieces, and a new name is made of pieces that are all well known.
        """
        apart = NamePool.__new__(NamePool)
        apart.names, apart.villages = (
            [_set_apart(n, ENDS) for n in self.names],
            [_set_apart(v, VILLAGE_ENDS) for v in self.villages],
        )
        apart.short_names = [_set_apart(name, ENDS) for name in self.short_names]
        return apart

    def draw_villages(self, random_: random.Random, count: int) -> list[str]:
        """Return `count` different villages."""
        return random_.sample(self.villages, count)
