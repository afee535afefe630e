"""What a training run brings along: checks, rates, exact resumption, a reference that follows."""
