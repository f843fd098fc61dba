"""Documents: what texts consist of, which of them are held out, and their shuffling."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["calibration", "held-out"]

# A local file is shuffled through a pool of this size, so small files are shuffled completely.
POOL_DOCUMENTS = 100_000
POOL_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Documents:
    """Documents in the order of use, and notes about them.

    `label` names them in a fingerprint: the same label and the same settings mean the same text.
    """

    texts: Iterator[str]
    label: str
    notes: tuple[str, ...] = ()


def held_out(name: str) -> bool:
    """Return whether the document of this name is held out: three of ten are, by the sha256 of the name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 < 3


def shuffled(
    texts: Iterable[str], seed: int, documents: int = POOL_DOCUMENTS, characters: int = POOL_CHARACTERS
) -> Iterator[str]:
    """Shuffle through a pool of limited size; what fits into the pool is shuffled perfectly."""
    rng, pool, size = random.Random(seed), list[str](), 0
    for text in texts:
        pool.append(text)
        size += len(text)
        while len(pool) > documents or size > characters:
            chosen = rng.randrange(len(pool))
            pool[chosen], pool[-1] = pool[-1], pool[chosen]
            size -= len(pool[-1])
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool
