"""Sanity checks of an evaluation (Carlini et al. 2019): one function per check, listed in `registry.CHECKS`."""
