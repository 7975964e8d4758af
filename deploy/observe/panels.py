"""The panel list: every chart of the Grafana dashboards and of the server's live page, once.

A panel says what it shows and how to ask Prometheus for it. Where the live page shows it too, `live`
names the fields of the server's own /api/live, so that both show the same thing under the same title.
generate.py turns the list into files; check.py holds its metric names against the server's.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

SELECT = 'job=~"$job",instance=~"$instance"'


@dataclass(frozen=True)
class Query:
    expr: str  # PromQL; @ stands for the label matchers of the dashboard's variables
    legend: str = ""

    def promql(self, matchers: str = SELECT) -> str:
        return self.expr.replace("@", matchers)


@dataclass(frozen=True)
class Live:
    """Where /api/live has it: a path per line or bar, in the order of the queries' legends."""
    now: tuple[str, ...] = ()      # the value of the moment, and its name; an object makes bars
    history: tuple[str, ...] = ()  # arrays of `history` and `since_start`


@dataclass(frozen=True)
class Panel:
    id: str
    title: str
    kind: str  # stat, lines, bars, table
    unit: str  # Grafana's: percentunit, s, bytes, Bps, short, none
    help: str
    queries: tuple[Query, ...]
    width: int = 12  # of 24
    max: Optional[float] = None
    warn: Optional[float] = None  # where the operator should look; `bad_below` turns it round
    bad_below: bool = False
    live: Optional[Live] = None


@dataclass(frozen=True)
class Dashboard:
    id: str
    title: str
    panels: tuple[Panel, ...] = field(default_factory=tuple)


def rate(metric: str, labels: str = "", by: str = "", window: str = "$__rate_interval") -> str:
    matchers = ",".join(part for part in ("@", labels) if part)
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{matchers}}}[{window}]))"


def quantile(share: float, metric: str, labels: str = "", by: str = "") -> str:
    groups = ", ".join(part for part in ("le", by) if part)
    return f"histogram_quantile({share}, {rate(metric + '_bucket', labels, groups)})"


def mean(metric: str) -> str:
    return f"{rate(metric + '_sum')} / {rate(metric + '_count')}"


SAVED = Panel(
    "saved", "KV bandwidth saved", "stat", "percentunit",
    "1 - bytes read / bytes that a BF16 cache would have read; metadata and bases count as read.",
    (Query("avg(adaattn:kv_bandwidth_saved:ratio{@})", "saved"),), width=5, max=1, warn=0.3,
    bad_below=True, live=Live(("now.saved_fraction",), ("saved_fraction",)))
PREDICTED = Panel(
    "predicted", "Predicted error", "stat", "percentunit",
    "Median relative error that steps are expected to have. A prediction, not a bound.",
    (Query(quantile(0.5, "adaattn_predicted_relative_error"), "p50"),), width=5, warn=0.1,
    live=Live(("now.predicted_error_p50",), ("predicted_error_p50",)))
AUDITED = Panel(
    "audited", "Audited error", "stat", "percentunit",
    "Median relative error that recomputing a sample of the steps found.",
    (Query(quantile(0.5, "adaattn_audited_relative_error"), "p50"),), width=5, warn=0.1,
    live=Live(("now.audited_error_p50",), ("audited_error_p50",)))
LATENCY = Panel(
    "latency", "Batch latency p99", "stat", "s", "From taking a batch to its last reply.",
    (Query(quantile(0.99, "adaattn_batch_duration_seconds"), "p99"),), width=4, warn=0.1,
    live=Live(("now.batch_p99",), ("batch_p99",)))
FULLEST = Panel(
    "fullest", "Fullest resource", "stat", "percentunit",
    "How full the fullest of what can run out is: what would break first.",
    (Query("topk(1, max by (resource) (adaattn:utilisation:ratio{@}))", "{{resource}}"),), width=5, max=1, warn=0.8,
    live=Live(("cache.fullest", "cache.fullest_resource"), ("utilisation",)))
UTILISATION = Panel(
    "utilisation", "What would break first", "bars", "percentunit",
    "Use of everything that has a configured end, against that end.",
    (Query("max by (resource) (adaattn:utilisation:ratio{@})", "{{resource}}"),), max=1, warn=0.8,
    live=Live(("cache.utilisation",)))
SAVED_HISTORY = Panel(
    "saved-history", "Bandwidth saved", "lines", "percentunit",
    "Share of the bytes that a BF16 cache would have read and this one did not.",
    (Query("adaattn:kv_bandwidth_saved:ratio{@}", "saved {{instance}}"),), max=1,
    live=Live(history=("saved_fraction",)))
