"""Error factors of a model: a text decoded under a budget, whose answers the server audits (docs/policies.md)."""
from __future__ import annotations

import json
import pathlib
from typing import Sequence

import numpy as np
import torch

import adaattn
from adaattn.v1 import attention_pb2 as pb
from quality.arms import AUDITED_PROFILE, Arm
from quality.mixture import Mixture
from quality.model import Model, Prefill, Shape
from quality.served import profile_name, segments

AUDIT_SHARE = 0.25  # of the server's steps while it is asked
FORMAT, VERSION = "adaattn-error-factors", 1


def run(client: adaattn.Client, model: Model, windows: Sequence[torch.Tensor], prefill_tokens: int,
        targets: Sequence[float], parallel: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every window [tokens] of a text with a budget of each of `targets` in sessions with an exact tier, on a
    server that audits. Returns the factors that it then gives, and how many steps it audited for them
    [num_layers, num_kv_heads]."""
    upload(client, model.shape, None)
    arms = [arm_of(target) for target in targets]
    for ids in windows:
        prefill = Prefill(prefill_tokens)
        model.hidden(ids[None], 0, prefill)
        new = ids[prefill_tokens:][None].expand(len(arms), -1)
        lanes = [segments(i, new.shape[1], parallel) for i in range(len(arms))]
        mixture = Mixture(client, model.shape, arms, lanes, prefill, quiet=False)
        model.hidden(new, prefill_tokens, mixture)
    layers = [client.get_profile(profile_name(AUDITED_PROFILE, i)) for i in range(model.shape.num_layers)]
    return tuple(np.concatenate([getattr(layer, name) for layer in layers])
                 for name in ("audited_error_factors", "audits"))


def arm_of(target: float) -> Arm:
    """A budget whose answers are audited against the originals."""
    return Arm("calibrate", adaattn.PageFormat.PROGRESSIVE,
               adaattn.AttendOptions(policy=adaattn.Policy.BUDGET, target_relative_error=target),
               profile=AUDITED_PROFILE, exact_tier=pb.EXACT_TIER_BF16_PAGES)


def upload(client: adaattn.Client, shape: Shape, factors: np.ndarray | None) -> None:
    """The profiles of all layers, with factors [num_layers, num_kv_heads] or none. Errors: ValueError."""
    if factors is not None and factors.shape != (shape.num_layers, shape.num_kv_heads):
        raise ValueError(f"error factors {factors.shape}: must be of {shape.num_layers} layers and "
                         f"{shape.num_kv_heads} kv heads")
    one_layer = adaattn.ModelShape(1, shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
    for layer in range(shape.num_layers):
        client.upload_profile(profile_name(AUDITED_PROFILE, layer), one_layer,
                              error_factors=() if factors is None else factors[layer])


def save(path: pathlib.Path, model: str, targets: Sequence[float], factors: np.ndarray, audits: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "format": FORMAT, "version": VERSION, "model": model, "targets": list(targets),
        "audits": audits.tolist(),
        "error_factors": [[round(float(x), 4) for x in layer] for layer in factors]}) + "\n")


def load(path: pathlib.Path) -> np.ndarray:
    """Factors [num_layers, num_kv_heads] of a file of save(). Errors: ValueError, OSError."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: must hold format {FORMAT} of version {VERSION}")
    return np.array(content["error_factors"], np.float32)
