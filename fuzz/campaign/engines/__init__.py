"""Engines: the places where workers of a campaign can run."""
