"""Measurements of errors: bounds, stages of the kernel, and number formats."""
