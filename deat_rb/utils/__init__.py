"""Helpers without a subject of their own: errors, files, units, seeds, devices, ranks, and robustbench's import.

A module belongs here if it knows nothing of datasets, networks, attacks or methods.
"""