ERROR_HISTORY = Panel(
    "error-history", "Error, predicted and audited", "lines", "percentunit",
    "Relative error of a step of one kv head: predicted by the variance model, and found by audits.",
    (Query(quantile(0.5, "adaattn_predicted_relative_error"), "predicted p50"),
     Query(quantile(0.99, "adaattn_predicted_relative_error"), "predicted p99"),
     Query(quantile(0.5, "adaattn_audited_relative_error"), "audited p50")),
    live=Live(history=("predicted_error_p50", "predicted_error_p99", "audited_error_p50")))
LATENCY_HISTORY = Panel(
    "latency-history", "Batch latency", "lines", "s", "From taking a batch to its last reply.",
    (Query(quantile(0.5, "adaattn_batch_duration_seconds"), "p50"),
     Query(quantile(0.99, "adaattn_batch_duration_seconds"), "p99")),
    live=Live(history=("batch_p50", "batch_p99")))
TOKENS_HISTORY = Panel(
    "tokens-history", "Query rows answered per second", "lines", "short", "Over layers.",
    (Query(rate("adaattn_attended_tokens_total"), "query rows"),),
    live=Live(history=("q_tokens_per_second",)))

OVERVIEW = Dashboard("overview", "AdaAttn overview", (
    SAVED, PREDICTED, AUDITED, LATENCY, FULLEST, SAVED_HISTORY, ERROR_HISTORY, LATENCY_HISTORY,
    UTILISATION, TOKENS_HISTORY,
    Panel("bandwidth", "KV bytes per second", "lines", "Bps",
          "What attention loaded, and what a BF16 cache would have loaded for the same rows.",
          (Query(rate("adaattn_kv_bytes_read_total"), "read"),
           Query(rate("adaattn_kv_bytes_baseline_total", 'format="bf16"'), "BF16 would have read"))),
    Panel("failures", "Calls failed per second", "lines", "short", "By gRPC status, without OK.",
          (Query(rate("adaattn_requests_total", 'code!="OK"', "code"), "{{code}}"),)),
    Panel("ready", "Servers ready", "stat", "none", "That take new sessions.",
          (Query("sum(adaattn_ready{@})", "ready"),)),
))

DECISIONS = Dashboard("decisions", "AdaAttn decisions", (
    Panel("key-depth", "Keys: pages by bits read", "bars", "short",
          "Sealed (page, kv head) pairs by the depth at which keys were read.",
          (Query(rate("adaattn_pages_read_total", 'tensor="key"', "bits"), "{{bits}} bits"),), width=8,
          live=Live(("totals.key_pages",))),
    Panel("value-depth", "Values: pages by bits read", "bars", "short",
          "Likewise values; skipped pages are represented by their mean.",
          (Query(rate("adaattn_pages_read_total", 'tensor="value"', "bits"), "{{bits}} bits"),
           Query(rate("adaattn_pages_skipped_total"), "skipped")), width=8,
          live=Live(("totals.value_pages",))),
    Panel("rank", "Keys: share of the rank read", "bars", "short",
          "Steps of one kv head by the quarter of head_dim into which their rank falls.",
          (Query(rate("adaattn_head_decisions_total", "", "rank_bucket"), "up to {{rank_bucket}}"),), width=8,
          live=Live(("totals.rank_quarters",))),
    Panel("mean-bits", "Mean bits of a step", "lines", "short", "16 where nothing is sealed.",
          (Query(mean("adaattn_key_bits"), "key bits"), Query(mean("adaattn_value_bits"), "value bits"))),
    Panel("mean-rank", "Mean rank of a step", "lines", "short", "Channels of K read.",
          (Query(mean("adaattn_key_rank"), "channels"),)),
    Panel("entropy", "Entropy of the page shares", "lines", "short", "Nats; how spread attention is.",
          (Query(quantile(0.5, "adaattn_attention_entropy_nats"), "p50"),
           Query(quantile(0.99, "adaattn_attention_entropy_nats"), "p99"))),
    Panel("theta", "Threshold theta", "lines", "short", "The share below which values are skipped.",
          (Query(quantile(0.5, "adaattn_theta"), "p50"),)),
    Panel("modes", "Steps by mode and precision", "lines", "short", "Steps of one kv head per second.",
          (Query(rate("adaattn_head_decisions_total", "", "mode, precision"), "{{mode}} {{precision}} bits"),)),
    Panel("policies", "Steps by policy", "lines", "short", "Steps of one kv head per second.",
          (Query(rate("adaattn_head_policies_total", "", "policy"), "{{policy}}"),)),
    Panel("fallbacks", "Fallbacks", "bars", "short",
          "Sequences read deeper, or with a looser target, than their options say.",
          (Query(rate("adaattn_fallbacks_total", "", "reason"), "{{reason}}"),),
          live=Live(("totals.fallbacks",))),
    Panel("audit-ratio", "Audited over predicted error", "lines", "short",
          "Above 1 the prediction was too small; its 90th percentile should stay below 2.",
          (Query(quantile(0.5, "adaattn_audit_ratio", 'kind="predicted"'), "p50"),
           Query(quantile(0.9, "adaattn_audit_ratio", 'kind="predicted"'), "p90")), warn=2),
    Panel("bound-violations", "Error bounds exceeded", "stat", "none",
          "Audited steps of one kv head whose error exceeded its bound, since the servers' start: must stay 0.",
          (Query("sum(adaattn_bound_violations_total{@})", "exceeded"),), warn=1),
    Panel("bound", "Error bound of deterministic steps", "lines", "percentunit",
          "What the relative error of a step of one kv head cannot exceed.",
          (Query(quantile(0.5, "adaattn_relative_error_bound"), "bound p50"),
           Query(quantile(0.99, "adaattn_relative_error_bound"), "bound p99"))),
    Panel("audit-bound", "Audited error over bound", "lines", "percentunit",
          "How much of its bound a deterministic step uses up: never more than all of it.",
          (Query(quantile(0.5, "adaattn_audit_ratio", 'kind="bound"'), "p50"),
           Query(quantile(0.99, "adaattn_audit_ratio", 'kind="bound"'), "p99")), warn=1),
    Panel("audits", "Audits per second", "lines", "short", "Sequences recomputed after their reply.",
          (Query(rate("adaattn_audits_total", "", "reference"), "{{reference}}"),)),
    Panel("dense", "Tokens read from dense pages", "lines", "short", "(token, kv head) pairs per second.",
          (Query(rate("adaattn_dense_tokens_read_total"), "dense"),)),
))

