"""Attention in float64: the judge of the tests."""
import numpy as np


def attention(q, k, v, first_position):
    """Rows of q at first_position on, causal. q [rows, q_heads, d], k, v [tokens, kv_heads, d]; o, lse."""
    rows, q_heads, dim = q.shape
    group = q_heads // k.shape[1]
    q, k, v = q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("rhd,thd->rht", q, k) / np.sqrt(dim)
    positions = first_position + np.arange(rows)
    scores[positions[:, None, None] < np.arange(len(k))[None, None, :].repeat(q_heads, 1)] = -np.inf
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("rht,thd->rhd", weights / total, v), (top + np.log(total))[..., 0]


def relative_error(o, expected):
    """Mean over rows and heads of |o - expected| / |expected|."""
    return float((np.linalg.norm(o - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).mean())
