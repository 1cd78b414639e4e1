"""Marks every test of this folder `security`: `make test-security`, a part of CI of its own."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore = ["corpus", "loading_child.py"]  # programs that tests start, and builders


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.security)
