"use strict";
// Written by deploy/observe/generate.py from panels.py; change that.

const SECTIONS = [
  {title: "Now", panels: [
    {"id": "saved", "title": "KV bandwidth saved", "kind": "stat", "unit": "percentunit", "help": "1 - bytes read / bytes that a BF16 cache would have read; metadata and bases count as read.", "max": 1, "warn": 0.3, "badBelow": true, "now": ["now.saved_fraction"], "history": ["saved_fraction"], "legends": ["saved"]},
    {"id": "predicted", "title": "Predicted error", "kind": "stat", "unit": "percentunit", "help": "Median relative error that steps are expected to have. A prediction, not a bound.", "max": null, "warn": 0.1, "badBelow": false, "now": ["now.predicted_error_p50"], "history": ["predicted_error_p50"], "legends": ["p50"]},
    {"id": "audited", "title": "Audited error", "kind": "stat", "unit": "percentunit", "help": "Median relative error that recomputing a sample of the steps found.", "max": null, "warn": 0.1, "badBelow": false, "now": ["now.audited_error_p50"], "history": ["audited_error_p50"], "legends": ["p50"]},
    {"id": "latency", "title": "Batch latency p99", "kind": "stat", "unit": "s", "help": "From taking a batch to its last reply.", "max": null, "warn": 0.1, "badBelow": false, "now": ["now.batch_p99"], "history": ["batch_p99"], "legends": ["p99"]},
    {"id": "fullest", "title": "Fullest resource", "kind": "stat", "unit": "percentunit", "help": "How full the fullest of what can run out is: what would break first.", "max": 1, "warn": 0.8, "badBelow": false, "now": ["cache.fullest", "cache.fullest_resource"], "history": ["utilisation"], "legends": ["{{resource}}"]}]},
  {title: "Over time", panels: [
    {"id": "saved-history", "title": "Bandwidth saved", "kind": "lines", "unit": "percentunit", "help": "Share of the bytes that a BF16 cache would have read and this one did not.", "max": 1, "warn": null, "badBelow": false, "now": [], "history": ["saved_fraction"], "legends": ["saved {{instance}}"]},
    {"id": "error-history", "title": "Error, predicted and audited", "kind": "lines", "unit": "percentunit", "help": "Relative error of a step of one kv head: predicted by the variance model, and found by audits.", "max": null, "warn": null, "badBelow": false, "now": [], "history": ["predicted_error_p50", "predicted_error_p99", "audited_error_p50"], "legends": ["predicted p50", "predicted p99", "audited p50"]},
    {"id": "latency-history", "title": "Batch latency", "kind": "lines", "unit": "s", "help": "From taking a batch to its last reply.", "max": null, "warn": null, "badBelow": false, "now": [], "history": ["batch_p50", "batch_p99"], "legends": ["p50", "p99"]},
    {"id": "tokens-history", "title": "Query rows answered per second", "kind": "lines", "unit": "short", "help": "Over layers.", "max": null, "warn": null, "badBelow": false, "now": [], "history": ["q_tokens_per_second"], "legends": ["query rows"]}]},
  {title: "What would break first", panels: [
    {"id": "utilisation", "title": "What would break first", "kind": "bars", "unit": "percentunit", "help": "Use of everything that has a configured end, against that end.", "max": 1, "warn": 0.8, "badBelow": false, "now": ["cache.utilisation"], "history": [], "legends": ["{{resource}}"]},
    {"id": "pool", "title": "KV pool by use", "kind": "bars", "unit": "bytes", "help": "All that the server keeps K and V in.", "max": null, "warn": null, "badBelow": false, "now": ["cache.bytes"], "history": [], "legends": ["{{state}}"]}]},
  {title: "What was decided, since start", panels: [
    {"id": "key-depth", "title": "Keys: pages by bits read", "kind": "bars", "unit": "short", "help": "Sealed (page, kv head) pairs by the depth at which keys were read.", "max": null, "warn": null, "badBelow": false, "now": ["totals.key_pages"], "history": [], "legends": ["{{bits}} bits"]},
    {"id": "value-depth", "title": "Values: pages by bits read", "kind": "bars", "unit": "short", "help": "Likewise values; skipped pages are represented by their mean.", "max": null, "warn": null, "badBelow": false, "now": ["totals.value_pages"], "history": [], "legends": ["{{bits}} bits", "skipped"]},
    {"id": "rank", "title": "Keys: share of the rank read", "kind": "bars", "unit": "short", "help": "Steps of one kv head by the quarter of head_dim into which their rank falls.", "max": null, "warn": null, "badBelow": false, "now": ["totals.rank_quarters"], "history": [], "legends": ["up to {{rank_bucket}}"]},
    {"id": "fallbacks", "title": "Fallbacks", "kind": "bars", "unit": "short", "help": "Sequences read deeper, or with a looser target, than their options say.", "max": null, "warn": null, "badBelow": false, "now": ["totals.fallbacks"], "history": [], "legends": ["{{reason}}"]}]}
];
