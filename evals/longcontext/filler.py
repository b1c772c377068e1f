"""Plain English sentences without end, the same for the same seed: what facts are hidden in where no text is given."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

PEOPLE = (
    "The baker", "A farmer", "The captain", "Our teacher", "The old painter", "A doctor", "The librarian",
    "Her brother", "The miller", "A sailor", "The gardener", "His neighbour", "The mayor", "A young clerk",
)  # fmt: skip
DEEDS = (
    "walked along the river", "mended the wooden fence", "waited for the evening train", "carried two heavy baskets",
    "wrote a long letter", "looked at the dark clouds", "cooked soup for the guests", "swept the kitchen floor",
    "counted the boats", "sold apples at the market", "repaired a broken lamp", "listened to the church bells",
    "planted beans behind the house", "read an old newspaper", "fed the horses", "painted the garden gate",
)  # fmt: skip
TIMES = (
    "before sunrise", "in the afternoon", "on a cold morning", "late in autumn", "after the storm", "that summer",
    "when the bell rang", "every other week", "until it grew dark", "during the harvest",
)  # fmt: skip
ENDINGS = (
    "and then went home", "but nobody noticed", "because there was time", "and spoke of the weather",
    "while the dog slept", "and thought of nothing else", "although it rained", "and was glad of it",
    "as people did in those days", "and asked no questions",
)  # fmt: skip

# Words of lists and keys: one word each, none of them in the sentences above.
NOUNS = (
    "anchor", "basil", "candle", "dragon", "ember", "falcon", "glacier", "hammer", "island", "jacket", "kettle",
    "lantern", "marble", "needle", "orchid", "pepper", "quartz", "ribbon", "saddle", "temple", "umbrella", "velvet",
    "walnut", "yogurt", "zebra", "acorn", "bridge", "copper", "desert", "engine", "feather", "guitar", "honey",
    "iron", "jungle", "kitten", "lemon", "mirror", "nickel", "onion", "parrot", "quiver", "rocket", "silver",
    "turtle", "urchin", "violin", "whistle", "canyon", "dolphin", "eagle", "fossil", "garlic", "harbor", "insect",
    "jewel", "koala", "ladder", "magnet", "nutmeg", "oyster", "piano", "rabbit", "spider", "tunnel", "vessel",
    "window", "almond", "beetle", "cactus", "diamond", "easel", "flute", "granite", "helmet", "ivory", "jasmine",
)  # fmt: skip


def sentences(seed: int) -> Iterator[str]:
    """Sentences of 12 to 20 words or so, without end."""
    random = np.random.default_rng(seed)
    while True:
        parts = [PEOPLE, DEEDS, TIMES, ENDINGS]
        yield " ".join(part[random.integers(len(part))] for part in parts) + "."


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text, white space made single, over and over where it is too short."""
    own = [sentence for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if sentence]
    while own:
        yield from own
