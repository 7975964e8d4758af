"""Intervals and tests of paired results."""
from __future__ import annotations

import dataclasses
import math
from typing import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def block_bootstrap(columns: Sequence[np.ndarray], statistic: Callable[..., float], blocks: np.ndarray,
                    seed: int = 0, draws: int = 1000, level: float = 0.95) -> Interval:
    """Percentile interval of statistic(*columns), whole blocks drawn with replacement.

    columns: arrays of one length; blocks: the block of each element (rows of a text that lie side by side,
    questions of one context), because neighbours are not independent. Source: Efron and Tibshirani 1993,
    chapters 8 and 13; blocks as in Kuensch 1989 without overlap.
    """
    order = np.argsort(blocks, kind="stable")
    bounds = np.flatnonzero(np.diff(np.asarray(blocks)[order])) + 1
    members = np.split(order, bounds)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        values.append(statistic(*(column[drawn] for column in columns)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*columns)), float(low), float(high))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p of equal accuracy of paired booleans (binomial over the discordant pairs; McNemar 1947)."""
    only_first = int(np.sum(first & ~second))
    only_second = int(np.sum(second & ~first))
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2.0 * tail / 2.0 ** discordant)
