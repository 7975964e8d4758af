"""The compose file as far as a machine without Docker can tell: what it names exists and fits."""
import json
import re
import subprocess

import pytest
import yaml

import stack

FOLDER = stack.ROOT / "deploy/compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
SERVERS = {name: s for name, s in SERVICES.items() if name.startswith("server")}


def container_port(mapping):
    return int(mapping.rsplit(":", 1)[1])


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_takes_its_flags_and_listens_where_the_ports_point(name):
    service = SERVERS[name]
    done = subprocess.run([stack.SERVER, *service["command"], "--print-config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = json.loads(done.stdout)
    ports = {int(options[key].rsplit(":", 1)[1]) for key in ("listen", "metrics-listen")}
    assert ports == {container_port(p) for p in service["ports"]}
    assert service["healthcheck"]["test"][-1] == f"--address=unix:{options['unix-socket']}"
    assert any(options["unix-socket"].startswith(mount.split(":")[0] + "/") for mount in service["tmpfs"])


@pytest.mark.parametrize("name", SERVERS)
def test_the_build_arguments_are_the_dockerfiles(name):
    build = SERVERS[name]["build"]
    dockerfile = FOLDER / build["context"] / build["dockerfile"]
    declared = set(re.findall(r"^ARG (\w+)", dockerfile.read_text(), re.MULTILINE))
    assert set(build.get("args", {})) <= declared


def test_every_mounted_file_exists_and_ports_are_on_loopback_and_distinct():
    published = []
    for name, service in SERVICES.items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], mount
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        published += [] if name == "server-gpu" else service["ports"]
    assert len(set(published)) == len(published)


def test_nothing_runs_with_more_than_it_needs_and_images_are_pinned():
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":[\w.-]+$", service["image"]) and not service["image"].endswith(":latest")
    assert all(s["read_only"] and s["user"] == "65532:65532" for s in SERVERS.values())


def test_prometheus_reads_its_configuration_and_scrapes_the_server(tmp_path):
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "rules.yaml").write_text((stack.ROOT / "deploy/observe/rules.yaml").read_text())
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yaml"], check=True)
    target = config["scrape_configs"][0]["static_configs"][0]["targets"][0]
    host, port = target.split(":")
    for service in SERVERS.values():
        assert host in service["networks"]["default"]["aliases"]
        assert int(port) in {container_port(p) for p in service["ports"]}


def test_grafana_finds_prometheus_and_the_dashboards():
    source = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
    provider = yaml.safe_load((FOLDER / "grafana/dashboards/adaattn.yaml").read_text())["providers"][0]
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    folder = next(source for source, target in mounts.items() if target == provider["options"]["path"])
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FOLDER / folder / home.rsplit("/", 1)[1]).exists()
