"""Three real servers behind a real HAProxy with the shipped configuration, mutual TLS throughout.

Only addresses and certificate paths are replaced: what the cluster's DNS and secrets give.
"""
import re
import shutil
import socket
import subprocess
import threading
import time

import grpc
import pytest

import adaattn
import stack

CONFIG = stack.ROOT / "deploy/kubernetes/overlays/ha/haproxy.cfg"
KEYS = [f"worker-{i}" for i in range(30)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_certificate(folder, name, subject_alternative, *signer):
    """An EC key and a certificate in one file, as HAProxy wants them."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-days", "1", "-subj", f"/CN={name}", "-addext", subject_alternative, *signer,
                    "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"], check=True, capture_output=True)
    (folder / f"{name}-combined.pem").write_text((folder / f"{name}.pem").read_text() + (folder / f"{name}.key").read_text())


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A folder with ca, server and tenant: key, certificate and both in one."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder, "ca", "keyUsage=keyCertSign")
    signer = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    make_certificate(folder, "server", "subjectAltName=DNS:localhost,IP:127.0.0.1", *signer)
    make_certificate(folder, "tenant", "subjectAltName=DNS:tenant", *signer)
    return folder


def start_server(tls, port):
    return adaattn.LocalServer(stack.SERVER, "--backend=cpu", "--threads=1", "--pool-bytes=16MiB",
                               f"--listen=127.0.0.1:{port}", f"--tls-cert={tls}/server.pem",
                               f"--tls-key={tls}/server.key", f"--tls-ca={tls}/ca.pem")


def local_config(folder, tls, proxy_port, ports):
    """haproxy.cfg with local addresses; the servers beyond `ports` left out."""
    text = CONFIG.read_text().replace("bind :7470", f"bind 127.0.0.1:{proxy_port}")
    text = text.replace("bind :8404", f"bind 127.0.0.1:{free_port()}").replace("/etc/haproxy-tls/ca.crt", str(tls / "ca.pem"))
    front, back = text.split("\nbackend servers")
    front = front.replace("/etc/haproxy-tls/tls-combined.pem", str(tls / "server-combined.pem"))
    back = back.replace("/etc/haproxy-tls/tls-combined.pem", str(tls / "tenant-combined.pem")).replace("init-addr none", "init-addr last,libc,none")
    for ordinal, port in enumerate(ports):
        back = back.replace(f"adaattn-{ordinal}.adaattn-headless:7470", f"127.0.0.1:{port}")
    back = re.sub(r"^  server \S+ \S+\.adaattn-headless.*\n", "", back, flags=re.MULTILINE)
    path = folder / "haproxy.cfg"
    path.write_text(front + "\nbackend servers" + back)
    return path


@pytest.fixture(scope="module")
def cluster(tls, tmp_path_factory):
    """(servers, ports, proxy address, certificates); a test that stops a server puts another in its place."""
    ports = [free_port() for _ in range(3)]
    servers = [start_server(tls, port) for port in ports]
    proxy_port = free_port()
    config = local_config(tmp_path_factory.mktemp("haproxy"), tls, proxy_port, ports)
    proxy = subprocess.Popen([shutil.which("haproxy"), "-db", "-f", config])
    stack.wait_for("the proxy", lambda: socket.create_connection(("127.0.0.1", proxy_port)), 10)
    yield servers, ports, f"localhost:{proxy_port}", tls
    proxy.terminate()
    proxy.wait()
    for server in servers:
        server.stop()


def connect(tls, address, key):
    credentials = grpc.ssl_channel_credentials(*[(tls / name).read_bytes() for name in ("ca.pem", "tenant.key", "tenant.pem")])
    return adaattn.Client(address, route_key=key, credentials=credentials)


def instance(tls, address, key="direct"):
    with connect(tls, address, key) as client:
        return client.server_info().instance


def routes(tls, address):
    return {key: instance(tls, address, key) for key in KEYS}


def test_the_shipped_configuration_is_sound(tls, tmp_path):
    subprocess.run([shutil.which("haproxy"), "-c", "-f", local_config(tmp_path, tls, 7470, [1, 2, 3])], check=True)


def test_a_key_keeps_its_server_and_every_server_has_keys(cluster):
    servers, ports, address, tls = cluster
    first = routes(tls, address)
    assert set(first.values()) == {instance(tls, f"localhost:{port}") for port in ports}
    assert routes(tls, address) == first


def test_a_killed_server_moves_its_own_keys_and_loses_no_call(cluster):
    servers, ports, address, tls = cluster
    before = routes(tls, address)
    killed = instance(tls, f"localhost:{ports[1]}")
    asked, failed, stop = [0], [], threading.Event()

    def ask(key):
        # One channel that lives through the kill, and no retry of the client's own.
        with connect(tls, address, key) as client:
            while not stop.is_set():
                try:
                    client.stub.GetServerInfo(adaattn.v1.attention_pb2.GetServerInfoRequest(), timeout=10,
                                              metadata=client.metadata)
                    asked[0] += 1
                except grpc.RpcError as error:
                    failed.append((key, error.code(), error.details()))
                time.sleep(0.01)

    askers = [threading.Thread(target=ask, args=(key,)) for key in KEYS[:9]]
    for asker in askers:
        asker.start()
    time.sleep(1)
    servers[1].process.kill()
    servers[1].process.wait()
    time.sleep(2)
    stop.set()
    for asker in askers:
        asker.join()
    assert asked[0] > 100
    # A call that had reached the server when it died is lost with it; all others are answered.
    assert len(failed) <= sum(1 for key in KEYS[:9] if before[key] == killed), failed
    after = routes(tls, address)
    assert {key for key in KEYS if after[key] != before[key]} == {key for key in KEYS if before[key] == killed}

    servers[1] = start_server(tls, ports[1])
    replaced = instance(tls, f"localhost:{ports[1]}")
    stack.wait_for("its keys to come back", lambda: replaced in routes(tls, address).values(), 10)
    assert routes(tls, address) == {key: replaced if old == killed else old for key, old in before.items()}
