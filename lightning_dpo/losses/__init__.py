"""One class per loss, chosen by class_path: `lightning_dpo.losses.DPOLoss` and its siblings."""

from lightning_dpo.losses.base import PreferenceLoss
from lightning_dpo.losses.composed import LDDPO, WPO, CombinedLoss
from lightning_dpo.losses.logratio import AOTLoss, APODownLoss, APOZeroLoss, BCOLoss, NCALoss, SPPOLoss
from lightning_dpo.losses.margin import (
    DiscoPOPLoss,
    DPOLoss,
    DPOPLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    LengthNormalizedDPOLoss,
    MarginLoss,
    RobustDPOLoss,
)
from lightning_dpo.losses.offset import ODPOLoss, RDPOLoss
from lightning_dpo.losses.reference_free import CPOLoss, ORPOLoss, SFTLoss, SimPOLoss, UnlikelihoodLoss
from lightning_dpo.losses.unpaired import KTOLoss, UnpairedAPOZeroLoss, UnpairedLoss

__all__ = [
    "LDDPO",
    "WPO",
    "AOTLoss",
    "APODownLoss",
    "APOZeroLoss",
    "BCOLoss",
    "CPOLoss",
    "CombinedLoss",
    "DPOLoss",
    "DPOPLoss",
    "DiscoPOPLoss",
    "EXOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "LengthNormalizedDPOLoss",
    "MarginLoss",
    "NCALoss",
    "ODPOLoss",
    "ORPOLoss",
    "PreferenceLoss",
    "RDPOLoss",
    "RobustDPOLoss",
    "SFTLoss",
    "SPPOLoss",
    "SimPOLoss",
    "UnlikelihoodLoss",
    "UnpairedAPOZeroLoss",
    "UnpairedLoss",
]
