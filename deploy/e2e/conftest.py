"""One loaded server, one to be overloaded and one to be drained, watched by one Prometheus."""
import os
import pathlib
import sys

import pytest

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "observe")]

import adaattn
import stack

def pytest_collection_modifyitems(items):
    """What needs the load to have ended comes last, what looks at it under way first."""
    items.sort(key=lambda item: item.get_closest_marker("after_load") is not None)


def pytest_configure(config):
    config.addinivalue_line("markers", "after_load: runs once the load generator has ended")


LOAD_SECONDS = float(os.environ.get("ADAATTN_E2E_SECONDS", "60"))
COMMON = ("--backend=cpu", "--threads=1", "--metrics-listen=127.0.0.1:0")


@pytest.fixture(scope="session")
def server():
    with adaattn.LocalServer(stack.SERVER, *COMMON, "--audit-share=0.2", "--exact-tier-bytes=256MiB") as running:
        yield running


@pytest.fixture(scope="session")
def small():
    """A server whose queue and pool are soon full."""
    with adaattn.LocalServer(stack.SERVER, *COMMON, "--max-queued-tasks=1", "--pool-bytes=8MiB") as running:
        yield running


@pytest.fixture(scope="session")
def leaving():
    """A server that takes its time to end once it is told to."""
    with adaattn.LocalServer(stack.SERVER, *COMMON, "--drain-pause=2m") as running:
        yield running


@pytest.fixture(scope="session")
def prometheus(server, small, leaving, tmp_path_factory):
    targets = {"server": server.metrics, "small": small.metrics, "leaving": leaving.metrics}
    with stack.Prometheus(tmp_path_factory.mktemp("prometheus"), targets) as running:
        yield running


@pytest.fixture(scope="session")
def load(server, prometheus):
    """The load generator, at work since Prometheus watches."""
    generator = stack.Load(
        server.unix, LOAD_SECONDS, ["--kv-len=2048", "--concurrency=4", "--steps=200"],
        ["--mode=deterministic", "--exact-tier=host_pages", "--kv-len=2048", "--concurrency=2", "--steps=50"])
    generator.start()
    yield generator
    generator.finish()
