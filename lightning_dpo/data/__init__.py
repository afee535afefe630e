"""From rows of any public format to batches of token ids."""

from lightning_dpo.data.datamodule import PreferenceDataModule

__all__ = ["PreferenceDataModule"]
