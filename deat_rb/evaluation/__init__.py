"""Robustness evaluation: running attacks, reports, sanity checks and paired comparisons."""
