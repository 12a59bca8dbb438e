"""Measurements on a machine with a GPU and PyTorch and without a network; see README.md in this folder."""
