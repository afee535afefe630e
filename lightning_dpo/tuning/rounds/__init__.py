"""The rounds of a sweep's trials: its search, more trials after its end, and reruns with other seeds."""
