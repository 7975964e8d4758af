"""What each part of the design is worth: policies of the server and variants of the ladder on one text, as bytes
against error, KL and perplexity, with dense and static caches as baselines.

Policies are answered by the server. What it does not offer runs in PyTorch (ladder.py); that this states what the
server does is shown first, on the settings that both have (SHARED).
"""
from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Iterator, Mapping, Optional, Sequence

import numpy as np
import torch

import adaattn
from quality import audit
from quality.arms import parse
from quality.dense import DenseCode, bytes_ratio
from quality.ladder import Ladder, LadderOverPrefill
from quality.mixture import Mixture
from quality.model import Model, Prefill
from quality.perplexity import score_rows
from quality.served import FIT_TOKENS, segments


@dataclasses.dataclass
class Point:
    """One way of attending on the text. error: mean relative L2 of a head's output against exact attention over
    the same q, k, v; kl: mean, nats; bytes: of BF16's, metadata included."""

    family: str
    name: str
    bytes: float
    error: float
    kl: float
    perplexity_change: float
    flips: float


# Settings that the server and the simulation share: arm of arms.py -> the same here.
SHARED = {
    "theta=.004": Ladder(theta=0.004),
    "theta=.001": Ladder(theta=0.001),
    "two-stage=.004": Ladder(theta=0.004, coarse_rank=0.5),
    "two-stage=.016/1": Ladder(theta=0.016, coarse_rank=0.5, coarse_z=1.0),
    "unrotated=.004": Ladder(theta=0.004, coarse_rank=0.5, basis="none"),
    "entropy=.032": Ladder(theta=0.032, entropy="page shares"),
    "static=8/32/8": Ladder(static=(8, 0.5, 8)),
    "static=6/64/4": Ladder(static=(6, 1.0, 4)),
}


# What reads by the mass it finds, and what does not: the two sides of the Pareto plot.
ADAPTIVE = {
    "budget": [f"budget={target}" for target in ("0.02", "0.03", "0.05", "0.07", "0.1", "0.15", "0.2")],
    "entropy": [f"entropy={theta}" for theta in ("0.008", "0.016", "0.032", "0.064", "0.128")],
    "threshold, one stage": [f"theta={theta}" for theta in ("0.0005", "0.001", "0.002", "0.004", "0.008", "0.016")],
    "threshold, two stages": [f"two-stage={theta}" for theta in ("0.0005", "0.001", "0.002", "0.004", "0.008", "0.016")],
}
LEARNED = {"learned": [f"learned={target}" for target in ("0.02", "0.05", "0.1", "0.2")]}  # with a policy file
STATIC = {
    "static bits": ["static=4/0/2", "static=4/0/4", "static=6/0/4", "static=6/0/6", "static=8/0/8"],
    "static rank": ["static=8/{half}/8", "static=8/{half}/4", "static=8/{most}/8", "static=8/{most}/4"],
}
DENSE = ("fp8", "int8", "int4")
SERVED_TOGETHER = 8  # arms in one pass of the model


def variants() -> Iterator[tuple[str, str, Ladder]]:
    """(family, name, variant)"""
    for theta in (0.001, 0.004, 0.016, 0.064):
        yield "rank only", f"theta {theta}", Ladder(theta, coarse_rank=0.5, scan_bits=8, key_bits=(8,),
                                                   value_bits=(8,), skips=False)
    for page in (16, 32, 128):
        for theta in (0.002, 0.004, 0.008):
            scaled = theta * page / 64
            yield f"page {page}", f"theta {scaled:g}", Ladder(scaled, page=page, coarse_rank=0.5)
    for basis in ("none", "hadamard", "pca", "profile"):
        for theta in (0.002, 0.008):
            yield f"basis {basis}", f"theta {theta}", Ladder(theta, basis=basis, coarse_rank=0.5)
    for depths in ((8,), (4, 8)):
        yield f"value depths {depths}", "theta 0.004", Ladder(0.004, coarse_rank=0.5, value_bits=depths)
    for theta in (0.004, 0.008, 0.016):
        yield "means corrected", f"theta {theta}", Ladder(theta, coarse_rank=0.5, corrects=True)
    yield "no skipping", "theta 0.004", Ladder(0.004, coarse_rank=0.5, skips=False)
    for rank, z in ((0.25, 2.0), (0.5, 0.0), (0.5, 1.0), (0.5, 3.0), (0.75, 2.0)):
        yield "coarse scan", f"rank {rank}, z {z:g}", Ladder(0.004, coarse_rank=rank, coarse_z=z)
    yield "2-bit scan", "theta 0.002", Ladder(0.002, scan_bits=2, key_bits=(2, 4, 6, 8))
    for shares in ("exact", "uncorrected", "of the row before"):
        for theta in (0.002, 0.008):
            yield f"shares {shares}", f"theta {theta}", Ladder(theta, shares=shares)
    # Entropies of tokens exceed those of page shares by 1.2 nats on the traces (docs/policies.md): thetas by exp(1.2).
    for entropy, unit in (("page shares", 1), ("all tokens", 3.3), ("4 pages drawn", 3.3)):
        for theta in (0.016, 0.064):
            yield f"entropy of {entropy}", f"theta {theta * unit:g}", Ladder(theta * unit, entropy=entropy)


