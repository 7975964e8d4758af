"""A real server for the tests, with the CPU backend; every `client` test runs over both transports."""
import os
import pathlib

import pytest

import adaattn

ROOT = pathlib.Path(__file__).resolve().parents[3]
SERVER = pathlib.Path(os.environ.get("ADAATTN_SERVER_BINARY", ROOT / "build/release/server/adaattn-server"))


@pytest.fixture(scope="session")
def server():
    with adaattn.LocalServer(SERVER, "--backend=cpu", "--threads=1") as running:
        yield running


@pytest.fixture(params=["unix", "tcp"])
def client(request, server):
    with adaattn.Client(getattr(server, request.param)) as opened:
        yield opened
