"""The harness: cases, inputs, targets, the judge, and campaigns that run them. `python -m fuzz --help`."""
