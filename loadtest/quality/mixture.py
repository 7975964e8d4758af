"""Several arms in one pass of the model, a batch entry each."""
from __future__ import annotations

import sys
import time
from typing import Sequence

import torch

import adaattn
from quality.arms import Arm
from quality.dense import DenseCode, bytes_ratio
from quality.model import Prefill, Shape
from quality.served import BytesRead, Lane, Served, run_passes


class Mixture:
    """As an Attend: batch entries lanes[i][*].entry are answered by arms[i] over the prefill.

    Served arms of one page format share messages; formats run side by side.
    """

    def __init__(self, client: adaattn.Client, shape: Shape, arms: Sequence[Arm], lanes: Sequence[Sequence[Lane]],
                 prefill: Prefill, quiet: bool = True):
        self._client, self._shape, self._arms, self._lanes = client, shape, arms, lanes
        self._quiet, self._begin = quiet, time.monotonic()
        self._simulated = [(i, DenseCode(prefill, arm.simulated)) for i, arm in enumerate(arms) if arm.simulated]
        self._served: list[tuple[list[int], Served]] = []
        for page_format in sorted({arm.page_format for arm in arms if not arm.simulated}):
            members = [i for i, arm in enumerate(arms) if not arm.simulated and arm.page_format is page_format]
            self._served.append((members, Served(client, shape, [arms[i] for i in members],
                                                 [lanes[i] for i in members], prefill)))

    def __call__(self, layer, q, k, v, scale):
        out = torch.zeros_like(q)
        for i, attend in self._simulated:
            entries = sorted({lane.entry for lane in self._lanes[i]})
            out[entries] = attend(layer, q[entries], k[entries], v[entries], scale)
        passes = [served.open_pass(layer, q, k, v, scale) for _, served in self._served]
        run_passes(self._client, passes)
        for (members, _), one in zip(self._served, passes):
            entries = sorted({lane.entry for i in members for lane in self._lanes[i]})
            out[entries] = torch.from_numpy(one.o[entries]).transpose(1, 2).to(out)
        if not self._quiet:
            end = "\n" if layer + 1 == self._shape.num_layers else ""
            print(f"\rlayer {layer + 1} of {self._shape.num_layers}, {time.monotonic() - self._begin:.0f} s",
                  end=end, file=sys.stderr, flush=True)
        return out

    def ratios(self, i: int) -> tuple[float, float]:
        """Of arm i: K and V bytes over BF16's, metadata included, and bases on top."""
        if self._arms[i].simulated:
            return bytes_ratio(self._arms[i].simulated, self._shape.head_dim), 0.0
        read = self.bytes_read(i)
        return read.ratio, read.basis_ratio

    def bytes_read(self, i: int) -> BytesRead:
        """Of a served arm."""
        return next(served.bytes_read[members.index(i)] for members, served in self._served if i in members)
