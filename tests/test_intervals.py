"""Intervals: they hold the truth as often as they say, and are those worked out by hand."""

import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from retro.evaluation.intervals import effective_documents, format_interval, format_p, holm, judged, ratio_of_sums

N_DRAWS = 3000  # of which 95% have a standard deviation of 0.4%


def sizes_of(rng, n_documents):
    return np.exp(rng.normal(size=n_documents))


def of_variance_by_size(rng, sizes):
    return np.sqrt(sizes) * rng.normal(size=len(sizes))


def of_effects_with_heavy_tails(rng, sizes):
    return sizes * rng.standard_t(3, size=len(sizes))


def coverage(draw, truth):
    """Share of the intervals of many draws, of those that are one, that hold the truth."""
    figures = [ratio_of_sums(*draw()) for _ in range(N_DRAWS)]
    held = [f["low"] <= truth <= f["high"] for f in figures if f["low"] is not None]
    assert len(held) > 0.95 * N_DRAWS
    return np.mean(held)


@pytest.mark.parametrize("n_documents", [8, 12, 30])
@pytest.mark.parametrize("noise", [of_variance_by_size, of_effects_with_heavy_tails])
def test_an_interval_of_unequal_documents_holds_the_truth_in_95_of_100_cases(noise, n_documents):
    rng = np.random.default_rng(0)

    def draw():
        sizes = sizes_of(rng, n_documents)
        return 2 * sizes + noise(rng, sizes), sizes

    assert 0.93 <= coverage(draw, 2) <= 0.97


@pytest.mark.parametrize("n_documents", [2, 3, 5])
def test_an_interval_of_two_to_five_documents_is_cautious(n_documents):
    rng = np.random.default_rng(0)
    figures = []
    for _ in range(N_DRAWS):
        sizes = sizes_of(rng, n_documents)
        figures.append(ratio_of_sums(of_variance_by_size(rng, sizes), sizes))
    held = [f["low"] <= 0 <= f["high"] for f in figures if f["low"] is not None]
    assert len(held) > N_DRAWS / 2 and 0.95 <= np.mean(held) <= 0.985


@pytest.mark.parametrize("n_documents", [8, 12, 30])
@pytest.mark.parametrize("by_seed", [0.0, 0.3, 1.2])  # about none, as much as the documents of this noise, much more
def test_an_interval_over_documents_and_seeds_holds_the_truth_in_at_least_95_of_100_cases(by_seed, n_documents):
    rng = np.random.default_rng(0)

    def draw():
        sizes = sizes_of(rng, n_documents)
        of_seeds = by_seed * rng.normal(size=(3, 1)) * sizes
        return 2 * sizes + of_variance_by_size(rng, sizes) + of_seeds, sizes

    assert 0.945 <= coverage(draw, 2) <= 0.995


def test_a_ratio_of_three_documents_by_hand():
    # 4, 1 and 7 bits over 1, 1 and 4 bytes: 12/6 = 2; residuals 2, -1, -1; shares 1/6, 1/6, 4/6.
    # V = (4 * 6/5 + 1 * 6/5 + 1 * 3) / 6^2 = 9/36, so the error is 1/2. Worth 6^2 / (1 + 1 + 16) = 2 documents, which
    # leave one degree of freedom: its 97.5% quantile is tan(0.475 pi) = 12.7062.
    bits, n_bytes = np.array([4.0, 1, 7]), np.array([1.0, 1, 4])
    reach = math.tan(0.475 * math.pi) / 2
    expected = {"value": 2.0, "low": 2 - reach, "high": 2 + reach, "n_documents": 3, "n_seeds": 1}
    assert effective_documents(n_bytes) == 2
    assert ratio_of_sums(bits, n_bytes) == pytest.approx(expected)
    # A document with nothing to predict changes nothing.
    assert ratio_of_sums(np.array([4.0, 0, 1, 7]), np.array([1.0, 0, 1, 4])) == pytest.approx(expected)
    # 2 is 4 errors from 0; with one degree of freedom that is exceeded with a probability of 1 - 2 atan(4) / pi.
    (gain,) = judged({"it": (bits, n_bytes)}).values()
    p = 1 - 2 * math.atan(4) / math.pi
    assert gain == pytest.approx(expected | {"p": p, "verdict": "undecided"}, abs=1e-9)


def test_of_documents_of_equal_size_it_is_the_interval_of_a_mean():
    bits = np.array([0.5, 2.0, -1.0, 4.0, 1.5])
    expected = ttest_1samp(bits / 3, 0)
    low, high = expected.confidence_interval(0.95)
    (gain,) = judged({0: (bits, np.full(5, 3.0))}).values()
    assert (gain["low"], gain["high"], gain["p"]) == pytest.approx((low, high, expected.pvalue), abs=1e-9)


def test_where_one_document_is_all_but_alone_there_is_no_interval():
    none = {"low": None, "high": None, "n_seeds": 1}
    # Of 5 and 20 bytes, worth 625/425 = 1.47 documents; of 5 and 18, worth 529/349 = 1.52.
    assert ratio_of_sums(np.array([10.0, 20]), np.array([5.0, 20])) == {"value": 1.2, "n_documents": 2, **none}
    assert ratio_of_sums(np.array([10.0, 20]), np.array([5.0, 18]))["low"] is not None
    assert ratio_of_sums(np.array([10.0, 0]), np.array([5.0, 0])) == {"value": 2.0, "n_documents": 1, **none}
    assert ratio_of_sums(np.zeros(2), np.zeros(2)) == {"value": None, "n_documents": 0, **none}
    several = ratio_of_sums(np.array([[10.0], [20.0]]), np.array([5.0]))
    assert several == {"value": 3.0, "n_documents": 1, **none, "n_seeds": 2}, "seeds say nothing about documents"
    (gain,) = judged({0: (np.array([10.0]), np.array([5.0]))}).values()
    assert gain["p"] is None and gain["verdict"] == "undecided"


