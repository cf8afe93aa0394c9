"""Means with confidence intervals, and paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, and half the width of its confidence interval by Student's t (NaN for a single value)."""

    mean: float
    half_width: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """One arm against another over the same seeds.

    Attributes:
        difference: mean of the differences.
        p_t: of the paired t-test, two-sided.
        p_sign_flip: of the sign-flip permutation test, two-sided and exact: the share of the 2^n ways to give the
            differences signs whose mean is at least as far from 0. With n seeds it is at least 2 / 2^n.
    """

    difference: Estimate
    p_t: float
    p_sign_flip: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of some values."""
    count = len(values)
    half_width = math.nan
    if count > 1:
        half_width = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(values)
    return Estimate(float(np.mean(values)), float(half_width), count)


def compare(values: Sequence[float], others: Sequence[float]) -> Comparison:
    """Compares values with others, each with the one of the same place. NaN for what a single pair cannot tell."""
    differences = np.subtract(values, others)
    difference = estimate(differences.tolist())
    if len(differences) < 2:
        return Comparison(difference, math.nan, math.nan)
    if not differences.any():
        return Comparison(difference, 1.0, 1.0)
    # Equal differences have no spread, and scipy warns of it.
    with np.errstate(divide="ignore", invalid="ignore"):
        p_t = stats.ttest_1samp(differences, 0).pvalue
    flipped = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**20, vectorized=True, random_state=0
    )
    return Comparison(difference, float(p_t), float(flipped.pvalue))
