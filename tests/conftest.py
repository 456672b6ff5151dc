"""The order in which files are run."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many tests that are slow or start several processes come first, the others as they were.

    `make test` gives whole files to its workers, in this order. A long file at the end would leave the other workers idle; xdist's
    own order, by the number of tests, puts just these last.
    """
    long = Counter(item.path for item in items if any(map(item.get_closest_marker, ("slow", "distributed"))))
    items.sort(key=lambda item: -long[item.path])
