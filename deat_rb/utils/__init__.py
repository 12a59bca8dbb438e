"""Shared helpers: errors, files, locks, units, seeds, devices, distributed training and the import of robustbench.

A module belongs here if it knows nothing of datasets, networks, attacks or methods.
"""
