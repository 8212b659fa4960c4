"""Whether two samples come from one distribution."""

from __future__ import annotations

from collections import Counter

from scipy.stats import chi2_contingency

# Outcomes seen less often than this (both samples together) are counted as one, so that the
# chi-square approximation holds.
_RARE = 10


def two_sample_p_value(first: Counter[tuple[int, ...]], second: Counter[tuple[int, ...]]) -> float:
    """p-value of "both counts come from one distribution"; rare outcomes are pooled."""
    together = first + second
    common = [outcome for outcome, count in together.items() if count >= _RARE]
    table = [[counts[outcome] for outcome in common] for counts in (first, second)]
    for row, counts in zip(table, (first, second), strict=True):
        row.append(counts.total() - sum(row))
    columns = [column for column in zip(*table, strict=True) if sum(column)]
    if len(columns) < 2:
        return 1.0
    return float(chi2_contingency(list(zip(*columns, strict=True))).pvalue)
