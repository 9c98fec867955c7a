"""Commands put our classes in the place of TRL's; the tests of other files need TRL's own."""

import pytest


@pytest.fixture(autouse=True)
def trl_stays_trl(trl_as_it_was):
    yield
