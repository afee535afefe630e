"""Reference log-probabilities on disk, found again by content."""
