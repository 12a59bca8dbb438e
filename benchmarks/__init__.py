"""Benchmarks of training and evaluation against plain loops and bare passes: ``python -m benchmarks``.

They are not part of the installed package; run them in the root of the repository.
"""
