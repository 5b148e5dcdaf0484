"""Measurements: each command prints the numbers that the pages under docs/ and the README quote."""
