"""What a sweep found: trials in order, the frontier, and the best trial's model."""
