"""Trials of several processes: a group of workers that trains one trial after another."""
