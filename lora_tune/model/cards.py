"""Cards: memory, speed and bandwidth of the GPUs that people train on, by the name they say or the driver's.

Sources. Memory and bandwidth: NVIDIA's product pages and data sheets. TFLOP/s: dense (without sparsity) tensor
throughput in bfloat16 with float32 accumulation: for GeForce from NVIDIA's architecture whitepapers (Turing TU102,
Ampere GA102, Ada, Blackwell RTX), where a card is not listed there twice its float32 rate, as for those that are; for
professional and data-centre cards from their data sheets, halved where those count sparsity. T4, V100 and RTX 20 have
no bfloat16: the number is float16. The numbers were written down from these papers, not measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from lora_tune.errors import UsageError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """One card: `memory_gib` in all, dense `tflops` in its 16-bit type, `bandwidth_gbs` in GB/s; 0 is unknown."""

    name: str
    memory_gib: float
    tflops: float
    bandwidth_gbs: float
    sixteen_bit: str = "bfloat16"


def _cards(*rows: tuple[str, float, float, float], sixteen_bit: str = "bfloat16") -> dict[str, Card]:
    return {row[0]: Card(*row, sixteen_bit=sixteen_bit) for row in rows}


# name: memory GiB, TFLOP/s, GB/s; of cards with two sizes of memory the size follows the name
CARDS: dict[str, Card] = {
    **_cards(  # GeForce RTX 30: whitepaper "NVIDIA Ampere GA102 GPU Architecture", appendix; product pages
        ("rtx3060", 12, 25.5, 360), ("rtx3060ti", 8, 32.4, 448), ("rtx3070", 8, 40.6, 448),
        ("rtx3070ti", 8, 43.5, 608), ("rtx3080", 10, 59.5, 760), ("rtx3080-12", 12, 61.3, 912),
        ("rtx3080ti", 12, 68.2, 912), ("rtx3090", 24, 71.0, 936), ("rtx3090ti", 24, 80.0, 1008),
    ),
    **_cards(  # GeForce RTX 40: whitepaper "NVIDIA Ada GPU Architecture", appendix; product pages
        ("rtx4060", 8, 30.2, 272), ("rtx4060ti", 8, 44.1, 288), ("rtx4060ti-16", 16, 44.1, 288),
        ("rtx4070", 12, 58.3, 504), ("rtx4070super", 12, 71.0, 504), ("rtx4070ti", 12, 80.2, 504),
        ("rtx4070tisuper", 16, 88.2, 672), ("rtx4080", 16, 97.5, 717), ("rtx4080super", 16, 104.4, 736),
        ("rtx4090", 24, 165.2, 1008),
    ),
    **_cards(  # GeForce RTX 50: whitepaper "NVIDIA RTX Blackwell GPU Architecture", appendix; product pages
        ("rtx5060", 8, 38.4, 448), ("rtx5060ti", 8, 47.4, 448), ("rtx5060ti-16", 16, 47.4, 448),
        ("rtx5070", 12, 61.7, 672), ("rtx5070ti", 16, 87.9, 896), ("rtx5080", 16, 112.6, 960),
        ("rtx5090", 32, 209.5, 1792),
    ),
    **_cards(  # workstations: data sheets of each card
        ("a4000", 16, 76.7, 448), ("a4500", 20, 94.6, 640), ("a5000", 24, 111.1, 768), ("a6000", 48, 154.8, 768),
        ("rtx4000ada", 20, 106.9, 360), ("rtx4500ada", 24, 158.7, 432), ("rtx5000ada", 32, 261.1, 576),
        ("rtx6000ada", 48, 364.2, 960), ("rtxpro6000", 96, 503.8, 1792),
    ),
    **_cards(  # data centres: data sheets of each card; the SXM form where there are two
        ("l4", 24, 121.0, 300), ("a10", 24, 125.0, 600), ("a10g", 24, 70.0, 600), ("a30", 24, 165.0, 933),
        ("a40", 48, 149.7, 696), ("l40", 48, 181.0, 864), ("l40s", 48, 362.0, 864), ("a100-40", 40, 312.0, 1555),
        ("a100-80", 80, 312.0, 2039), ("h100", 80, 989.4, 3350), ("h100-pcie", 80, 756.0, 2000),
        ("h100-nvl", 94, 835.0, 3938), ("gh200", 96, 989.4, 4000), ("h200", 141, 989.4, 4800),
        ("b200", 180, 2250.0, 8000),
    ),
    **_cards(  # before Ampere: no bfloat16; whitepaper "NVIDIA Turing GPU Architecture", data sheets of T4 and V100
        ("t4", 16, 65.0, 320), ("v100-16", 16, 125.0, 900), ("v100-32", 32, 125.0, 900),
        ("rtx2080ti", 11, 53.8, 616), ("titanrtx", 24, 130.5, 672), sixteen_bit="float16",
    ),
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:gib|gb|g)?", re.IGNORECASE)
_LARGEST_GIB = 2048.0
_USABLE = 0.97  # share of a card's memory that a process can have: the driver and error correction keep the rest


def find_card(name: str) -> Card:
    """The card of this name (`rtx4090`, `RTX 4090`, `a100-80`), or one of this many GiB and unknown speed (`24GiB`).

    `GB` means GiB, as it does on the box of a card.

    Raises:
        UsageError: no such card; the nearest names are given.
    """
    size = _SIZE.fullmatch(name.strip())
    if size is not None:
        gib = float(size[1])
        if not 1 <= gib <= _LARGEST_GIB:
            raise UsageError(f"--gpu: no card has that memory, got {name!r}", f"give 1GiB to {_LARGEST_GIB:.0f}GiB")
        return Card(f"{gib:g}GiB", gib, 0.0, 0.0)
    wanted = _plain(name)
    for card in CARDS.values():
        if _plain(card.name) == wanted or _plain(f"{card.name}-{card.memory_gib:g}") == wanted:
            return card
    sizes = [card.name for card in CARDS.values() if _plain(_model(card.name)) == wanted]
    near = sizes or get_close_matches(name.lower(), CARDS, n=3, cutoff=0.5)
    names = ", ".join(near or ["rtx3060", "rtx4090", "a100-80", "h100"])
    raise UsageError(f"--gpu: no such card, got {name!r}", f"take one such as {names}; its memory (24GiB); or auto")


def usable_gib(card: Card) -> float:
    """What a process can have of a card on which nothing else runs, in GiB."""
    return card.memory_gib * _USABLE


def card_of_driver(name: str, *, memory_gib: float) -> Card:
    """The card behind the driver's name (`NVIDIA GeForce RTX 4090`) and memory; of unknown speed where it is not known.

    A part of a card (MIG) and the laptop form of one have other speeds than the card of the name.
    """
    plain = _plain(name)
    unknown = Card(name, memory_gib, 0.0, 0.0)
    if "laptop" in plain or "mobile" in plain or "maxq" in plain or "mig" in plain:
        return unknown
    models = sorted({_model(card.name) for card in CARDS.values()}, key=len, reverse=True)
    model = next((model for model in models if plain.startswith(_plain(model))), None)
    if model is None:
        return unknown
    rest = plain.removeprefix(_plain(model))
    if rest.startswith(("super", "ti", "d")):  # a variant that the table does not have
        return unknown
    same = [card for card in CARDS.values() if _model(card.name) == model]
    form = [card for card in same if card.name.endswith(("pcie", "nvl")) and card.name.rpartition("-")[2] in plain]
    nearest = min(form or same, key=lambda card: abs(card.memory_gib - memory_gib))
    return nearest if abs(nearest.memory_gib - memory_gib) <= 0.15 * nearest.memory_gib else unknown


def _model(name: str) -> str:
    """A name without the size of memory or the form behind it: a100 for a100-80, h100 for h100-pcie."""
    return name.partition("-")[0]


def _plain(name: str) -> str:
    """Letters and digits alone, without what names of makers and series add."""
    text = re.sub(r"nvidia|geforce|tesla|quadro|graphics|\bgpu\b|generation", "", name.lower())
    text = re.sub(r"[^a-z0-9]", "", text)
    text = re.sub(r"^rtx(?=a[0-9])", "", text)
    return re.sub(r"(?<=[0-9])(?:gib|gb)", "", text)
