"""Side-by-side measurements; run from the repository's root. Nothing here is part of the package."""
