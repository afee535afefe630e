import pytest
from tiny_task import tiny_task_config

from lightning_dpo.demo.task import prepare_task

TINY = tiny_task_config()


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    return prepare_task(tmp_path_factory.mktemp("demo") / "task", config=TINY, progress=False)
