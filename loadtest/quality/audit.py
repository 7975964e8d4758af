"""What answers erred by, head-step by head-step, as an audit of the server with an exact tier judges them."""
from __future__ import annotations

import dataclasses
from typing import Callable, Optional, Sequence

import numpy as np
import torch

from quality.model import Prefill, attend_rows


@dataclasses.dataclass
class AuditResult:
    """Relative L2 errors of one arm. A head-step is one kv head in one row of one layer: sqrt(sum of squares of
    the error over sum of squares of the output) over its q heads, as in server/auditor.cc; *_q judge each q head
    on its own."""

    arm: str
    head_steps: int
    error: float
    error_q: float
    target: Optional[float] = None  # of arms that aim at one, as are the next
    above: Optional[float] = None   # share of head-steps whose error exceeds the target
    above_q: Optional[float] = None
    layers: tuple[tuple[float, float], ...] = ()  # (mean error, share above) of each layer


class Audited:
    """As an Attend: the inner one's answers, each compared with exact attention over the same q, k and v, as they
    travel (FP16). Batch entries are judged apart."""

    def __init__(self, inner: Callable[..., torch.Tensor], prefill: Prefill):
        self._inner, self._prefill = inner, prefill
        self._layers: list[list[tuple[np.ndarray, np.ndarray]]] = []  # [layer][entry]: as errors() gives them

    def __call__(self, layer, q, k, v, scale):
        o = self._inner(layer, q, k, v, scale)
        self._layers.append([
            errors(o[i], self._exact(layer, q[i:i + 1], k[i], v[i], scale), k.shape[1]) for i in range(len(q))])
        return o

    def _exact(self, layer, q, k, v, scale):
        k, v = (torch.cat([old[layer][0], new], 1)[None].half().to(q)
                for old, new in ((self._prefill.k, k), (self._prefill.v, v)))
        return attend_rows(q.half().to(q), k, v, scale)[0]

    def of_entry(self, entry: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(kv heads, q heads) of each layer, each [heads, rows]."""
        return [layer[entry] for layer in self._layers]


def errors(o: torch.Tensor, exact: torch.Tensor, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors of o [q_heads, rows, d] by kv head [kv_heads, rows] and by q head [q_heads, rows]; 0 where
    exact is 0."""
    gap, norm = ((o - exact) ** 2).sum(-1), (exact ** 2).sum(-1)
    ratio = lambda a, b: torch.where(b > 0, a / b.clamp_min(1e-30), 0).sqrt().cpu().numpy()
    grouped = lambda x: x.reshape(kv_heads, -1, x.shape[-1]).sum(1)
    return ratio(grouped(gap), grouped(norm)), ratio(gap, norm)


def result_of(arm: str, target: Optional[float], windows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]) -> AuditResult:
    """Of one arm, from Audited.of_entry of each window."""
    by_layer = [[np.concatenate(parts, -1) for parts in zip(*(window[layer] for window in windows))]
                for layer in range(len(windows[0]))]
    kv, q = (np.stack([one[which] for one in by_layer]) for which in (0, 1))  # [layers, heads, rows]
    result = AuditResult(arm, kv.size, float(kv.mean(dtype=float)), float(q.mean(dtype=float)))
    if target:
        result.target, result.above, result.above_q = target, float((kv > target).mean()), float((q > target).mean())
        result.layers = tuple((float(one.mean(dtype=float)), float((one > target).mean())) for one in kv)
    return result
