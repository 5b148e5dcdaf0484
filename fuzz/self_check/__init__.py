"""The self-check: planted defects that the judge finds, and its false alarms."""
