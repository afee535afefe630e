"""What varies in a sweep, who chooses the values, and who ends a trial early."""
