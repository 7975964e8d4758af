"""What the end to end tests run: a server, a load generator that keeps books, a real Prometheus."""
from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("ADAATTN_BUILD", ROOT / "build/release"))
SERVER = BUILD / "server/adaattn-server"
CLI = BUILD / "client/adaattn-cli"
OUT = ROOT / "build/e2e"
JOB = "adaattn"
WINDOW = "15s"  # what stands for every longer window of the rules and panels


def get(address: str, path: str, **query: str) -> str:
    url = f"http://{address}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode()


def wait_for(what: str, condition, seconds: float):
    """The first truthy value of `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


def samples(exposition: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in exposition.splitlines() if line and line[0] != "#")
    return {name: float(value) for name, _, value in lines}


class Load(threading.Thread):
    """Runs `adaattn-cli bench` with each of the lists of flags in turn until `finish`, for `seconds` at
    least; adds up its books."""

    def __init__(self, address: str, seconds: float, *flags: list[str], must_succeed: bool = True):
        super().__init__(daemon=True)
        self.books = {"steps": 0, "bytes_read": 0, "basis_bytes": 0, "bytes_bf16": 0}
        self.failures = 0
        self.error = ""
        self._commands = itertools.cycle([CLI, "bench", f"--address={address}", "--json", *f] for f in flags)
        self._end = time.monotonic() + seconds
        self._must_succeed = must_succeed
        self._finish = threading.Event()

    def run(self) -> None:
        while time.monotonic() < self._end or not self._finish.is_set():
            done = subprocess.run(next(self._commands), capture_output=True, text=True, check=False)
            if done.returncode == 0:
                for name, value in json.loads(done.stdout)["books"].items():
                    self.books[name] += value
                continue
            self.failures += 1
            self.error = done.stderr
            if self._must_succeed:
                return

    def finish(self) -> None:
        """Waits for the time and the run under way to end."""
        self._finish.set()
        self.join()


def quick_rules() -> dict:
    """The shipped rules with every window and wait cut to seconds, so that a minute shows them all."""
    text = (ROOT / "deploy/observe/rules.yaml").read_text()
    text = re.sub(r"\[\w+\] offset \w+", f"[{WINDOW}] offset 2s", text)
    text = re.sub(r"\[\d+[smhd]\]", f"[{WINDOW}]", text)
    rules = yaml.safe_load(re.sub(r"for: \d+[mh]", "for: 1s", text))
    for group in rules["groups"]:
        group["interval"] = "1s"
    return rules


class Prometheus:
    """Debian's prometheus, scraping once a second what `targets` name; ends with `with`."""

    def __init__(self, folder: pathlib.Path, targets: dict[str, str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        (folder / "rules.yaml").write_text(yaml.safe_dump(quick_rules()))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": JOB, "static_configs": [
                {"targets": [address], "labels": {"instance": name}} for name, address in targets.items()]}]}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._log = open(folder / "prometheus.log", "wb")
        self._process = subprocess.Popen(
            [shutil.which("prometheus"), f"--config.file={folder}/prometheus.yaml",
             f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self.address}"],
            stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)

    def __enter__(self) -> "Prometheus":
        wait_for("Prometheus ready", lambda: get(self.address, "/-/ready"), 30)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self._log.close()

    def query(self, expr: str) -> list[tuple[dict, float]]:
        """(labels, value) of an instant vector, now."""
        reply = json.loads(get(self.address, "/api/v1/query", query=expr))
        return [(entry["metric"], float(entry["value"][1])) for entry in reply["data"]["result"]]

    def rules(self) -> list[dict]:
        groups = json.loads(get(self.address, "/api/v1/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def firing(self, instance: str) -> set[str]:
        return {alert["labels"]["alertname"]
                for alert in json.loads(get(self.address, "/api/v1/alerts"))["data"]["alerts"]
                if alert["state"] == "firing" and alert["labels"].get("instance") == instance}
