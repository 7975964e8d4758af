"""The health probe against a server that serves, drains and is gone."""
import signal
import subprocess

import pytest

import adaattn
import stack

HEALTH = stack.BUILD / "client/adaattn-health"


def probe(*flags):
    done = subprocess.run([HEALTH, *flags], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


def test_it_tells_serving_from_draining_and_alive_from_gone():
    with adaattn.LocalServer(stack.SERVER, "--backend=cpu", "--pool-bytes=16MiB", "--drain-pause=60s") as server:
        for address in (server.unix, server.tcp):
            assert probe(f"--address={address}") == (0, "SERVING")
        assert probe(f"--address={server.unix}", "--service=adaattn.v1.Attention") == (0, "SERVING")
        assert probe(f"--address={server.unix}", "--service=no.such.Service")[0] == 1
        server.process.send_signal(signal.SIGTERM)
        stack.wait_for("draining", lambda: probe(f"--address={server.unix}") == (1, "NOT_SERVING"), 10)
        assert probe(f"--address={server.unix}", "--any-status") == (0, "NOT_SERVING")
        server.process.send_signal(signal.SIGTERM)
        address = server.unix
        server.stop()
    assert probe(f"--address={address}", "--any-status", "--timeout=0.5") == (1, "")


@pytest.mark.parametrize("flag", ["--nothing=1", "word", "--timeout=soon"])
def test_wrong_arguments_are_told_apart_from_a_sick_server(flag):
    assert probe(flag)[0] == 2
