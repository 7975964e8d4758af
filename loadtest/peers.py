#!/usr/bin/env python3
"""Times other people's decode attention on the inputs of adaattn_decode_bench --progressive.

  loadtest/peers.py --case=FILE:8x32768:32/8 [--case=...] [--runs=31] [--json=FILE]

A case is a captured trace (or `joined:FILE`, pairs of its heads side by side, or `random:128`,
normal numbers of that head_dim), batch x kv_len and q heads / kv heads. Batches are made of the
trace as loadtest/row_judge.h says, every sequence in memory of its own. Times are medians of CUDA
graph replays between events, L2 flushed before each: by writing, which leaves lines to be
written back while the replay runs, or by reading.
Errors are relative L2 against float64 on the trace's FP16 values, mean over a sample of rows.

Needs torch and a GPU; of FlashInfer (flashinfer-python), FlashAttention-3 (fa3-fwd) and cuDNN
(through torch) it times what it finds and names what it does not.
"""
import argparse
import json
import math
import statistics
import sys

from peer_inputs import DEVICE, PAGE, Inputs, parse_case

FLUSH_BYTES = 256 << 20  # five times the L2 of an H100


def flashinfer_bf16(inputs):
    import flashinfer
    import torch

    case = inputs.case
    keys, values, table = inputs.paged(torch.bfloat16)
    q = inputs.query(torch.bfloat16)
    per_sequence = table.shape[1]
    indptr = torch.arange(case.batch + 1, dtype=torch.int32) * per_sequence
    last = torch.full((case.batch,), PAGE, dtype=torch.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE), "HND", use_cuda_graph=True,
        use_tensor_cores=True, paged_kv_indptr_buffer=torch.empty_like(indptr, device=DEVICE),
        paged_kv_indices_buffer=torch.empty(table.numel(), dtype=torch.int32, device=DEVICE),
        paged_kv_last_page_len_buffer=torch.empty_like(last, device=DEVICE))
    wrapper.plan(indptr.to(DEVICE), table.reshape(-1), last.to(DEVICE), case.q_heads, case.kv_heads,
                 q.shape[-1], PAGE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
                 sm_scale=inputs.scale)
    out = torch.empty_like(q)
    return lambda: wrapper.run(q, (keys, values), out=out)


def flashinfer_xqa_fp8(inputs):
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    case = inputs.case
    keys, values, table = inputs.paged(torch.float8_e4m3fn)
    q = inputs.query(torch.bfloat16)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=DEVICE)
    lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(q)
    return lambda: xqa_batch_decode_with_kv_cache(
        q, (keys, values), workspace, table, lengths, case.kv_len, bmm1_scale=inputs.scale,
        bmm2_scale=1.0, kv_layout="HND", out=out)


def flash_attention_3(inputs, dtype):
    import torch
    from fa3_fwd_interface import flash_attn_with_kvcache

    case = inputs.case
    keys = inputs.contiguous(inputs.k, dtype, heads_first=False)
    values = inputs.contiguous(inputs.v, dtype, heads_first=False)
    q = inputs.query(dtype).unsqueeze(1)
    lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=DEVICE)
    scales = {}
    if dtype == torch.float8_e4m3fn:
        one = torch.ones(case.batch, case.kv_heads, dtype=torch.float32, device=DEVICE)
        scales = {"q_descale": one, "k_descale": one, "v_descale": one}
    return lambda: flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths, causal=True,
                                           softmax_scale=inputs.scale, **scales).squeeze(1)


def flash_attention_3_bf16(inputs):
    import torch

    return flash_attention_3(inputs, torch.bfloat16)


def flash_attention_3_fp8(inputs):
    import torch

    return flash_attention_3(inputs, torch.float8_e4m3fn)


def cudnn_bf16(inputs):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = inputs.case
    keys = inputs.contiguous(inputs.k, torch.bfloat16, heads_first=True)
    values = inputs.contiguous(inputs.v, torch.bfloat16, heads_first=True)
    # The q heads of a kv head as its rows of q: nothing is causal in a single step.
    q = inputs.query(torch.bfloat16)
    q = q.reshape(case.batch, case.kv_heads, case.q_heads // case.kv_heads, -1)

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, keys, values,
                                                                   scale=inputs.scale)
        return out.reshape(case.batch, case.q_heads, -1)

    return run


