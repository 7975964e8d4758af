"""Dense caches in PyTorch: INT8 and INT4, which the server does not offer, and FP8, which it does, for speed."""
from __future__ import annotations

import torch

from quality.model import Prefill, attend_rows

CODES = ("int8", "int4", "fp8")


def round_trip(x: torch.Tensor, code: str) -> torch.Tensor:
    """What such a cache gives back.

    int8, int4: one scale a token and head (max / levels, rounded up to FP16), ties to even, as RoundTripInt of
    kernels/reference/dense_quantizers.h with ScaleSharing::kToken. fp8: e4m3, scale 1, saturating.
    """
    if code == "fp8":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
    levels = 2 ** (int(code.removeprefix("int")) - 1) - 1
    exact = x.abs().amax(-1, keepdim=True) / levels
    scale = exact.half()
    scale = torch.where(scale.float() < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / scale).round().clamp(-levels, levels) * scale


def bytes_ratio(code: str, head_dim: int) -> float:
    """Of BF16's bytes, FP16 scales included."""
    if code == "fp8":
        return 0.5
    return (head_dim * int(code.removeprefix("int")) / 8 + 2) / (2 * head_dim)


class DenseCode:
    """As an Attend: new rows over a prefix and their own keys and values, all rounded."""

    def __init__(self, prefill: Prefill, code: str):
        self._prefill, self._code = prefill, code

    def __call__(self, layer, q, k, v, scale):
        k, v = (round_trip(torch.cat([old[layer].expand(len(new), -1, -1, -1), new], 2), self._code)
                for old, new in ((self._prefill.k, k), (self._prefill.v, v)))
        return attend_rows(q, k, v, scale)