KERNELS = Dashboard("kernels", "AdaAttn kernels", (
    Panel("stages", "Time by stage, p99", "lines", "s",
          "Of a task in the queue, of a batch in the engine, of a sealing slice.",
          (Query(quantile(0.99, "adaattn_stage_duration_seconds", by="stage"), "{{stage}}"),)),
    Panel("stage-share", "Where a batch spends its time", "lines", "percentunit", "Seconds per second.",
          (Query(rate("adaattn_stage_duration_seconds_sum", 'stage!="queue"', "stage"), "{{stage}}"),)),
    Panel("batch-sequences", "Sequences in a batch", "lines", "short", "",
          (Query(mean("adaattn_batch_sequences"), "mean"),
           Query(quantile(0.99, "adaattn_batch_sequences"), "p99"))),
    Panel("batch-tokens", "Query and appended rows in a batch", "lines", "short", "",
          (Query(mean("adaattn_batch_tokens"), "mean"),)),
    Panel("read", "Bytes read by tensor", "lines", "Bps", "Counted where they are loaded.",
          (Query(rate("adaattn_kv_bytes_read_total", "", "tensor, backend"), "{{tensor}} ({{backend}})"),)),
    Panel("seal", "Pages sealed and bases fitted per second", "lines", "short", "",
          (Query(rate("adaattn_pages_sealed_total"), "pages"),
           Query(rate("adaattn_bases_fitted_total"), "bases"))),
    Panel("backlog", "Pages waiting to be sealed", "lines", "short", "Above its limit, sealing goes first.",
          (Query("adaattn_seal_backlog_pages{@}", "{{instance}}"),)),
    Panel("devices", "Devices", "table", "none", "What the backends run on, and what was built.",
          (Query("adaattn_device_info{@}", "{{device}} {{kernels}}"),
           Query("adaattn_build_info{@}", "{{version}} {{commit}}"))),
))

