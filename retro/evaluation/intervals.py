r"""Intervals: how far a figure would move if other documents had been held out.

Documents are drawn with replacement, whole, because the tokens of one document are not independent:

$$\hat\theta^* = \frac{\sum_{d \in D^*} a_d}{\sum_{d \in D^*} b_d}$$

The interval runs from the 2.5th to the 97.5th percentile of that ratio over many such draws $D^*$.
"""

from __future__ import annotations

import numpy as np

N_RESAMPLES = 2000  # draws of the bootstrap
NUMBERS_AT_ONCE = 1 << 20  # drawn numbers of documents that are held in memory

Interval = dict[str, float | None]  # `value`, and the `low` and `high` end of its 95% interval


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> float | None:
    """Sum of the numerators over the sum of the denominators; None where the latter is 0."""
    return float(numerators.sum() / denominators.sum()) if denominators.sum() else None


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Interval:
    """The ratio of two sums, with a 95% bootstrap interval.

    * `numerators` and `denominators` (d) have an entry for each document; both are drawn together

    The ends are None if fewer than two documents count, since one document says nothing about others; all is None
    where the denominators sum to 0.
    """
    value, counted = ratio(numerators, denominators), np.flatnonzero(denominators)  # so no draw divides by 0
    if len(counted) < 2:
        return {"value": value, "low": None, "high": None}
    from scipy.stats import bootstrap  # which takes half a second to import

    found = bootstrap(
        (numerators[counted], denominators[counted]),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        n_resamples=N_RESAMPLES,
        batch=max(1, NUMBERS_AT_ONCE // len(counted)),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"value": value, "low": float(found.low), "high": float(found.high)}


def format_interval(figure: Interval | None, form: str = "+.4f", before: str = " (", after: str = ")") -> str:
    """A figure as text, as `0.5 (0.1 to 0.9)`; a dash if there is no value, nothing if there is no figure.

    * `form` is the format of a number; left out, it is that of a gain
    * `before` and `after` stand around the interval
    """
    if figure is None:
        return ""
    if figure["value"] is None:
        return "–"
    ends = "" if figure["low"] is None else f"{before}{figure['low']:{form}} to {figure['high']:{form}}{after}"
    return f"{figure['value']:{form}}{ends}"
