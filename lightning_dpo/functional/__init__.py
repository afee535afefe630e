"""The mathematics: pure tensor functions, one per loss and divergence.

Tensors in, tensors out; nothing here holds state or knows of models. `lightning_dpo.losses` holds one class
per loss over these functions.
"""

from lightning_dpo.functional.margin import *  # noqa: F403
from lightning_dpo.functional.scores import *  # noqa: F403