SESSIONS = Dashboard("sessions", "AdaAttn sessions", (
    Panel("sessions", "Sessions", "lines", "short", "Open sessions, by server.",
          (Query("adaattn_sessions{@}", "{{instance}}"),)),
    Panel("events", "Session events per second", "lines", "short", "",
          (Query(rate("adaattn_session_events_total", "", "event"), "{{event}}"),)),
    Panel("pool", "KV pool by use", "bars", "bytes", "All that the server keeps K and V in.",
          (Query("sum by (state) (adaattn_kv_bytes{@})", "{{state}}"),), live=Live(("cache.bytes",))),
    Panel("tier", "Exact tier", "lines", "bytes",
          "Originals of sealed pages in host memory, against what is set aside for them.",
          (Query('sum(adaattn_kv_bytes{@,state="exact"})', "used"),
           Query("sum(adaattn_kv_exact_tier_bytes{@})", "size"))),
    Panel("pages", "Pages in use", "lines", "short", "One page holds all kv heads.",
          (Query("sum by (state) (adaattn_kv_pages{@})", "{{state}}"),)),
    Panel("streams", "Streams open", "lines", "short", "AttendStream calls.",
          (Query("sum(adaattn_streams{@})", "streams"),)),
    Panel("appended", "Tokens appended per second", "lines", "short", "Over layers.",
          (Query(rate("adaattn_appended_tokens_total"), "tokens"),)),
    Panel("drift", "Basis drift", "lines", "short", "1: the basis fits as when it was made.",
          (Query("max by (instance) (adaattn_basis_drift_ratio{@})", "{{instance}}"),), warn=2),
    Panel("wire", "Bytes on the wire", "lines", "Bps", "Attend, AttendStream and ImportKv.",
          (Query(rate("adaattn_wire_bytes_total", "", "direction, transport"), "{{direction}} {{transport}}"),)),
))

SLO = Dashboard("slo", "AdaAttn service levels", (
    Panel("availability", "Calls answered, last hour", "stat", "percentunit",
          "Without failures that are the caller's.",
          (Query("1 - avg(adaattn:request_errors:ratio_rate1h{@})", "answered"),), max=1, warn=0.999,
          bad_below=True),
    Panel("budget-burn", "Speed at which the error budget burns", "lines", "short",
          "1 uses up the budget of 0.1 % in 30 days; alerts fire above 14.4 and 6.",
          (Query("adaattn:request_errors:ratio_rate5m{@} / 0.001", "5 min {{instance}}"),
           Query("adaattn:request_errors:ratio_rate1h{@} / 0.001", "1 h {{instance}}"))),
    Panel("request-latency", "Attend: time to the answer", "lines", "s", "A message's arrival to its answer.",
          (Query(quantile(0.5, "adaattn_request_duration_seconds", 'method=~"Attend|AttendStream"'), "p50"),
           Query(quantile(0.99, "adaattn_request_duration_seconds", 'method=~"Attend|AttendStream"'), "p99"))),
    Panel("requests", "Calls per second", "lines", "short", "By method.",
          (Query(rate("adaattn_requests_total", "", "method"), "{{method}}"),)),
    Panel("sequence-status", "Sequences by status", "lines", "short", "One message may hold many.",
          (Query(rate("adaattn_sequences_total", "", "status"), "{{status}}"),)),
    Panel("queue", "Queue", "lines", "short", "Tasks waiting.",
          (Query("adaattn_queue_depth{@}", "{{instance}}"),)),
    Panel("queue-bytes", "Payload waiting and in flight", "lines", "bytes", "",
          (Query("sum(adaattn_queue_bytes{@})", "waiting"),
           Query("sum(adaattn_inflight_bytes{@})", "not yet answered"))),
    Panel("process", "Processor and memory of the process", "lines", "none", "Cores; GiB resident.",
          (Query(rate("process_cpu_seconds_total"), "cores"),
           Query("sum(process_resident_memory_bytes{@}) / 2^30", "GiB"),
           Query("sum(process_threads{@})", "threads"))),
    Panel("spans", "Trace spans per second", "lines", "none", "Sent to the collector, or dropped.",
          (Query(rate("adaattn_trace_spans_total", "", "outcome"), "{{outcome}}"),)),
    Panel("descriptors", "Open descriptors", "lines", "none", "",
          (Query("sum(process_open_fds{@})", "open"),)),
))

DASHBOARDS = (OVERVIEW, DECISIONS, KERNELS, SESSIONS, SLO)

# The live page, top to bottom.
LIVE_SECTIONS = (
    ("Now", (SAVED, PREDICTED, AUDITED, LATENCY, FULLEST)),
    ("Over time", (SAVED_HISTORY, ERROR_HISTORY, LATENCY_HISTORY, TOKENS_HISTORY)),
    ("What would break first", (UTILISATION, *(p for p in SESSIONS.panels if p.live))),
    ("What was decided, since start", tuple(p for p in DECISIONS.panels if p.live)),
)
