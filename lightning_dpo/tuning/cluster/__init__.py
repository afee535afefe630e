"""The machines: joining them, what is prepared once for all trials, and trials that were lost."""
