#!/usr/bin/env python3
"""Fails when a dashboard, rule, alert or autoscaler names what the server does not export.

  deploy/observe/check.py [RULES_FILE]     default: rules.yaml beside this file

Held against `adaattn-server --print-metrics`: metric names, label names and label values in every
PromQL expression of panels.py, the rules and the autoscalers (KEDA triggers). Also: recorded names
are recorded, every alert has a test in rules_test.yaml and a section in docs/operations.md.
"""
import pathlib
import re
import sys

import yaml

import generate
import panels

HERE = pathlib.Path(__file__).resolve().parent
SCRAPED = {"job", "instance", "namespace", "pod"}  # what Prometheus adds to every series
NAME = re.compile(r"(?<![\w:])((?:adaattn|process)_[a-z0-9_]+)(?:\{([^}]*)\})?")
RECORDED = re.compile(r"(?<![\w:])(adaattn:[a-z0-9_:]+)")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on)\s*\(([^)]*)\)")


class Names:
    """What may stand in an expression."""

    def __init__(self, table, rules):
        self.metrics = {m["name"]: m for m in table}
        self.recorded = {}
        for rule in (r for g in rules["groups"] for r in g["rules"] if "record" in r):
            self.recorded.setdefault(rule["record"], set()).update(rule.get("labels", {}))

    def metric(self, name):
        if name in self.metrics and self.metrics[name]["type"] != "histogram":
            return self.metrics[name]
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        found = self.metrics.get(base)
        return found if found and found["type"] == "histogram" and base != name else None


def errors(expr, names):
    """What `expr` names and the server does not have."""
    labels = set(SCRAPED)
    for name, matchers in NAME.findall(expr):
        metric = names.metric(name)
        if metric is None:
            yield f"no metric {name}"
            continue
        own = metric["labels"] | ({"le": []} if metric["type"] == "histogram" else {})
        labels |= set(own)
        for label, operator, value in MATCHER.findall(matchers):
            if label not in own and label not in SCRAPED:
                yield f"{name} has no label {label}"
            elif own.get(label):
                wanted = value.split("|") if "~" in operator else [value]
                yield from (f"{name} has no {label}={v}" for v in wanted if v not in own[label])
    for name in RECORDED.findall(expr):
        if name not in names.recorded:
            yield f"nothing records {name}"
        labels |= names.recorded.get(name, set())
    for group in GROUPING.findall(expr):
        yield from (f"no label {label} to group by" for label in re.split(r"[\s,]+", group.strip())
                    if label and label not in labels)


def expressions(rules):
    """(where, PromQL) of everything that asks Prometheus."""
    for dashboard in panels.DASHBOARDS:
        for panel in dashboard.panels:
            for query in panel.queries:
                yield f"panel {dashboard.id}/{panel.id}", query.expr.replace("@", "")
    for rule in (r for g in rules["groups"] for r in g["rules"]):
        yield f"rule {rule.get('record') or rule['alert']}", rule["expr"]
    for path in sorted(generate.ROOT.glob("deploy/kubernetes/**/*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document and document.get("kind") == "ScaledObject":
                for trigger in document["spec"]["triggers"]:
                    yield f"{path.name} trigger", trigger["metadata"]["query"]


def alert_errors(rules, tests, operations):
    alerts = {r["alert"] for g in rules["groups"] for r in g["rules"] if "alert" in r}
    tested = {t["alertname"] for group in tests["tests"] for t in group.get("alert_rule_test", [])
              if t.get("exp_alerts")}
    sections = set(re.findall(r"^### (AdaAttn\w+)$", operations, re.MULTILINE))
    yield from (f"alert {a} never fires in rules_test.yaml" for a in sorted(alerts - tested))
    yield from (f"alert {a} has no section in docs/operations.md" for a in sorted(alerts - sections))
    yield from (f"docs/operations.md is about {a}, which is no alert" for a in sorted(sections - alerts))


def self_test():
    """The check finds each kind of mistake, so that silence means something."""
    table = [{"name": "adaattn_a_total", "type": "counter", "labels": {"kind": ["x", "y"]}},
             {"name": "adaattn_h", "type": "histogram", "labels": {}}]
    names = Names(table, {"groups": [{"rules": [{"record": "adaattn:r", "expr": "1", "labels": {"part": "z"}}]}]})
    wrong = {'adaattn_a_total{kind="x"}': 0, 'adaattn_a_total{kind="z"}': 1, "adaattn_gone": 1, "adaattn_h": 1,
             "sum by (le) (adaattn_h_bucket)": 0, "adaattn_a_total_sum": 1, "adaattn:r": 0, "adaattn:gone": 1,
             "sum by (kind, nothing) (adaattn_a_total)": 1, 'adaattn_a_total{gone="x"}': 1,
             "max by (part) (adaattn:r)": 0, 'adaattn_a_total{kind=~"x|y|z"}': 1}
    for expr, count in wrong.items():
        if len(list(errors(expr, names))) != count:
            sys.exit(f"check: the check itself is wrong about {expr}: {list(errors(expr, names))}")


def main():
    self_test()
    rules_path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "rules.yaml"
    rules = yaml.safe_load(rules_path.read_text())
    names = Names(generate.metric_table(), rules)
    found = [f"{where}: {error}" for where, expr in expressions(rules) for error in errors(expr, names)]
    found += alert_errors(rules, yaml.safe_load((HERE / "rules_test.yaml").read_text()),
                          (generate.ROOT / "docs/operations.md").read_text())
    print("\n".join(found + [f"observe: {len(list(expressions(rules)))} expressions, {len(found)} wrong"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
