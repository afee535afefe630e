"""Methods beside each other: reward against KL, each over its strength, with the best that is reachable."""
