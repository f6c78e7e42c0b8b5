"""A runner makes its scope the default of the whole process; here each test gives it back."""

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def scope_of_its_own():
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)
