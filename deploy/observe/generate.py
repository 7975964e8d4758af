#!/usr/bin/env python3
"""Writes what follows from the panel list, the rules and the server's metric table.

  deploy/observe/generate.py           writes the files
  deploy/observe/generate.py --check   fails when one of them is not what it would write

grafana/*.json      dashboards, from panels.py
../kubernetes/base/prometheus-rule.yaml   rules.yaml as the Prometheus operator wants it
../../server/live_page/panels.js          the live page's part of panels.py
../../docs/metrics.md                     every metric, from `adaattn-server --print-metrics`
"""
import json
import os
import pathlib
import subprocess
import sys

import yaml

import panels

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVER = os.environ.get("ADAATTN_SERVER_BINARY", ROOT / "build/release/server/adaattn-server")
GRID = 24
# Okabe-Ito, as on the live page: told apart by every kind of colour vision.
GOOD, WARN = "#0072B2", "#D55E00"


def metric_table():
    """[{name, type, help, labels, buckets}], as the server itself lists it."""
    return json.loads(subprocess.run([SERVER, "--print-metrics"], check=True, capture_output=True).stdout)


def grafana_panel(panel, number, x, y):
    kinds = {"stat": "stat", "lines": "timeseries", "bars": "bargauge", "table": "table"}
    steps = [{"color": GOOD, "value": None}]
    if panel.warn is not None:
        steps = ([{"color": WARN, "value": None}, {"color": GOOD, "value": panel.warn}] if panel.bad_below
                 else steps + [{"color": WARN, "value": panel.warn}])
    defaults = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}, "min": 0}
    if panel.max is not None:
        defaults["max"] = panel.max
    options = {}
    if panel.kind in ("stat", "bars"):
        defaults["color"] = {"mode": "thresholds"}
        options["reduceOptions"] = {"calcs": ["lastNotNull"]}
    if panel.kind == "bars":
        options |= {"orientation": "horizontal", "displayMode": "basic"}
    instant = panel.kind in ("bars", "table")
    targets = [{"refId": chr(ord("A") + i), "expr": query.promql(), "legendFormat": query.legend}
               | ({"instant": True, "range": False} if instant else {})
               for i, query in enumerate(panel.queries)]
    return {"id": number, "title": panel.title, "description": panel.help, "type": kinds[panel.kind],
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"x": x, "y": y, "w": panel.width, "h": 4 if panel.kind == "stat" else 8},
            "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options, "targets": targets}


def grafana(dashboard):
    placed, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(dashboard.panels, 1):
        if x + panel.width > GRID:
            x, y, height = 0, y + height, 0
        placed.append(grafana_panel(panel, number, x, y))
        x, height = x + panel.width, max(height, placed[-1]["gridPos"]["h"])
    variable = {"type": "query", "datasource": {"type": "prometheus", "uid": "${datasource}"}, "refresh": 2,
                "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        variable | {"name": "job", "query": "label_values(adaattn_build_info, job)"},
        variable | {"name": "instance", "query": 'label_values(adaattn_build_info{job=~"$job"}, instance)'}]
    links = [{"type": "dashboards", "tags": ["adaattn"], "title": "AdaAttn", "asDropdown": True, "keepTime": True,
              "includeVars": True}]
    return {"uid": f"adaattn-{dashboard.id}", "title": dashboard.title, "tags": ["adaattn"], "editable": False,
            "schemaVersion": 39, "timezone": "browser", "refresh": "10s", "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": variables}, "links": links, "panels": placed}


def live_panels():
    """The sections of the live page, as the script that it loads."""
    def panel(p):
        return {"id": p.id, "title": p.title, "kind": p.kind, "unit": p.unit, "help": p.help, "max": p.max,
                "warn": p.warn, "badBelow": p.bad_below, "now": p.live.now, "history": p.live.history,
                "legends": [q.legend for q in p.queries]}
    sections = [{"title": title, "panels": [panel(p) for p in chosen]} for title, chosen in panels.LIVE_SECTIONS]
    lines = ",\n".join(
        f'  {{title: {json.dumps(s["title"])}, panels: [\n'
        + ",\n".join("    " + json.dumps(p) for p in s["panels"]) + "]}" for s in sections)
    return ('"use strict";\n// Written by deploy/observe/generate.py from panels.py; change that.\n\n'
            f"const SECTIONS = [\n{lines}\n];\n")


def prometheus_rule(rules):
    rule = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule",
            "metadata": {"name": "adaattn", "labels": {"app.kubernetes.io/name": "adaattn"}}, "spec": rules}
    return ("# Written by deploy/observe/generate.py from rules.yaml; change that.\n"
            + yaml.safe_dump(rule, sort_keys=False, width=100))


def metrics_document(table, rules):
    def labels(metric):
        return "; ".join(f"`{name}`: {', '.join(values) or '*set at start*'}"
                         for name, values in metric["labels"].items()) or "none"
    lines = ["# Metrics", "", "Written by `deploy/observe/generate.py` from the server's own table; change "
             "`server/metric_table.cc` instead. Every series exists from the start with its fixed label values, so "
             "their number is bounded, and no label ever holds a session.", "",
             "| Metric | Type | Labels | What it is |", "| --- | --- | --- | --- |"]
    lines += [f"| `{m['name']}` | {m['type']} | {labels(m)} | {m['help']} |" for m in table]
    lines += ["", "## Buckets", "", "| Histogram | Upper bounds |", "| --- | --- |"]
    lines += [f"| `{m['name']}` | {', '.join(f'{b:g}' for b in m['buckets'])} |" for m in table if "buckets" in m]
    recorded = sorted({r["record"] for g in rules["groups"] for r in g["rules"] if "record" in r})
    lines += ["", "## Recorded", "", "Prometheus makes these by `deploy/observe/rules.yaml`; alerts and dashboards use them:",
              "", *(f"- `{name}`" for name in recorded)]
    return "\n".join(lines) + "\n"


def outputs():
    """Path -> text of every file that is generated."""
    rules = yaml.safe_load((HERE / "rules.yaml").read_text())
    made = {HERE / "grafana" / f"{d.id}.json": json.dumps(grafana(d), indent=1) + "\n" for d in panels.DASHBOARDS}
    made[ROOT / "deploy/kubernetes/base/prometheus-rule.yaml"] = prometheus_rule(rules)
    made[ROOT / "server/live_page/panels.js"] = live_panels()
    made[ROOT / "docs/metrics.md"] = metrics_document(metric_table(), rules)
    return made


def main():
    check = sys.argv[1:] == ["--check"]
    stale = 0
    for path, text in outputs().items():
        if path.exists() and path.read_text() == text:
            continue
        if check:
            print(f"{path.relative_to(ROOT)}: not what deploy/observe/generate.py writes")
            stale += 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
