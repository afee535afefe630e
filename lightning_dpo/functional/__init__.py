"""The mathematics: pure tensor functions, one per loss and divergence.

Tensors in, tensors out; nothing here holds state or knows of models. `lightning_dpo.losses` holds one class
per loss over these functions.
"""

from lightning_dpo.functional.bradley_terry import bradley_terry_loss
from lightning_dpo.functional.logratio import (
    aot_margin,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    nca_loss,
    sppo_loss,
)
from lightning_dpo.functional.margin import (
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    odpo_loss,
    rdpo_loss,
    robust_dpo_loss,
)
from lightning_dpo.functional.policy_gradient import (
    ClippedLoss,
    adapted_kl_coefficient,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    k3_kl,
    kl_penalised_rewards,
    token_advantages,
    whiten,
)
from lightning_dpo.functional.preferences import PreferredPairs, preferred_pairs
from lightning_dpo.functional.reference_free import (
    cpo_loss,
    log_odds,
    orpo_loss,
    simpo_loss,
    unlikelihood_loss,
)
from lightning_dpo.functional.scores import (
    Divergence,
    alpha_divergence_score,
    chi_squared_kl_score,
    divergence_score,
    forward_kl_score,
    js_divergence_score,
    reverse_kl_score,
)
from lightning_dpo.functional.unpaired import kto_loss, kto_z0, unpaired_apo_zero_loss

__all__ = [
    "ClippedLoss",
    "Divergence",
    "PreferredPairs",
    "adapted_kl_coefficient",
    "alpha_divergence_score",
    "aot_margin",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bradley_terry_loss",
    "chi_squared_kl_score",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cpo_loss",
    "discopop_loss",
    "divergence_score",
    "dpo_loss",
    "dpop_loss",
    "exo_loss",
    "forward_kl_score",
    "gae",
    "hinge_loss",
    "ipo_loss",
    "js_divergence_score",
    "k3_kl",
    "kl_penalised_rewards",
    "kto_loss",
    "kto_z0",
    "log_odds",
    "nca_loss",
    "odpo_loss",
    "orpo_loss",
    "preferred_pairs",
    "rdpo_loss",
    "reverse_kl_score",
    "robust_dpo_loss",
    "simpo_loss",
    "sppo_loss",
    "token_advantages",
    "unlikelihood_loss",
    "unpaired_apo_zero_loss",
    "whiten",
]
