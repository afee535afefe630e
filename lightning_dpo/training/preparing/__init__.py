"""What is settled before the first step: what is compiled, how long the warm-up is, what cannot work."""
