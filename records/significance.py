"""Tests of significance, by scipy: of a mean loss below a target, and of a difference between two sets of runs."""

import sys

import numpy as np

from runlog import Refused

try:
    from scipy import stats
except ImportError:
    print("records: scipy is missing: pip install -r requirements-test.txt", file=sys.stderr)
    sys.exit(2)


def p_value(losses: list[float], target: float) -> float:
    """Of a mean loss below `target`: one-sided t-test."""
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def difference(a: list[float], b: list[float], confidence: float) -> tuple[float, float, float, float]:
    """(mean of b minus mean of a, ends of its confidence interval, p-value), by Welch's t-test."""
    if np.std(a) == 0 and np.std(b) == 0:
        raise Refused("both sets are without any noise: the runs are copies, not samples")
    test = stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(confidence)
    return float(np.mean(b) - np.mean(a)), float(low), float(high), float(test.pvalue)


def ratio(a: list[float], b: list[float], confidence: float) -> tuple[float, float, float]:
    """(ratio b / a of the geometric means, ends of its confidence interval), by Welch's t-test of the logarithms."""
    return tuple(float(np.exp(x)) for x in difference(list(np.log(a)), list(np.log(b)), confidence)[:3])
