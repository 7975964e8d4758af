"""Fits the learned policy: `python -m adaattn.fit_policy [-o FILE] [--check] TRACE...`

A policy file holds the weights of log2(theta) = weights . features, theta being the share of the
softmax mass below which a page's values are skipped, the features those of a kv head after its scan
(kernels/policy/theta.h). Every captured row of a trace is replayed as a decode step at every theta
of a grid, as the ladder would read it; the largest theta whose error meets the target is what the
model shall give. It is fitted by quantile regression (Koenker and Bassett, Regression Quantiles,
1978), so that only `quantile` of the steps get a theta above theirs and miss their target.

Traces are safetensors files of one layer: q [q_heads, rows, d], k, v [kv_heads, tokens, d] FP16,
positions [rows] I32, expected_o [q_heads, rows, d] F32, metadata softmax_scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import struct
import sys

import numpy as np

PAGE = 64
FIT_TOKENS = 1024
VERSION = 1
FEATURES = ["one", "log_target", "entropy", "log_sealed", "log_square", "log_token_square",
            "log_variance", "log_pages"]
THETAS = 2.0 ** np.arange(-16, -1.75, 0.5)  # the range of theta that the server gives
TARGETS = (0.02, 0.03, 0.05, 0.07, 0.1)
VALUE_BITS = np.array([0, 2, 4, 6, 8])
KEY_BITS = np.array([4, 4, 6, 8, 8])  # that go with them


@dataclasses.dataclass
class Trace:
    """One file: q, k, v, expected_o as float32 in their shapes, positions [rows]."""

    path: pathlib.Path
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    expected_o: np.ndarray
    positions: np.ndarray
    softmax_scale: float


def load_trace(path: pathlib.Path) -> Trace:
    """Reads one trace. Raises ValueError naming the path and what is wrong with it."""
    types = {"F16": np.float16, "F32": np.float32, "I32": np.int32}
    data = path.read_bytes()
    try:
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8:8 + size])
        scale = float(header.pop("__metadata__")["softmax_scale"])
        arrays = {}
        for name, entry in header.items():
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
        q, k, v, out = (arrays[name].astype(np.float32) for name in ("q", "k", "v", "expected_o"))
        positions = arrays["positions"]
    except (KeyError, ValueError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: not a trace: {error!r}") from error
    if (q.ndim, k.ndim) != (3, 3) or k.shape != v.shape or q.shape != out.shape \
            or q.shape[2] != k.shape[2] or q.shape[0] % k.shape[0] or positions.shape != q.shape[1:2]:
        raise ValueError(f"{path}: shapes of q {q.shape}, k {k.shape}, v {v.shape}, expected_o {out.shape}, "
                         f"positions {positions.shape} do not go together")
    if not all(np.isfinite(array).all() for array in (q, k, v, out)):
        raise ValueError(f"{path}: NaN or infinity among its values")
    return Trace(path, q, k, v, out, positions, scale)


def _hadamard(d: int) -> np.ndarray:
    """The orthonormal transform [d, d]; 80 and 96 by blocks."""
    if d & (d - 1):
        matrix = np.zeros((d, d), np.float32)
        matrix[:64, :64], matrix[64:, 64:] = _hadamard(64), _hadamard(d - 64)
        return matrix
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(d))


def _codes(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Nested 8-bit codes of x and their ranges, quarter octaves above the maximum along `axis`."""
    largest = np.maximum(np.abs(x).max(axis, keepdims=True), 1e-9)
    ranges = np.exp2(np.ceil(np.log2(largest) * 4) / 4).astype(np.float32)
    return np.clip(np.floor((x / ranges + 1) * 128), 0, 255), ranges


def _decode(codes: np.ndarray, ranges: np.ndarray, bits: int) -> np.ndarray:
    return ((np.floor(codes / 2 ** (8 - bits)) + 0.5) / 2 ** (bits - 1) - 1) * ranges


