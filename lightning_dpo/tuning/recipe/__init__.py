"""A `fit` recipe as a sweep holds it: its text, what its module says of itself, and its command line."""
