"""Campaigns: workers, the store, findings, shrinking and replay."""
