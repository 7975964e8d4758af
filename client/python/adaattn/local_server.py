"""A server of one's own, for tests, experiments and harnesses."""
from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import time
from types import MappingProxyType
from typing import Mapping, Union

_START_SECONDS = 60.0


class LocalServer:
    """An adaattn-server process on a free loopback port and on a Unix socket; ends with `with`.

    binary: path of adaattn-server; flags: its flags, which win over those given here; environment:
    variables added to ours. Attributes: `tcp` and `unix`, addresses for Client; `metrics`, host:port of
    the HTTP port, "" without --metrics-listen; `log`, the path of its log. Errors: RuntimeError with the
    log when it does not start or ends with another status than 0.
    """

    def __init__(self, binary: Union[str, pathlib.Path], *flags: str, environment: Mapping[str, str] = MappingProxyType({})):
        self._folder = tempfile.TemporaryDirectory(prefix="adaattn-")
        folder = pathlib.Path(self._folder.name)
        ports = folder / "ports"
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(binary), "--listen=127.0.0.1:0", "--metrics-listen=", "--drain-pause=0",
                 f"--unix-socket={folder / 'socket'}", f"--port-file={ports}", *flags],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environment})
        deadline = time.monotonic() + _START_SECONDS
        while not (ports.exists() and ports.stat().st_size):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        addresses = json.loads(ports.read_text())
        self.tcp, self.metrics = addresses["grpc"], addresses["metrics"]
        self.unix = f"unix:{folder / 'socket'}"

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks it to leave and waits. Stopping a stopped server does nothing."""
        if self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            status = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        log = self.log.read_text()
        self._folder.cleanup()
        if status != 0:
            raise RuntimeError(f"the server ended with status {status}:\n{log}")
