"""Intervals for figures that are measured on a sample; none where the sample says nothing about its spread."""

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
CHUNK = 2**24  # numbers drawn at once, so that a large sample does not fill the memory


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, resamples: int = 10_000, seed: int = 1337
) -> Interval | None:
    """The 95% percentile interval of a mean, or of a ratio of sums.

    Args:
        values: what was measured on each member of the sample.
        weights: what the sum of the values is divided by, member by member, such as numbers of tokens; 1 each if not
            given, which makes it the mean.
        resamples: number of bootstrap samples.
        seed: seed of their draw.

    Returns:
        Its ends; None where all members say the same, a single one among them, as an interval of width zero would claim
        that nothing is uncertain.
    """
    n, sums = len(values), np.asarray(values, dtype=float)
    counts = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if len(set((sums / counts).tolist())) < 2:
        return None
    generator, ratios = np.random.default_rng(seed), []
    rows = max(1, CHUNK // n)
    for begin in range(0, resamples, rows):
        draws = generator.integers(n, size=(min(rows, resamples - begin), n))
        ratios.append(sums[draws].sum(1) / counts[draws].sum(1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def share_interval(hits: float, n: int) -> Interval:
    """Wilson's 95% interval of a share, which has a width at 0 of `n` and at `n` of `n` too."""
    z, share = 1.96, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def in_words(interval: Interval | None, spec: str) -> str:
    """An interval as "LOW to HIGH", each in the format `spec`; "" if there is none."""
    return "" if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"
