"""What a module writes: checkpoints that are whole, the record that rebuilds its model, exported folders."""