class SealedHead:
    """One kv head of a trace, every full page sealed with a basis of its first tokens."""

    def __init__(self, trace: Trace, head: int):
        group = len(trace.q) // len(trace.k)
        self.group, self.d = group, trace.k.shape[2]
        self.scale = trace.softmax_scale
        self.q = trace.q[head * group:(head + 1) * group]  # [group, rows, d]
        self.expected = trace.expected_o[head * group:(head + 1) * group]
        self.k, self.v, d = trace.k[head], trace.v[head], self.d
        pages = len(self.k) // PAGE
        self.mean = self.k[:FIT_TOKENS].mean(0)
        self.basis = self._fit_basis(self.q[:, :max(1, self.q.shape[1] // 4)].reshape(-1, d))
        rotated = ((self.k - self.mean) @ self.basis)[:pages * PAGE].reshape(pages, PAGE, d)
        codes, self.key_ranges = _codes(rotated, 1)
        self.keys = {bits: _decode(codes, self.key_ranges, bits) for bits in (4, 6, 8)}
        blocks = d // 64 if d % 64 == 0 else 1
        values = self.v[:pages * PAGE] @ _hadamard(d)
        codes, ranges = _codes(values.reshape(pages, PAGE, blocks, d // blocks), 3)
        self.values = {bits: _decode(codes, ranges, bits).reshape(pages, PAGE, d) @ _hadamard(d).T
                       for bits in (2, 4, 6, 8)}
        self.value_means = self.v[:pages * PAGE].reshape(pages, PAGE, d).mean(1)

    def _fit_basis(self, queries: np.ndarray) -> np.ndarray:
        """Eigenvectors of the keys' second moment [d, d], by query-weighted energy."""
        centred = (self.k[:FIT_TOKENS] - self.mean).astype(np.float64)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        energy = np.square(queries @ vectors).mean(0) * np.square(centred @ vectors).mean(0)
        return vectors[:, np.argsort(-energy)].astype(np.float32)


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    largest = x.max(axis, keepdims=True)
    return np.squeeze(largest, axis) + np.log(np.exp(x - largest).sum(axis))


class Step:
    """A decode step of one kv head over the tokens before row `row`: its scan, and any theta."""

    def __init__(self, head: SealedHead, row: int, length: int):
        self.head, self.sealed = head, length // PAGE - 1
        sealed, scale, q = self.sealed, head.scale, head.q[:, row]
        self.expected = head.expected[:, row]
        rotated, q_mean = q @ head.basis, q @ head.mean
        self.scores = {bits: scale * (np.einsum("gd,ptd->gpt", rotated, keys[:sealed]) + q_mean[:, None, None])
                       for bits, keys in head.keys.items()}
        page_lse = _log_sum_exp(self.scores[4], 2)  # [group, pages]
        self.concentration = np.exp(_log_sum_exp(2 * self.scores[4], 2) - 2 * page_lse)
        unit = np.square(head.key_ranges[:sealed, 0]) * 4.0 ** (1 - 4) / 12
        self.variance = scale ** 2 * np.square(rotated) @ unit.T
        log_mass = page_lse + np.minimum(self.variance, 4) / 2
        begin = sealed * PAGE
        dense = scale * q @ head.k[begin:length].T
        self.top = _log_sum_exp(np.concatenate([log_mass, dense], 1), 1)[:, None]
        self.shares = np.exp(log_mass - self.top)  # [group, pages]
        weights = np.exp(dense - self.top)
        self.dense_mass, self.dense_out = weights.sum(1), weights @ head.v[begin:length]
        self._read_pages()

    def _read_pages(self) -> None:
        """Mass [depths, group, pages] and output [depths, group, pages, d] of each page by depth."""
        self.masses, self.outs = [self.shares], [self.shares[..., None] * self.head.value_means[:self.sealed]]
        for key_bits, value_bits in zip(KEY_BITS[1:], VALUE_BITS[1:]):
            weights = np.exp(self.scores[key_bits] - self.top[:, :, None])
            self.masses.append(weights.sum(2))
            self.outs.append(np.einsum("gpt,ptd->gpd", weights, self.head.values[value_bits][:self.sealed]))
        self.masses, self.outs = np.stack(self.masses), np.stack(self.outs)

    def features(self) -> np.ndarray:
        """[len(FEATURES)], log_target left 0; the same sums as kernels/policy/theta.h."""
        def log2(x: float) -> float:
            return max(np.log2(x), -20.0) if x > 0 else -20.0

        shares = self.shares
        items = np.concatenate([shares, 1 - shares.sum(1, keepdims=True)], 1)
        entropy = -(items * np.log(np.maximum(items, 1e-38))).sum(1).mean()
        square = np.square(shares)
        return np.array([
            1, 0, entropy, log2(shares.sum(1).mean()), log2(square.sum(1).mean()),
            log2((square * self.concentration).sum(1).mean()),
            log2((shares * np.minimum(self.variance, 4)).sum(1).mean()), log2(self.sealed)])

    def error(self, theta: float) -> float:
        """Root mean square over the q heads of their outputs' relative errors."""
        share = self.shares.max(0)
        depth = np.searchsorted(theta * np.array([1, 4, 16, 64]), share)
        depth[0] = len(VALUE_BITS) - 1  # the sink
        pages = np.arange(self.sealed)
        mass = self.masses[depth, :, pages].sum(0) + self.dense_mass
        out = (self.outs[depth, :, pages].sum(0) + self.dense_out) / mass[:, None]
        gaps = np.square(out - self.expected).sum(1) / np.square(self.expected).sum(1)
        return float(np.sqrt(gaps.mean()))


@dataclasses.dataclass
class Samples:
    """Head-steps of one trace: features [n, 8] and the error of each theta of THETAS [n, thetas]."""

    name: str
    features: np.ndarray
    errors: np.ndarray


def sample(trace: Trace) -> Samples:
    """Replays every row with at least two sealed pages. ValueError where there is none."""
    features, errors = [], []
    for index in range(len(trace.k)):
        head = SealedHead(trace, index)
        for row, position in enumerate(trace.positions):
            if position + 1 < 3 * PAGE:
                continue
            step = Step(head, row, int(position) + 1)
            features.append(step.features())
            errors.append([step.error(theta) for theta in THETAS])
    if not features:
        raise ValueError(f"{trace.path}: no row sees {3 * PAGE} tokens")
    # A larger theta that happens to err less is luck.
    return Samples(trace.path.stem, np.array(features), np.maximum.accumulate(np.array(errors), 1))


def _rows(samples: list[Samples]) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 8] of every (head-step, target) and log2 of the largest theta that meets it."""
    rows, labels = [], []
    for part in samples:
        for target in TARGETS:
            features = part.features.copy()
            features[:, 1] = np.log2(target)
            fits = (part.errors <= target).sum(1)
            rows.append(features)
            labels.append(np.log2(THETAS[np.maximum(fits - 1, 0)]))
    return np.concatenate(rows), np.concatenate(labels)


def fit(samples: list[Samples], quantile: float, ridge: float = 1e-3) -> np.ndarray:
    """Weights [8] of the `quantile` of log2(theta): quantile regression by reweighted squares."""
    rows, labels = _rows(samples)
    spread = rows.std(0)
    spread[spread == 0] = 1
    scaled = rows / spread
    weights = np.zeros(rows.shape[1])
    for _ in range(200):
        residual = labels - scaled @ weights
        pull = np.where(residual > 0, quantile, 1 - quantile) / np.maximum(np.abs(residual), 1e-3)
        normal = (scaled * pull[:, None]).T @ scaled + ridge * pull.sum() * np.eye(len(weights))
        weights = np.linalg.solve(normal, (scaled * pull[:, None]).T @ labels)
    return weights / spread


def evaluate(weights: np.ndarray, samples: Samples, target: float) -> tuple[float, float]:
    """Mean error over target and fraction of head-steps above it, with the model's thetas."""
    features = samples.features.copy()
    features[:, 1] = np.log2(target)
    log_theta = np.clip(features @ weights, np.log2(THETAS[0]), np.log2(THETAS[-1]))
    # Of the grid, the nearest at or above: the error of a theta in between is no larger.
    index = np.minimum(np.ceil((log_theta - np.log2(THETAS[0])) / 0.5 - 1e-9).astype(int), len(THETAS) - 1)
    errors = samples.errors[np.arange(len(index)), index]
    return float(errors.mean() / target), float((errors > target).mean())


def policy_file(weights: np.ndarray, samples: list[Samples], quantile: float) -> dict:
    return {"format": "adaattn-policy", "version": VERSION, "features": FEATURES,
            "weights": [round(float(weight), 6) for weight in weights], "quantile": quantile,
            "fitted_on": {part.name: len(part.features) for part in samples}}


def _report(title: str, weights: np.ndarray, samples: list[Samples]) -> None:
    for part in samples:
        figures = "  ".join("%g: mean %.2f above %.3f" % (target, *evaluate(weights, part, target))
                            for target in TARGETS)
        print(f"{title} {part.name}: {figures}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adaattn.fit_policy",
                                     description="Fits the learned policy's weights on captured traces.")
    parser.add_argument("traces", nargs="+", type=pathlib.Path, metavar="TRACE")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="policy file to write; default: print it")
    parser.add_argument("--quantile", type=float, default=0.08,
                        help="share of the steps whose theta may be too large; default 0.08")
    parser.add_argument("--check", action="store_true",
                        help="also print how a model fitted without a trace does on that trace")
    options = parser.parse_args(arguments)
    if not 0 < options.quantile < 1:
        parser.error(f"--quantile {options.quantile}: must lie between 0 and 1")
    try:
        samples = [sample(load_trace(path)) for path in options.traces]
    except (OSError, ValueError) as error:
        print(f"fit_policy: {error}", file=sys.stderr)
        return 2
    weights = fit(samples, options.quantile)
    _report("fitted on all,", weights, samples)
    if options.check and len(samples) > 1:
        for part in samples:
            rest = [other for other in samples if other is not part]
            _report("fitted without", fit(rest, options.quantile), [part])
    text = json.dumps(policy_file(weights, samples, options.quantile), indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
