"""One class per loss, chosen by class_path: `lightning_dpo.losses.DPOLoss` and its siblings."""

from lightning_dpo.losses.base import PreferenceLoss
from lightning_dpo.losses.margin import DPOLoss, HingeLoss, IPOLoss, MarginLoss

__all__ = ["DPOLoss", "HingeLoss", "IPOLoss", "MarginLoss", "PreferenceLoss"]
