"""Links between cards: bytes per second of one card in one direction, by the name that is said or as a number.

Sources. PCIe: PCI-SIG, 16 lanes after 128b/130b coding. NVLink: NVIDIA's data sheets and architecture papers, which
count both directions; half of it. Bridges of RTX 3090 and RTX A6000: GA102 whitepaper. Ethernet and InfiniBand: the
rate of the standard. Seconds a hop: the constants of NCCL's own model (`src/graph/tuning.cc`, ring, simple protocol).
Nothing of this was measured here; ring collectives reach about 70 % of it (195 of 300 GB/s between A100s by nccl-tests,
li-plus/playground cuda/nccl.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from lora_tune.errors import UsageError
from lora_tune.model.cards import Card

REACHED = 0.7  # share of a link's rate that ring collectives reach
_START_S = 8.4e-6  # of a collective
_HOP_S = {"nvlink": 3.4e-6, "pcie": 5.7e-6, "network": 14e-6}


@dataclass(frozen=True, slots=True)
class Link:
    """What joins two cards: `gbs` GB/s each way, and the kind, which says how long a hop takes."""

    name: str
    gbs: float
    kind: str

    def seconds(self, sent_bytes: float, *, collectives: int, hops: int) -> float:
        """Seconds until `sent_bytes` have left every card, in so many collectives with so many hops each."""
        return sent_bytes / (REACHED * self.gbs * 1e9) + collectives * (_START_S + hops * _HOP_S[self.kind])


LINKS: dict[str, Link] = {
    name: Link(name, gbs, kind)
    for name, gbs, kind in (
        ("pcie3", 15.75, "pcie"), ("pcie4", 31.5, "pcie"), ("pcie5", 63.0, "pcie"), ("pcie3x4", 3.94, "pcie"),
        ("pcie3x8", 7.88, "pcie"), ("pcie4x8", 15.75, "pcie"), ("nvlink-bridge", 56.25, "nvlink"),
        ("nvlink2", 150.0, "nvlink"), ("nvlink3", 300.0, "nvlink"), ("nvlink4", 450.0, "nvlink"),
        ("nvlink5", 900.0, "nvlink"), ("nvlink", 300.0, "nvlink"), ("1gbe", 0.125, "network"),
        ("10gbe", 1.25, "network"), ("25gbe", 3.125, "network"), ("40gbe", 5.0, "network"),
        ("100gbe", 12.5, "network"), ("200gbe", 25.0, "network"), ("400gbe", 50.0, "network"),
        ("hdr", 25.0, "network"), ("ndr", 50.0, "network"),
    )
}  # fmt: skip
# what joins the cards of one machine where nothing is said
_OF_CARD = {
    "v100": "nvlink2", "a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4", "gh200": "nvlink4", "b200": "nvlink5",
    "h100-pcie": "pcie5", "rtx50": "pcie5", "rtxpro": "pcie5", "rtx20": "pcie3", "titan": "pcie3", "t4": "pcie3",
}  # fmt: skip
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:gb/?s)?", re.IGNORECASE)


def find_link(name: str, *, option: str = "--link") -> Link:
    """The link of this name (`nvlink3`, `pcie4`, `10gbe`), or one of so many GB/s each way (`25`, `25GB/s`).

    Raises: UsageError with the nearest names.
    """
    plain = name.strip().lower()
    if plain in LINKS:
        return LINKS[plain]
    number = _NUMBER.fullmatch(plain)
    if number is not None:
        if not 0.01 <= float(number[1]) <= 10_000:
            raise UsageError(f"{option}: no link is that fast, got {name!r}", "give GB/s each way, 0.01 to 10000")
        return Link(f"{float(number[1]):g} GB/s", float(number[1]), "pcie")
    near = get_close_matches(plain, LINKS, n=3, cutoff=0.4) or ["pcie4", "nvlink", "10gbe"]
    raise UsageError(f"{option}: no such link, got {name!r}", f"take one such as {', '.join(near)}; or GB/s (25)")


def link_of(card: Card | None) -> Link:
    """What mostly joins cards of this kind inside one machine: NVLink where they are made for it, else PCIe 4."""
    name = card.name if card is not None else ""
    fitting = [start for start in _OF_CARD if name.startswith(start)]
    return LINKS[_OF_CARD[max(fitting, key=len)] if fitting else "pcie4"]
