#!/usr/bin/env python3
"""Holds what loadtest/adaattn_bench makes of its programs' reports. Run by ctest as `bench_table`."""
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import unittest
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def load(name):
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "loadtest" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


SHAPE = {"num_sequences": 8, "kv_len": 32768, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
OTHER = {**SHAPE, "kv_len": 8192}


def exact(kind, us, q_len=1, shape=None):
    whole = 1 << 30
    return {**(shape or SHAPE), "kv_type": kind, "q_len": q_len, "median_us": us,
            "kv_bytes": whole if kind == "bf16" else whole // 2, "bytes_as_bf16": whole}


def progressive(us, coarse_rank, trace="a"):
    return {**SHAPE, "trace": trace, "coarse_rank": coarse_rank, "median_us": us,
            "fraction_of_bf16": 0.14, "mean_error": 0.04, "fp8_mean_error": 0.1}


def peer(name, us, trace="a", **more):
    return {**SHAPE, "trace": trace, "peer": name, "median_us": us, "mean_error": 0.1, **more}


class TableTest(unittest.TestCase):
    def setUp(self):
        self.bench = load("adaattn_bench")

    def rows(self, peers):
        return self.bench.collect(
            [exact("bf16", 370.0), exact("fp8_e4m3", 200.0), exact("bf16", 1.0, q_len=4),
             exact("bf16", 2.0, shape=OTHER)],
            [progressive(100.0, 0), progressive(80.0, 64)], peers)

    def test_compares_with_the_fastest_peer_of_the_same_case(self):
        rows = self.rows([peer("FlashInfer XQA FP8", 220.0), peer("cuDNN SDPA BF16", 360.0),
                          peer("FlashInfer BF16", 5.0, trace="b")])
        times = {row["name"]: row["times_best_peer"] for row in rows}
        self.assertEqual(times, {"FlashInfer XQA FP8": 1.0, "cuDNN SDPA BF16": 220 / 360,
                                 "AdaAttn BF16": 220 / 370, "AdaAttn FP8": 1.1,
                                 "AdaAttn progressive, one-stage": 2.2,
                                 "AdaAttn progressive, two-stage": 2.75})
        self.assertAlmostEqual(rows[0]["tb_per_s_as_bf16"], (1 << 30) / 220e-6 / 1e12)

    def test_names_what_was_run_at_a_peers_error(self):
        peers = [peer("FlashInfer XQA FP8", 220.0), peer("FlashAttention-3 FP8", 210.0),
                 peer("FlashAttention-3 FP8", 1.0, skipped="no"), peer("FlashInfer BF16", 2.0)]
        fastest = self.bench.fastest_fp8(peers, "a", tuple(SHAPE.values()))
        self.assertEqual(fastest["median_us"], 210.0)
        self.assertIsNone(self.bench.fastest_fp8(peers, "b", tuple(SHAPE.values())))
        again = [{**progressive(90.0, 0), "peer": fastest["peer"], "share": share}
                 for share in (0.5, 1.0)]
        names = [row["name"] for row in self.bench.collect([], again, [])]
        self.assertEqual(names, ["AdaAttn, half of FlashAttention-3 FP8's error",
                                 "AdaAttn, at FlashAttention-3 FP8's error"])

    def test_leaves_out_peers_that_did_not_run_or_answered_wrongly(self):
        rows = self.rows([{**SHAPE, "trace": "a", "peer": "cuDNN SDPA BF16", "skipped": "no"},
                          peer("FlashInfer BF16", 1.0, skipped="its answer is wrong")])
        self.assertEqual(len(rows), 4)
        self.assertFalse(any("times_best_peer" in row for row in rows))


class RunTest(unittest.TestCase):
    def test_times_everything_in_the_same_way(self):
        bench = load("adaattn_bench")
        ours = {"decode": [exact("bf16", 370.0)], "device": "d", "cuda_driver": "13.0",
                "commit": "c", "progressive": [{**progressive(100.0, 0), "trace_path": "a.st",
                                                "error_goal": 0.05}]}
        commands = []

        def run(command, **_):
            commands.append(command)
            of_peers = any(part.endswith("peers.py") for part in command)
            report = {"peers": [peer("FlashInfer XQA FP8", 220.0)]} if of_peers else ours
            path = next(part for part in command if part.startswith("--json=")).split("=")[1]
            pathlib.Path(path).write_text(json.dumps(report), encoding="utf-8")
            return subprocess.CompletedProcess(command, 0)

        printed = io.StringIO()
        with mock.patch.object(bench.subprocess, "run", run), \
                mock.patch.object(bench, "find_binary", lambda: pathlib.Path("bin/decode")), \
                mock.patch.object(sys, "argv",
                                  ["adaattn_bench", "decode", "--runs=7", "--flush=read"]), \
                contextlib.redirect_stdout(printed):
            self.assertEqual(bench.main(), 0)
        # One stage, two stages, the peers, ours at the peer's error.
        self.assertEqual(len(commands), 4)
        for command in commands:
            self.assertIn("--runs=7", command)
            self.assertIn("--flush=read", command)
        self.assertIn("medians of 7 runs, L2 flushed before each (read)", printed.getvalue())


class PeersTest(unittest.TestCase):
    """The batches of peer_inputs.py, which must draw the rows that row_judge_test.cc expects."""

    def test_draws_the_rows_and_heads_of_the_benchmark(self):
        peers = load("peer_inputs.py")

        class Shaped:
            def __init__(self, *shape):
                self.shape = shape

        trace = peers.Trace("t", Shaped(9, 64, 64), Shaped(3, 8192, 64), Shaped(3, 8192, 64),
                            [4096 + 65 * i for i in range(64)], 0.125)
        case = peers.Case(trace, 8, 16384, 32, 8)
        self.assertEqual(case.source_rows(), [63, 62, 61, 60, 59, 58, 57, 56])
        self.assertEqual(peers.Case(trace, 8, 2048, 32, 8).source_rows(), list(range(8)))
        heads = [case.source_head(0, head) for head in range(32)]
        self.assertEqual([head // 3 for head in heads], [head // 4 % 3 for head in range(32)])
        self.assertEqual(set(heads), set(range(9)))
        self.assertEqual(heads[:4], [0, 1, 2, 0])
        self.assertNotEqual(case.source_head(1, 5), case.source_head(0, 5))


if __name__ == "__main__":
    unittest.main()
