"""Sanity checks of an evaluation (Carlini et al. 2019): one function a check, in `registry.CHECKS`."""
