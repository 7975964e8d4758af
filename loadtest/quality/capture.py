"""Traces of a model's own attention: what `python -m adaattn.fit_policy`, adaattn_control_bench and `adaattn-cli
replay` read."""
from __future__ import annotations

import pathlib
from typing import Iterable, Optional

import torch
from safetensors.torch import save_file

from quality.model import Model, attend_rows

LAYOUT = ("q [q_heads, rows, d] f16; k, v [kv_heads, tokens, d] f16 after the position encoding; positions [rows]: "
          "row r attends keys 0..positions[r]; expected_o f32, expected_lse f32 natural log, both from float64")


class Captured:
    """As an Attend over a whole text: exact, writing one file of each of `layers` (all if absent)."""

    def __init__(self, model: str, positions: torch.Tensor, layers: Optional[Iterable[int]], folder: pathlib.Path):
        self._model, self._positions, self._folder = model, positions, folder
        self._layers = None if layers is None else set(layers)
        self.paths: list[pathlib.Path] = []

    def __call__(self, layer, q, k, v, scale):
        if self._layers is None or layer in self._layers:
            self._save(layer, *(x[0].half() for x in (q, k, v)), scale)
        return attend_rows(q, k, v, scale)

    def _save(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        q, positions = q[:, self._positions], self._positions
        group = len(q) // len(k)
        scores = scale * q.double() @ k.double().repeat_interleave(group, 0).transpose(1, 2)
        hidden = torch.arange(k.shape[1], device=q.device) > positions.to(q.device)[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
        tensors = {"q": q, "k": k, "v": v, "positions": positions.int(),
                   "expected_o": (scores.softmax(-1) @ v.double().repeat_interleave(group, 0)).float(),
                   "expected_lse": scores.logsumexp(-1).float()}
        path = self._folder / f"{self._model}-layer{layer}-{k.shape[1]}.safetensors"
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path, metadata={
            "model": self._model, "layer": str(layer), "tokens": str(k.shape[1]), "softmax_scale": repr(scale),
            "layout": LAYOUT})
        self.paths.append(path)


def run(model: Model, ids: torch.Tensor, rows: int, layers: Optional[Iterable[int]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Captures `rows` rows of the second half of ids [tokens], evenly, the last among them."""
    folder.mkdir(parents=True, exist_ok=True)
    positions = torch.linspace(len(ids) // 2, len(ids) - 1, rows).long()
    captured = Captured(model.name, positions, layers, folder)
    model.hidden(ids[None], 0, captured)
    return captured.paths
