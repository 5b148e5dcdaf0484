"""Targets: the built-in ones, fla's kernels, and functions of users."""
