"""The comparison of a target with the oracle, and the properties that need no oracle."""
