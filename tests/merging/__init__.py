import pytest

pytest.register_assert_rewrite("tests.merging.properties")  # so that its failures say what was compared
