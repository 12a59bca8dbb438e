"""Robustness evaluation: running attacks, reports, sanity checks, comparison and the HTML report."""
