"""Benchmarks of training and evaluation beside plain loops and bare passes: ``python -m benchmarks``.

They are not installed; run them in the root of the repository.
"""
