"""Measurements on a machine with a GPU and PyTorch but without a network; see README.md in this folder."""
