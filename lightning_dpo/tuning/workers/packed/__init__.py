"""Trials that share one process and the weights of one frozen base model, each with an adapter of its own."""
