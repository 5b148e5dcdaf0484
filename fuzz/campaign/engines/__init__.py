"""Where the workers of a campaign run."""
