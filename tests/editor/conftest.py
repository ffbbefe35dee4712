import shutil

import pytest

import support


def pytest_sessionstart(session):
    if hasattr(session.config, "workerinput"):  # of pytest-xdist; the session that started it has made the folder
        return
    shutil.rmtree(support.SCREENSHOTS, ignore_errors=True)
    support.SCREENSHOTS.mkdir(parents=True)


@pytest.fixture
def server(tmp_path):
    with support.Server(tmp_path / "data") as server:
        yield server
