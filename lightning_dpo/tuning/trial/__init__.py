"""One trial: its training run, its reports, and its record."""
