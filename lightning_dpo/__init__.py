"""Direct Preference Optimization for PyTorch Lightning, with Ray Tune search."""

__version__ = "0.1.0"