def test_seeds_add_their_own_error():
    n_bytes = np.ones(3)
    bits = np.array([[1.0, 2, 3], [2.0, 3, 4], [6.0, 7, 8]])
    # The seeds' figures are 2, 3, 7: mean 4, variance 7, error sqrt(7/3), 2 degrees of freedom. The documents' are 3,
    # 4, 5: variance 1, error sqrt(1/3), 2 degrees of freedom. Both quantiles are 4.3027: sqrt(7/3 + 1/3) of it.
    figure = ratio_of_sums(bits, n_bytes)
    reach = student.ppf(0.975, 2) * math.sqrt(8 / 3)
    assert figure == pytest.approx({"value": 4, "low": 4 - reach, "high": 4 + reach, "n_documents": 3, "n_seeds": 3})
    # With equal degrees of freedom the p-value is that of their one error.
    (gain,) = judged({0: (bits, n_bytes)}).values()
    assert gain["p"] == pytest.approx(2 * student.sf(4 / math.sqrt(8 / 3), 2), abs=1e-9)
    # It is what the interval that ends at 0 misses, also where the degrees differ.
    bits, n_bytes = np.array([[1.0, 2, 3, 3], [2.0, 3, 1, 0]]), np.array([1.0, 2, 3, 4])
    (gain,) = judged({0: (bits, n_bytes)}).values()
    documents, seeds = bits.mean(axis=0) - 0.75 * n_bytes, 0.15  # the seeds' figures are 0.9 and 0.6
    v = (documents**2 / (1 - n_bytes / 10)).sum() / 100
    degrees, tail = 100 / 30 - 1, gain["p"] / 2
    ends_at = math.sqrt(student.isf(tail, degrees) ** 2 * v + student.isf(tail, 1) ** 2 * seeds**2)
    assert gain["value"] == pytest.approx(0.75) == ends_at


def test_the_smallest_p_value_counts_as_often_as_there_are_claims():
    # Holm: 0.01 * 4; the next 0.02 * 3; 0.03 * 2 is also 0.06; 0.5 * 1.
    assert holm(np.array([0.02, 0.5, 0.01, 0.03])) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm(np.array([0.04, 0.03])) == pytest.approx([0.06, 0.06]), "in the order of the p-values"
    assert holm(np.array([0.9, 0.8])).tolist() == [1, 1] and holm(np.array([])).tolist() == []


def test_a_verdict_follows_the_corrected_p_value():
    ones = np.ones(4)
    # Mean 1 of (1 - e, 1 + e, 1 - e, 1 + e): error e / sqrt(3), p of about 0.04 alone.
    bits = np.array([0.5, 1.5, 0.5, 1.5])
    alone = judged({"gain": (bits, ones)})["gain"]
    assert alone["p"] == pytest.approx(ttest_1samp(bits, 0).pvalue, abs=1e-9) and 0.025 < alone["p"] < 0.05
    assert alone["verdict"] == "yes" and judged({0: (-bits, ones)})[0]["verdict"] == "no"
    two = judged({"gain": (bits, ones), "noise": (np.array([1.0, -1, 2, -1.5]), ones)})
    assert two["gain"]["p"] == pytest.approx(2 * alone["p"]) and two["gain"]["verdict"] == "undecided"
    assert two["gain"]["low"] == alone["low"] > 0, "intervals are not corrected"
    # A p-value too small to be told from 0 is 0.
    assert judged({0: (1 + np.tile([1e-6, -1e-6], 20), np.ones(40))})[0]["p"] == 0
    # What cannot be tested is none of the claims.
    assert judged({"gain": (bits, ones), "one": (np.ones(1), np.ones(1))})["gain"]["p"] == alone["p"]


def test_with_no_difference_anywhere_there_is_no_gain_and_with_the_same_everywhere_there_is():
    n_bytes = np.array([1.0, 2, 4])
    none, same = judged({"none": (0 * n_bytes, n_bytes), "same": (0.5 * n_bytes, n_bytes)}).values()
    assert (none["value"], none["low"], none["high"], none["p"], none["verdict"]) == (0, 0, 0, 1, "undecided")
    assert (same["value"], same["low"], same["high"], same["p"], same["verdict"]) == (0.5, 0.5, 0.5, 0, "yes")


def test_a_figure_is_shown_with_its_interval_if_it_has_one():
    figure = {"value": 0.5, "low": -0.125, "high": 1.0}
    assert format_interval(figure, "+.2f") == "+0.50 (-0.12 to +1.00)"
    assert format_interval(figure, ".1f", " <small>", "</small>") == "0.5 <small>-0.1 to 1.0</small>"
    assert format_interval({"value": 0.5, "low": None, "high": None}, ".1f") == "0.5"
    assert format_interval({"value": None, "low": None, "high": None}, ".1f") == "–"
    assert format_interval(None, ".1f") == ""


def test_a_p_value_is_shown_with_four_digits():
    assert [format_p(p) for p in (0.04999, 0.0001, 0.00009, 0, None)] == ["0.0500", "0.0001", "<0.0001", "<0.0001", "–"]
