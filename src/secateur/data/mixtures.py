"""How a source of texts is written: names and files alone, or mixtures such as `wikitext2:0.7,alpaca:0.3`."""

import math

from secateur.data.sources import is_source
from secateur.errors import InputError


def shares_in(source: str) -> dict[str, float]:
    """Split "a:0.7,b:0.3" into shares that sum to one; what exists under its whole name is one source.

    Raises:
        InputError: weights for some only, or as in `weights_in`.
    """
    if is_source(source):
        return {source: 1.0}
    weighed = weights_in(source)
    names, weights = [name for name, _ in weighed], [weight for _, weight in weighed if weight is not None]
    if not weights:
        weights = [1.0] * len(names)
    if len(weights) < len(names):
        raise InputError(f"'{source}' gives weights to some texts only; give one to each, or to none")
    return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def weights_in(source: str) -> list[tuple[str, float | None]]:
    """Split "a:0.7,b" into names and weights; None if there is none.

    Raises:
        InputError: an empty part, a name given twice, or a weight that is no positive number.
    """
    found = [_name_and_weight(part.strip(), source) for part in source.split(",")]
    if len({name for name, _ in found}) < len(found):
        raise InputError(f"'{source}' names a text twice; name each once")
    return found


def _name_and_weight(part: str, source: str) -> tuple[str, float | None]:
    name, colon, typed = part.rpartition(":")
    if not (name if colon else part):
        raise InputError(f"'{source}' has an empty part; write it like wikitext2:0.7,alpaca:0.3")
    if is_source(part) or not colon:
        return part, None
    try:
        weight = float(typed)
    except ValueError:
        if not is_source(name):
            return part, None
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"the weight '{typed}' of '{name}' is not a positive number")
    return name, weight


def apportion(shares: list[float], windows: int) -> list[int]:
    """Distribute `windows` by shares that sum to one, largest remainder first, at least one to each.

    Raises:
        InputError: fewer windows than shares.
    """
    if windows < len(shares):
        raise InputError(f"{windows} windows are too few for a mixture of {len(shares)} texts")
    counts = [math.floor(share * windows) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * windows)
    for i in by_remainder[: windows - sum(counts)]:
        counts[i] += 1
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts
