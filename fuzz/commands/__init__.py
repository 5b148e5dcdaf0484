"""The commands of `python -m fuzz`, one file for each but the shortest."""
