"""Where models come from, how they are prepared for training, and which weights they have."""
