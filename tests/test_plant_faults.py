"""The table of faults to plant stays true to the code."""

import pytest
from conftest import REPOSITORY
from plant_faults import FAULTS, out_of_date


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_be_planted_and_its_tests_exist(fault):
    assert not out_of_date(fault, REPOSITORY)
    assert fault.old != fault.new
