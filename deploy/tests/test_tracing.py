"""Spans of a real server, as an OpenTelemetry collector would get them."""
import http.server
import json
import threading
import uuid

import grpc
import numpy as np
import pytest

from prometheus_client.openmetrics import parser as openmetrics

import adaattn
import stack
from adaattn.v1 import attention_pb2

MODEL = adaattn.ModelShape(num_layers=1, num_q_heads=4, num_kv_heads=2, head_dim=64)
PARENT = "00f067aa0ba902b7"
STAGES = {"queue", "copy_in", "append", "scan", "select", "attend", "merge", "copy_out"}


class Collector(http.server.BaseHTTPRequestHandler):
    bodies: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/json"
        self.bodies.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def spans(trace):
    return [span for body in list(Collector.bodies) for resource in body["resourceSpans"]
            for scope in resource["scopeSpans"] for span in scope["spans"] if span["traceId"] == trace]


def attributes(span):
    return {a["key"]: next(iter(a["value"].values())) for a in span["attributes"]}


@pytest.fixture(scope="module")
def collector():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    server.shutdown()


@pytest.fixture(scope="module")
def server(collector):
    with adaattn.LocalServer(stack.SERVER, "--backend=cpu", "--threads=1", "--pool-bytes=64MiB",
                             "--metrics-listen=127.0.0.1:0", f"--trace-endpoint={collector}") as running:
        yield running


@pytest.fixture
def trace():
    """A trace of the test's own."""
    return uuid.uuid4().hex


class TracedClient(adaattn.Client):
    flags = "01"

    def __init__(self, address, trace):
        super().__init__(address)
        self.trace = trace

    @property
    def metadata(self):
        return (*super().metadata, ("traceparent", f"00-{self.trace}-{PARENT}-{self.flags}"))


def run_step(client, random):
    session = client.open_session(MODEL)
    shape = (400, MODEL.num_kv_heads, MODEL.head_dim)
    session.import_kv(*(random.standard_normal(shape, dtype=np.float32) for _ in range(2)))
    q = random.standard_normal((1, MODEL.num_q_heads, MODEL.head_dim), dtype=np.float32)
    result = client.attend(0, [adaattn.Step(session, q)])
    session.close()
    return result


def test_a_sampled_call_leaves_a_span_with_its_stages_and_decisions(server, trace):
    with TracedClient(server.unix, trace) as client:
        result = run_step(client, np.random.default_rng(1))
    stack.wait_for("a span", lambda: spans(trace), 10)
    parent = next(s for s in spans(trace) if s["name"] == "adaattn.v1.Attention/Attend")
    assert parent["traceId"] == trace and parent["parentSpanId"] == PARENT
    assert parent["kind"] == 2 and parent["status"]["code"] == 1
    said = attributes(parent)
    decision = result.sequences[0].decision
    assert int(said["adaattn.bytes_read"]) == decision.bytes_read
    assert int(said["adaattn.bytes_bf16"]) == decision.bytes_bf16 > 0
    assert int(said["adaattn.q_rows"]) == 1 and int(said["rpc.grpc.status_code"]) == 0
    children = [s for s in spans(trace) if s["parentSpanId"] == parent["spanId"]]
    names = [c["name"] for c in children]
    assert {"queue", "attend"} <= set(names) <= STAGES and len(set(names)) == len(names)
    assert len({s["spanId"] for s in spans(trace)}) == len(spans(trace))
    for child in children:
        assert child["traceId"] == trace
        assert int(parent["startTimeUnixNano"]) <= int(child["startTimeUnixNano"]) <= int(child["endTimeUnixNano"])
    in_order = [int(c["startTimeUnixNano"]) for c in children]
    assert in_order == sorted(in_order)


def test_the_trace_is_an_exemplar_of_its_latency_bucket(server, trace):
    with TracedClient(server.unix, trace) as client:
        run_step(client, np.random.default_rng(4))
    text = stack.get(server.metrics, "/openmetrics")
    exemplars = [line for line in text.splitlines() if "# {" in line]
    assert all(line.startswith('adaattn_request_duration_seconds_bucket{method="Attend"') for line in exemplars)
    assert sum(f'# {{trace_id="{trace}"}}' in line for line in exemplars) == 1
    families = list(openmetrics.text_string_to_metric_families(text))
    assert len(families) > 40 and text.endswith("# EOF\n")


def test_a_refused_call_says_why(server, trace):
    with TracedClient(server.unix, trace) as client:
        with pytest.raises(grpc.RpcError) as refusal:
            client.stub.Attend(attention_pb2.AttendRequest(layer=7), metadata=client.metadata)
    stack.wait_for("a span", lambda: spans(trace), 10)
    (span,) = spans(trace)
    assert span["status"] == {"code": 2, "message": refusal.value.details()}
    assert int(attributes(span)["rpc.grpc.status_code"]) == 3


def test_without_the_sampled_flag_nothing_is_sent_and_what_was_sent_is_counted(server, trace):
    with TracedClient(server.unix, trace) as client:
        client.flags = "00"
        run_step(client, np.random.default_rng(2))
        client.flags = "01"
        run_step(client, np.random.default_rng(3))
    stack.wait_for("a span", lambda: spans(trace), 10)
    assert len([s for s in spans(trace) if s["name"].endswith("/Attend")]) == 1
    counted = stack.samples(stack.get(server.metrics, "/metrics"))
    assert counted['adaattn_trace_spans_total{outcome="exported"}'] >= len(spans(trace))
    assert counted['adaattn_trace_spans_total{outcome="dropped"}'] == 0
