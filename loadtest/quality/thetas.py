"""Theta by layer: which layers a model feels, and how the threshold policy should spend its bytes over them.

A request says theta, and a request is about one layer; so a client may give each layer its own. Here one layer
at a time is answered by the server and all others exactly; the KL divergence of that says what the layer's
approximation costs. With KL = sum over layers c theta^EXPONENT and bytes falling by s for every e-fold of theta,
the least KL at any bytes has theta proportional to (s / c)^(1 / EXPONENT).
"""
from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Sequence

import torch

import adaattn
from quality.arms import Arm
from quality.mixture import Mixture
from quality.model import ExactOverPrefill, Model, Prefill
from quality.perplexity import score_rows
from quality.served import BytesRead, segments

EXPONENT = 1.75      # of KL in theta: .00048, .00158 at .002, .004 (docs/quality.md)
RANGE = (1 / 8, 4)   # of factors: beyond, neither power law nor the measured KL of a layer says much


@dataclasses.dataclass
class LayerCost:
    """Of one layer answered at `theta`, all others exactly."""

    layer: int
    kl: float           # nats, mean over rows
    bytes_ratio: float  # of the layer, as are the next
    saved: float        # further bytes saved at twice the theta
    factor: float = 1.0


class OneLayerEach:
    """As an Attend: batch entry i is answered by arms[0] in layer i, and exactly elsewhere. arms[1] answers
    beside it, for its bytes."""

    def __init__(self, client: adaattn.Client, model: Model, arms: Sequence[Arm], rows: int, prefill: Prefill, parallel: int):
        self._exact = ExactOverPrefill(prefill)
        self._mixture = Mixture(client, model.shape, arms, [segments(i, rows, parallel) for i in range(2)], prefill, quiet=False)
        self.ratios: list[tuple[float, float]] = []

    def __call__(self, layer, q, k, v, scale):
        o = torch.empty_like(q)
        # What follows has met no answer of the server yet: those entries are all alike.
        for entry in range(min(layer + 2, len(q))):
            one = slice(entry, entry + 1)
            if entry != layer:
                o[one] = self._exact(layer, q[one], k[one], v[one], scale)
        o[layer + 2:] = o[layer + 1:layer + 2]
        before = [dataclasses.replace(self._mixture.bytes_read(i)) for i in range(2)]
        o[layer] = self._mixture(layer, *(x[layer:layer + 1].expand(2, -1, -1, -1) for x in (q, k, v)), scale)[0]
        after = [self._mixture.bytes_read(i) for i in range(2)]
        self.ratios.append(tuple(BytesRead(b.read - a.read, b.bf16 - a.bf16).ratio for a, b in zip(before, after)))
        return o


def measure(client: adaattn.Client, model: Model, ids: torch.Tensor, prefill_tokens: int, arms: Sequence[Arm],
            parallel: int) -> list[LayerCost]:
    """Over the rows after prefill_tokens of ids [tokens]. arms: of theta, and of twice that."""
    prefill = Prefill(prefill_tokens)
    exact = model.hidden(ids[None], 0, prefill)[0, prefill_tokens:-1]
    new = ids[prefill_tokens:][None].expand(model.shape.num_layers, -1)
    attend = OneLayerEach(client, model, arms, new.shape[1], prefill, parallel)
    hidden = model.hidden(new, prefill_tokens, attend)[:, :-1]
    scores = score_rows(model, exact, list(hidden), ids[prefill_tokens + 1:].to(model.device))[1:]
    return with_factors([LayerCost(layer, float(one.kl.mean(dtype=float)), ratio, max(0.0, ratio - at_twice))
                         for layer, (one, (ratio, at_twice)) in enumerate(zip(scores, attend.ratios))])


def with_factors(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """Factors of theta, of geometric mean 1 before they are cut to RANGE."""
    logs = [math.log(max(cost.saved, 1e-6) / max(cost.kl, 1e-12)) / EXPONENT for cost in costs]
    mean = sum(logs) / len(logs)
    return [dataclasses.replace(cost, factor=min(max(math.exp(log - mean), RANGE[0]), RANGE[1]))
            for cost, log in zip(costs, logs)]


def write(path: pathlib.Path, model: str, costs: Sequence[LayerCost]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": "adaattn-thetas", "model": model, "factors": [round(cost.factor, 4) for cost in costs]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: str) -> tuple[float, ...]:
    """Errors: ValueError when it is no such file."""
    content = json.loads(pathlib.Path(path).read_text())
    if content.get("format") != "adaattn-thetas":
        raise ValueError(f"{path}: format {content.get('format')!r}; must be adaattn-thetas")
    return tuple(map(float, content["factors"]))
