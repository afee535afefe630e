"""Where reference log-probabilities come from: a frozen model, an adapter switched off, or the cache."""
