"""Training methods: the module that holds a policy, DPO, and what a run needs around them."""
