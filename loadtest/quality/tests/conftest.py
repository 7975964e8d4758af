import os
import pathlib
import sys

import pytest
import torch

import adaattn

torch.set_num_threads(1)  # small tensors: more threads only wait for each other on a busy machine

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "loadtest"))
SERVER = pathlib.Path(os.environ.get("ADAATTN_SERVER_BINARY", ROOT / "build/release/server/adaattn-server"))


@pytest.fixture(scope="session")
def client():
    flags = ["--backend=cpu", "--threads=1", "--max-seal-backlog-pages=0",
             "--seal-pages-per-slice=4096", "--audit-share=0"]
    with adaattn.LocalServer(SERVER, *flags) as server, adaattn.Client(server.unix) as opened:
        yield opened
