"""What kubectl renders of every overlay: valid by schema, and as safe as we promise."""
import json
import re
import subprocess

import kubernetes_validate
import pytest
import yaml

import stack

KUBERNETES = stack.ROOT / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu", "ha")
# Kinds of other projects, which the schemas do not know, and what must be in their spec.
FOREIGN = {"Certificate": {"secretName", "issuerRef"}, "Issuer": set(), "PodMonitor": {"selector", "podMetricsEndpoints"},
           "PrometheusRule": {"groups"}, "ScaledObject": {"scaleTargetRef", "triggers", "maxReplicaCount"}}


def render(overlay):
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / "overlays" / overlay], check=True,
                          capture_output=True, text=True)
    return [d for d in yaml.safe_load_all(done.stdout) if d]


RENDERED = {overlay: render(overlay) for overlay in OVERLAYS}


def named(overlay, kind, name="adaattn"):
    return next(d for d in RENDERED[overlay] if d["kind"] == kind and d["metadata"]["name"] == name)


def pods(overlay):
    return [d for d in RENDERED[overlay] if d["kind"] in ("StatefulSet", "Deployment")]


def seconds(duration):
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_document_is_valid(overlay):
    for document in RENDERED[overlay]:
        if document["kind"] in FOREIGN:
            assert FOREIGN[document["kind"]] <= set(document["spec"]), document
        else:
            kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_validator_refuses_what_is_wrong():
    broken = json.loads(json.dumps(named("cpu", "StatefulSet")))
    broken["spec"]["replicas"] = "three"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_confined_bounded_and_probed(overlay):
    for workload in pods(overlay):
        spec = workload["spec"]["template"]["spec"]
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
            assert "lifecycle" not in container, "SIGTERM drains; a preStop hook would only delay it"
            assert re.search(r":[\w.-]+$", container["image"]) and not container["image"].endswith(":latest")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_period_covers_the_drain_and_the_server_takes_its_config(overlay, tmp_path):
    config = next(d for d in RENDERED[overlay] if d["kind"] == "ConfigMap"
                  and d["metadata"]["name"].startswith("adaattn-config"))["data"]["adaattn.json"]
    spec = named(overlay, "StatefulSet")["spec"]["template"]["spec"]
    options = json.loads(config)
    drain = seconds(options["drain-pause"]) + seconds(options["drain-deadline"])
    assert drain < spec["terminationGracePeriodSeconds"] <= drain + 30
    path = tmp_path / "adaattn.json"
    path.write_text(config)
    flags = [f"--config={path}" if flag.startswith("--config=") else flag for flag in spec["containers"][0]["args"]]
    done = subprocess.run([stack.SERVER, *flags, "--print-config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ports = {p["name"]: p["containerPort"] for p in spec["containers"][0]["ports"]}
    printed = json.loads(done.stdout)
    assert printed["listen"].endswith(f":{ports['grpc']}") and printed["metrics-listen"].endswith(f":{ports['metrics']}")
    socket = printed["unix-socket"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f"--address=unix:{socket}" in spec["containers"][0][probe]["exec"]["command"]
    mounts = {m["mountPath"]: m for m in spec["containers"][0]["volumeMounts"]}
    assert any(socket.startswith(path + "/") and not m.get("readOnly") for path, m in mounts.items())


@pytest.mark.parametrize("overlay", ["gpu", "ha"])
def test_a_gpu_server_gets_one_gpu(overlay):
    container = named(overlay, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and "--backend=cuda" in container["args"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_pods_and_references_exist(overlay):
    labels = [w["spec"]["template"]["metadata"]["labels"] for w in pods(overlay)]
    for service in (d for d in RENDERED[overlay] if d["kind"] == "Service"):
        assert any(service["spec"]["selector"].items() <= own.items() for own in labels), service["metadata"]["name"]
    for kind in ("PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        for document in (d for d in RENDERED[overlay] if d["kind"] == kind):
            spec = document["spec"]
            selector = (spec.get("selector") or spec.get("podSelector"))["matchLabels"]
            assert any(selector.items() <= own.items() for own in labels), document["metadata"]["name"]
    names = {d["metadata"]["name"] for d in RENDERED[overlay] if d["kind"] == "ConfigMap"}
    secrets = {d["spec"]["secretName"] for d in RENDERED[overlay] if d["kind"] == "Certificate"}
    for workload in pods(overlay):
        for volume in workload["spec"]["template"]["spec"]["volumes"]:
            assert volume.get("configMap", {}).get("name") in names | {None}
            assert volume.get("secret", {}).get("secretName") in secrets | {None}


def test_the_autoscaler_stays_within_the_servers_that_the_proxy_lists_and_shrinks_slowly():
    listed = (KUBERNETES / "overlays/ha/haproxy.cfg").read_text()
    servers = re.findall(r"^  server (adaattn-(\d+)) \1\.adaattn-headless:7470 id (\d+)$", listed, re.MULTILINE)
    assert [int(ordinal) + 1 for _, ordinal, _ in servers] == [int(number) for _, _, number in servers]
    spec = named("ha", "ScaledObject")["spec"]
    assert spec["maxReplicaCount"] == len(servers)
    assert spec["minReplicaCount"] == named("ha", "StatefulSet")["spec"]["replicas"]
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 600 and down["policies"][0]["value"] == 1


def test_traffic_goes_through_the_proxy_where_there_are_several():
    assert named("ha", "Service")["spec"]["selector"]["app.kubernetes.io/component"] == "proxy"
    assert named("gpu", "Service")["spec"]["selector"]["app.kubernetes.io/component"] == "server"
    grpc = named("ha", "NetworkPolicy")["spec"]["ingress"][0]
    assert [p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in grpc["from"]] == ["proxy"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_dashboard_is_shipped(overlay):
    data = named(overlay, "ConfigMap", "adaattn-dashboards")
    assert data["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = {p.name for p in (stack.ROOT / "deploy/observe/grafana").glob("*.json")}
    assert set(data["data"]) == files
    assert all(json.loads(text)["panels"] for text in data["data"].values())
