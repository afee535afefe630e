"""How much memory a run will take, by arithmetic on the model's configuration: nothing is loaded."""

from lightning_dpo.parallel.memory.estimate import STRATEGIES, Plan, first_fit, plan_memory
from lightning_dpo.parallel.memory.shapes import KNOWN_MODELS, ModelShape, load_config, model_shape

__all__ = [
    "KNOWN_MODELS",
    "STRATEGIES",
    "ModelShape",
    "Plan",
    "first_fit",
    "load_config",
    "model_shape",
    "plan_memory",
]
