import pytest

from lightning_dpo.demo.task import TaskConfig, prepare_task

TINY = TaskConfig(
    hidden_size=32,
    layers=1,
    fit_steps=120,
    fit_batch_size=16,
    fit_lr=2e-2,
    train_pairs=128,
    validation_pairs=48,
)


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    return prepare_task(tmp_path_factory.mktemp("demo") / "task", config=TINY, progress=False)