class Ablation:
    """One text: tokens [0, prefill) imported, the rest decoded."""

    def __init__(self, model: Model, ids: torch.Tensor, prefill_tokens: int, other: Optional[torch.Tensor]):
        """other: tokens of another text, for the basis that a profile brings."""
        self.model, self.prefill_tokens = model, prefill_tokens
        self.prefill = Prefill(prefill_tokens)
        self.exact = model.hidden(ids[None], 0, self.prefill)[0, prefill_tokens:-1]
        self.new, self.targets = ids[prefill_tokens:][None], ids[prefill_tokens + 1:].to(model.device)
        self.profile = Prefill(prefill_tokens)
        model.hidden(other[None], 0, self.profile)

    def point(self, family: str, name: str, hidden: torch.Tensor, ratio: float, error: float) -> Point:
        base, scores = score_rows(self.model, self.exact, [hidden[:-1]], self.targets)
        change = float(np.expm1(scores.nll.mean(dtype=float) - base.nll.mean(dtype=float)))
        return Point(family, name, ratio, error, float(scores.kl.mean(dtype=float)), change,
                     float(scores.flip.mean()))

    def simulated(self, family: str, name: str, variant: Ladder) -> Point:
        attend = LadderOverPrefill(variant, self.prefill, FIT_TOKENS, self.profile)
        hidden = self.model.hidden(self.new, self.prefill_tokens, attend)[0]
        return self.point(family, name, hidden, attend.ratio, attend.mean_error)

    def dense(self, code: str) -> Point:
        audited = audit.Audited(DenseCode(self.prefill, code), self.prefill)
        hidden = self.model.hidden(self.new, self.prefill_tokens, audited)[0]
        error = audit.result_of(code, None, [audited.of_entry(0)]).error_q
        return self.point("dense", code, hidden, bytes_ratio(code, self.model.shape.head_dim), error)

    def served(self, client: adaattn.Client, families: Mapping[str, Sequence[str]], parallel: int) -> list[Point]:
        """The arms of each family (names of arms.py) by the server, SERVED_TOGETHER in one pass of the model."""
        todo = [(family, name) for family, names in families.items() for name in names]
        points = []
        for begin in range(0, len(todo), SERVED_TOGETHER):
            some = todo[begin:begin + SERVED_TOGETHER]
            arms = [parse(name, self.model.shape.head_dim) for _, name in some]
            new = self.new.expand(len(arms), -1)
            lanes = [segments(i, new.shape[1], parallel) for i in range(len(arms))]
            mixture = Mixture(client, self.model.shape, arms, lanes, self.prefill, quiet=False)
            audited = audit.Audited(mixture, self.prefill)
            hidden = self.model.hidden(new, self.prefill_tokens, audited)
            for i, (family, name) in enumerate(some):
                error = audit.result_of(name, None, [audited.of_entry(i)]).error_q
                points.append(self.point(family, name, hidden[i], mixture.ratios(i)[0], error))
        return points


