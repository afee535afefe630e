"""Makes the project sweepable: run `python tune.py` in this folder."""

from network import CurveData, CurveModule

from lightning_dpo.tuning import SweepConfig, sweep

if __name__ == "__main__":
    config = SweepConfig(
        space={"model.lr": {"loguniform": [1e-4, 1e-1]}, "model.hidden": {"choice": [4, 16, 64]}},
        overrides={"trainer.max_epochs": 4},
        objective={"minimize": "val/error"},
        samples=6,
        scheduler="asha",
        name="curve",
    )
    result = sweep(config, module=CurveModule, data=CurveData)
    print(result.best.overrides, result.best.metrics["val/error"])
