"""Tests of many strategies and processes wait until they are asked for; what they have found is printed at the end."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "distributed" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("distributed"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: `make test-distributed` runs it"))


def pytest_terminal_summary(terminalreporter):
    """The largest differences to one process; of numbers below 0.02, in parts of 0.02."""
    found = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        for name, value in getattr(report, "user_properties", ())
        if name == "distributed"
    ]
    if not found:
        return
    terminalreporter.section("largest relative differences to one process")
    kinds = ("history", "weights", "loads")
    print = terminalreporter.write_line
    print(f"{'strategy':10}{'processes':>10}{'cases':>7}{'metrics':>10}{'weights':>10}{'loaded':>10}")
    for strategy, count, cases, largest in found:
        print(f"{strategy:10}{count:>10}{cases:>7}" + "".join(f"{largest.get(kind, 0.0):>10.1e}" for kind in kinds))
