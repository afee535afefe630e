"""`ReferenceSync` under the import path that recipes name; it lives in `lightning_dpo.training.callbacks`."""

from lightning_dpo.training.callbacks.reference_sync import ReferenceSync

__all__ = ["ReferenceSync"]
