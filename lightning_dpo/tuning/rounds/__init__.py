"""Trials that are run again with other seeds: all of them (`repeats`), or the best at the end (`confirm`)."""
