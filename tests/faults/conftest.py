"""The model of these runs."""

import pytest

from tests.faults.model import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("faults") / "model")
