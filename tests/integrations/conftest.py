import pytest


@pytest.fixture
def shows(record_property):
    """shows(framework, method, feature, …): what a test proves, for the table of docs/integrations.md. It
    counts if the test passes; see table.py."""

    def record(framework, method, *features):
        for feature in features:
            record_property("shows", f"{framework}|{method}|{feature}")

    return record
