"""Every rule, alert and panel against a real Prometheus that watches a real server under load."""
import math
import signal

import pytest

import panels
import stack


def ask(prometheus, query):
    expr = query.promql(f'job="{stack.JOB}"').replace("$__rate_interval", stack.WINDOW)
    return prometheus.query(expr)


PANELS = [(d, p) for d in panels.DASHBOARDS for p in d.panels]


@pytest.fixture(scope="module")
def warm(server, prometheus, load):
    """Load has run long enough that every window holds two scrapes and an audit."""
    stack.wait_for("a recorded saving", lambda: prometheus.query("adaattn:kv_bandwidth_saved:ratio"), 180)
    stack.wait_for("an audit", lambda: prometheus.query("sum(rate(adaattn_audits_total[15s])) > 0"), 180)
    stack.wait_for("an audit of a bound", lambda: prometheus.query(
        'sum(rate(adaattn_audit_ratio_count{kind="bound"}[15s])) > 0'), 180)
    assert load.is_alive() or not load.error, load.error


@pytest.mark.parametrize("dashboard,panel", PANELS, ids=lambda value: value.id)
def test_every_panel_has_data(prometheus, warm, dashboard, panel):
    for query in panel.queries:
        stack.wait_for(query.expr, lambda: any(math.isfinite(value) for _, value in ask(prometheus, query)), 20)


def test_every_rule_evaluates(prometheus, warm):
    rules = prometheus.rules()
    assert len(rules) == sum(len(group["rules"]) for group in stack.quick_rules()["groups"])
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    missing = [name for name in recorded if not prometheus.query(f'{name}{{instance="server"}}')]
    assert missing == []


def test_a_healthy_server_fires_nothing(prometheus, warm):
    assert prometheus.firing("server") <= {"AdaAttnAuditRatioHigh"}  # random data; its windows are seconds here


@pytest.mark.after_load
def test_overload_fires_the_alert_for_it(prometheus, small):
    load = stack.Load(small.unix, 25, ["--kv-len=256", "--concurrency=32", "--steps=50"], must_succeed=False)
    load.start()
    fired = stack.wait_for("AdaAttnRefusing", lambda: "AdaAttnRefusing" in prometheus.firing("small")
                           and prometheus.firing("small"), 40)
    load.finish()
    assert load.failures > 0 and "RESOURCE_EXHAUSTED" in load.error
    assert "AdaAttnErrorBudgetFast" in fired or "AdaAttnErrorBudgetFast" in prometheus.firing("small")
    assert not prometheus.firing("leaving")


@pytest.mark.after_load
def test_a_stuck_drain_fires_its_alert(prometheus, leaving):
    assert "AdaAttnDrainStuck" not in prometheus.firing("leaving")
    leaving.process.send_signal(signal.SIGTERM)
    stack.wait_for("AdaAttnDrainStuck", lambda: "AdaAttnDrainStuck" in prometheus.firing("leaving"), 20)


@pytest.mark.after_load
def test_counters_match_the_books_of_the_load_generator_to_the_byte(prometheus, server, load):
    load.finish()
    assert not load.error, load.error
    assert load.books["steps"] > 0
    wanted = {'sum(adaattn_kv_bytes_read_total{tensor=~"key|value",instance="server"})': load.books["bytes_read"],
              'sum(adaattn_kv_bytes_read_total{tensor="basis",instance="server"})': load.books["basis_bytes"],
              'sum(adaattn_kv_bytes_baseline_total{format="bf16",instance="server"})': load.books["bytes_bf16"],
              'sum(adaattn_attended_tokens_total{instance="server"})': load.books["steps"]}
    for expr, value in wanted.items():
        try:
            stack.wait_for(expr, lambda: prometheus.query(expr)[0][1] == value, 5)
        except AssertionError:
            assert prometheus.query(expr)[0][1] == value, expr
