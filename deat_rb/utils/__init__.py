"""Shared helpers: errors, files, locks, units, seeds, devices, distributed training and the import of robustbench.

A module belongs here if it does not depend on datasets, networks, attacks or methods.
"""
