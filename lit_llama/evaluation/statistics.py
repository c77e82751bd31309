"""Intervals for figures that are measured on a sample; none where the sample says nothing of its spread."""

import math
from collections.abc import Sequence

import numpy as np


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 1337) -> tuple[float, float] | None:
    """The 95% percentile interval of the mean of `values`.

    Returns:
        Its ends; None where all values are equal, one value among them, as an interval of width zero would claim that
        nothing is uncertain.
    """
    if len(set(values)) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return percentiles(np.asarray(values, dtype=float)[draws].mean(1))


def percentiles(resampled: np.ndarray) -> tuple[float, float] | None:
    """The 95% percentile interval of a figure in bootstrap samples (resamples); None if it is the same in all."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return (float(low), float(high)) if low < high else None


def share_interval(hits: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, which has a width at 0 of `n` and at `n` of `n` too."""
    z, share = 1.96, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def in_words(interval: tuple[float, float] | None, spec: str) -> str:
    """An interval as "LOW to HIGH", each in the format `spec`; "" if there is none."""
    return "" if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"
