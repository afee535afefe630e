"""From batches of token ids to log-probabilities: how they are laid out, and which way is exact."""