PEERS = {
    "FlashInfer BF16": flashinfer_bf16,
    "FlashInfer XQA FP8": flashinfer_xqa_fp8,
    "FlashAttention-3 BF16": flash_attention_3_bf16,
    "FlashAttention-3 FP8": flash_attention_3_fp8,
    "cuDNN SDPA BF16": cudnn_bf16,
}


def flush_l2(buffer, how):
    if how == "read":
        buffer.sum()
    else:
        buffer.zero_()


def time_graph(run, runs, flush):
    """(microseconds of each replay, the last output). flush(): empties L2."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for i in range(-3, runs):
        flush()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 0:
            times.append(start.elapsed_time(stop) * 1e3)
    return times, out


def mean_error(out, expected):
    errors = []
    for (sequence, head), truth in expected.items():
        got = out[sequence, head].double()
        errors.append(((got - truth).norm() / truth.norm()).item())
    return statistics.fmean(errors)


def measure(case, names, runs, sample, flush):
    """One report entry per peer: its time and error, or why there is none."""
    import torch

    inputs = Inputs(case)
    expected = inputs.expected(sample)
    bytes_bf16 = 4 * case.batch * case.kv_len * case.kv_heads * case.trace.q.shape[-1]
    entries = []
    for name in names:
        entry = {"peer": name, "case": case.name, "trace": case.trace.name,
                 "num_sequences": case.batch, "kv_len": case.kv_len, "num_q_heads": case.q_heads,
                 "num_kv_heads": case.kv_heads, "head_dim": case.trace.q.shape[-1]}
        try:
            times, out = time_graph(PEERS[name](inputs), runs, flush)
            entry["median_us"] = statistics.median(times)
            entry["min_us"] = min(times)
            entry["mean_error"] = mean_error(out, expected)
            entry["tb_per_s_as_bf16"] = bytes_bf16 / entry["median_us"] * 1e-6
            print(f"{name:22} {case.name:28} median {entry['median_us']:8.2f} us  "
                  f"min {entry['min_us']:8.2f}  {entry['tb_per_s_as_bf16']:5.2f} TB/s as BF16  "
                  f"error {entry['mean_error']:.4f}", flush=True)
            if not math.isfinite(entry["mean_error"]) or entry["mean_error"] > 0.5:
                entry["skipped"] = f"its answer is wrong: error {entry['mean_error']:.3g}"
        except Exception as error:  # A peer may fail in any way; the others go on.
            first = (str(error).strip().splitlines() or [""])[0]
            entry["skipped"] = f"{type(error).__name__}: {first}"
        if "skipped" in entry:
            print(f"{name:22} {case.name:28} skipped: {entry['skipped']}", flush=True)
        entries.append(entry)
        torch.cuda.empty_cache()
    return entries


def versions():
    """Names and versions of what is installed."""
    from importlib import metadata

    found = {}
    for package in ("torch", "flashinfer-python", "fa3-fwd", "nvidia-cudnn-cu12",
                    "nvidia-cudnn-cu13"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", required=True, dest="cases",
                        metavar="TRACE:BATCHxTOKENS:Q/KV")
    parser.add_argument("--peer", action="append", choices=list(PEERS), dest="peers",
                        help="only these")
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--sample", type=int, default=128, help="rows whose error is taken")
    parser.add_argument("--flush", choices=["written", "read"], default="written")
    parser.add_argument("--json")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("peers: torch is not installed; nothing to time", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("peers: no CUDA device", file=sys.stderr)
        return 3
    traces = {}
    cases = [parse_case(text, traces) for text in args.cases]
    buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=DEVICE)
    report = {"device": torch.cuda.get_device_name(), "versions": versions(),
              "command": " ".join(sys.argv), "peers": []}
    for case in cases:
        report["peers"] += measure(case, args.peers or list(PEERS), args.runs, args.sample,
                                   lambda: flush_l2(buffer, args.flush))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
