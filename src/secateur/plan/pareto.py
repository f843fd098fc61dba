"""The Pareto front of points with two costs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points on the Pareto front, by their first cost, lowest first.

    A point dominates another if it is no higher in both costs and lower in one; of equal points the first counts.
    """
    front: list[int] = []
    least = math.inf
    for place in sorted(range(len(points)), key=lambda one: (*points[one], one)):
        if points[place][1] < least:
            front.append(place)
            least = points[place][1]
    return front
