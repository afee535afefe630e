"""What a sweep shows: a table in the terminal while it runs, and one HTML page at its end."""
