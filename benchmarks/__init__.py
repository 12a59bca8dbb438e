"""Speed and memory of training and evaluation beside plain loops and beside the bare passes: ``python -m benchmarks``.

Not part of the installed package: run it from the repository's root.
"""