def run(client: adaattn.Client, model: Model, ids: torch.Tensor, prefill_tokens: int, other: torch.Tensor,
        parallel: int, learned: bool) -> list[Point]:
    """Every point; progress to stderr. learned: the server has a policy file."""
    begin = time.monotonic()
    ablation = Ablation(model, ids, prefill_tokens, other)
    d = model.shape.head_dim
    static = {family: [name.format(half=d // 2, most=3 * d // 4) for name in names] for family, names in STATIC.items()}
    points = [Point("exact", "exact", 1.0, 0.0, 0.0, 0.0, 0.0)]
    points += ablation.served(client, {"served": ["bf16", *SHARED], **ADAPTIVE, **(LEARNED if learned else {}), **static},
                              parallel)
    points += [ablation.simulated("simulated", name, variant) for name, variant in SHARED.items()]
    points += [ablation.dense(code) for code in DENSE]
    todo = list(variants())
    for i, (family, name, variant) in enumerate(todo):
        points.append(ablation.simulated(family, name, variant))
        print(f"\rvariant {i + 1} of {len(todo)}, {time.monotonic() - begin:.0f} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return points


def agreement(points: Sequence[Point]) -> list[str]:
    """One line for each shared setting: what the server read and erred, what the simulation did."""
    by = {(point.family, point.name): point for point in points}
    lines = []
    for name in SHARED:
        real, simulated = by["served", name], by["simulated", name]
        lines.append(f"{name:<18} bytes {real.bytes:.4f} {simulated.bytes:.4f}  error {real.error:.4f} "
                     f"{simulated.error:.4f}  KL {real.kl:.6f} {simulated.kl:.6f}")
    return lines


def table(points: Sequence[Point]) -> str:
    """Markdown."""
    rows = ["| family | variant | bytes | error | KL | perplexity | flips |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for p in points:
        rows.append(f"| {p.family} | {p.name} | {p.bytes:.4f} | {p.error:.4f} | {p.kl:.6f} | "
                    f"{100 * p.perplexity_change:+.3f} % | {100 * p.flips:.2f} % |")
    return "\n".join(rows)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in bytes and KL alike, by bytes."""
    best, found = float("inf"), []
    for point in sorted(points, key=lambda p: (p.bytes, p.kl)):
        if point.kl < best:
            best = point.kl
            found.append(point)
    return found


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """The static and dense points that no adaptive one matches in bytes and KL alike."""
    adaptive = [p for p in points if p.family in ADAPTIVE or p.family in LEARNED]
    return [p for p in points if p.family in (*STATIC, "dense")
            and not any(a.bytes <= p.bytes and a.kl <= p.kl for a in adaptive)]


def plot(points: Sequence[Point], folder: pathlib.Path) -> None:
    """Bytes against KL and error, a line a family: policies_kl.svg and policies_error.svg of what is adaptive,
    static and dense; kl.svg and error.svg of the variants, beside the threshold policy."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams.update({"svg.hashsalt": "adaattn", "svg.fonttype": "none"})
    policies = (*ADAPTIVE, *LEARNED, *STATIC, "dense")
    _plot([p for p in points if p.family in policies], folder, "policies_", plt)
    variants_shown = [p for p in points if p.family not in (*policies, "exact", "served", "simulated")]
    _plot(variants_shown + [p for p in points if p.family.startswith("threshold")], folder, "", plt)


def _plot(shown: Sequence[Point], folder: pathlib.Path, prefix: str, plt) -> None:
    for what in ("kl", "error"):
        figure, axes = plt.subplots(figsize=(9, 6))
        for i, family in enumerate(dict.fromkeys(p.family for p in shown)):
            line = sorted((p.bytes, getattr(p, what)) for p in shown if p.family == family)
            static = family in STATIC or family == "dense"
            axes.plot(*zip(*line), marker="os^v"[i // 10], markersize=4, linewidth=1, label=family,
                      linestyle="--" if static else "-")
        if what == "kl":
            best = front(shown)
            axes.plot([p.bytes for p in best], [p.kl for p in best], color="black", linestyle=":", label="Pareto front")
        axes.set(xlabel="bytes read, of BF16's", ylabel={"kl": "mean KL to exact, nats", "error": "mean relative error"}[what],
                 yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
        figure.savefig(folder / f"{prefix}{what}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
