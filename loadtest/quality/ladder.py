"""The progressive page and its policies in PyTorch, with what the server does not offer: other page sizes,
bases and planes. For the ablation only; where both can answer, `ablation` shows that they agree.

Every row is one decode step of one sequence, as in docs/design.md: the newest pages are FP16, older ones nested
8-bit codes; a scan estimates each page's share of the softmax, the share decides how deep the page is read.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Optional

import torch

from quality.model import Prefill, attend_rows

NONE = -1e30  # of log masses
EXACT = 16    # bits: keys that are not rounded


@dataclasses.dataclass(frozen=True)
class Ladder:
    """A variant. `static` (key bits, rank share, value bits) replaces the ladder."""

    theta: float = 0.004
    page: int = 64
    basis: str = "pca-query"       # none, hadamard, pca, pca-query (ordered by query-weighted energy), profile
    coarse_rank: float = 0.0       # share of the channels read of every page first; 0 = a one-stage scan
    coarse_z: float = 2.0
    scan_bits: int = 4             # of the scan, of both stages
    key_bits: tuple[int, ...] = (4, 6, 8)
    value_bits: tuple[int, ...] = (2, 4, 6, 8)  # depths that the ladder may choose; 0 (the mean) beside them
    skips: bool = True             # False: every page's values are read, at least at the first depth
    corrects: bool = False         # skipped pages' means are moved by what attended pages' values were off theirs
    static: Optional[tuple[int, float, int]] = None
    shares: str = "scan"           # what depths are chosen by: exact, uncorrected (for rounding), of the row before
    entropy: str = ""              # the policy of that name, theta exp(-H); H of: page shares, all tokens, 4 pages drawn


def hadamard(d: int) -> torch.Tensor:
    """Orthonormal, over d = 2^n, or 64 and the rest by blocks. [d, d]"""
    if d & (d - 1):
        return torch.block_diag(hadamard(64), hadamard(d - 64))
    matrix = torch.ones(1, 1)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(d)


def fit_basis(kind: str, k: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [heads, 1, d] and rotation [heads, d, d] for keys k [heads, tokens, d]; q [heads, rows, d]."""
    heads, _, d = k.shape
    mean = k.mean(1, keepdim=True)
    if kind in ("none", "hadamard"):
        one = torch.eye(d) if kind == "none" else hadamard(d)
        rotation = one.to(k).expand(heads, d, d)
    else:
        centred = (k - mean).double()
        rotation = torch.linalg.eigh(centred.transpose(1, 2) @ centred)[1].flip(-1).to(k)
    weight = (((k - mean) @ rotation) ** 2).mean(1)
    if kind != "pca":
        weight = weight * ((q @ rotation) ** 2).mean(1)
    order = weight.argsort(dim=-1, descending=True, stable=True)
    return mean, torch.gather(rotation, 2, order[:, None].expand_as(rotation))


def nested(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0..255 and ranges: the largest magnitude along dim, up to the next quarter octave."""
    largest = x.abs().amax(dim, True).clamp_min(2.0 ** -30)
    # Tolerates the rounding of log2 where the magnitude is a quarter octave itself.
    r = torch.exp2((4 * torch.log2(largest) - 1e-5).ceil() / 4)
    return ((x / r + 1) * 128).floor().clamp(0, 255), r


def decode(code: torch.Tensor, r: torch.Tensor, bits: int) -> torch.Tensor:
    return (((code / 2 ** (8 - bits)).floor() + 0.5) / 2 ** (bits - 1) - 1) * r


class LadderOverPrefill:
    """As an Attend: new rows over a prefix and themselves by a variant. One batch entry.

    profile: the prefix of another text, for the basis "profile". Sums: bytes read and of BF16, and the
    relative L2 error of outputs against exact attention over the same q, k, v.
    """

    def __init__(self, variant: Ladder, prefill: Prefill, fit_tokens: int, profile: Optional[Prefill] = None):
        self.variant, self.prefill, self.fit_tokens, self.profile = variant, prefill, fit_tokens, profile
        self.read = self.bf16 = self.error = 0.0
        self.rows = 0

    def __call__(self, layer, q, k, v, scale):
        assert len(q) == 1
        k, v = (torch.cat([old[layer], new], 2)[0].half() for old, new in ((self.prefill.k, k), (self.prefill.v, v)))
        exact = attend_rows(q, k[None].to(q), v[None].to(q), scale)[0]
        q = q[0].half().float()
        cache = _Cache(self, layer, k.float(), v.float(), scale)
        o = torch.empty_like(q)
        first, tokens, page = k.shape[1] - q.shape[1], k.shape[1], self.variant.page
        begin = 0
        while begin < q.shape[1]:  # rows that see equally many sealed pages
            seen = first + begin + 1
            end = min(q.shape[1], begin + page - seen % page)
            o[:, begin:end] = cache.attend(q[:, begin:end], first + begin, max(0, seen // page - 1))
            begin = end
        assert first + begin == tokens
        self.error += float(((o - exact).norm(dim=-1) / exact.norm(dim=-1)).sum())
        self.rows += o.shape[0] * o.shape[1]
        return o[None]

    @property
    def ratio(self) -> float:
        return float(self.read / self.bf16)

    @property
    def mean_error(self) -> float:
        return self.error / self.rows


class _Cache:
    """One layer's keys and values [heads, tokens, d] in every form that a variant reads."""

    def __init__(self, owner: LadderOverPrefill, layer: int, k: torch.Tensor, v: torch.Tensor, scale: float):
        self.owner, self.scale, self.k, self.v = owner, scale, k, v
        variant, page = owner.variant, owner.variant.page
        heads, tokens, self.d = k.shape
        source = owner.profile if variant.basis == "profile" else owner.prefill
        sample = source.q[layer][0].reshape(heads, -1, self.d).half().float()
        keys = source.k[layer][0][:, :owner.fit_tokens].half().float()
        kind = "pca-query" if variant.basis == "profile" else variant.basis
        self.mean, self.rotation = fit_basis(kind, keys, sample)
        pages = tokens // page
        cut = lambda x: x[:, :pages * page].reshape(heads, pages, page, -1)
        key_code, key_range = nested(cut((k - self.mean) @ self.rotation), 2)
        self.groups = self.d // 64 if self.d % 64 == 0 else 1
        turn = hadamard(self.d).to(k)
        rotated = cut(v @ turn)
        value_code, value_range = nested(rotated.reshape(heads, pages, page, self.groups, -1), -1)
        flat = lambda x: x.reshape(heads, pages * page, self.d)
        self.key = {bits: flat(decode(key_code, key_range, bits)) for bits in (2, 4, 6, 8)}
        self.key[EXACT] = flat(cut((k - self.mean) @ self.rotation))
        self.value = {bits: flat(decode(value_code, value_range, bits)) @ turn.T for bits in (2, 4, 6, 8)}
        mean = rotated.mean(2)
        step = mean.abs().amax(-1, True).clamp_min(1e-9) / 127
        self.value_mean = ((mean / step).round() * step) @ turn.T
        self.range2 = key_range[:, :, 0] ** 2  # [heads, pages, d]

    def attend(self, q: torch.Tensor, position: int, sealed: int) -> torch.Tensor:
        """Rows q [q_heads, rows, d] at position on, over `sealed` sealed pages and the tokens after them."""
        heads, rows = self.k.shape[0], q.shape[1]
        q = q.reshape(heads, -1, rows, self.d)
        n, page, end = sealed * self.owner.variant.page, self.owner.variant.page, position + rows
        dense = self.scale * q @ self.k[:, None, n:end].transpose(-1, -2)
        hidden = torch.arange(n, end, device=q.device) > position + torch.arange(rows, device=q.device)[:, None]
        dense = dense.masked_fill(hidden, NONE)
        lengths = position + 1 + torch.arange(rows, dtype=torch.float64)
        self.owner.bf16 += float(lengths.sum()) * heads * 4 * self.d
        self.owner.read += float((lengths - n).sum()) * heads * 4 * self.d
        if sealed == 0:
            return (dense.softmax(-1) @ self.v[:, None, n:end]).reshape(-1, rows, self.d)
        turned = q @ self.rotation[:, None]
        offset = self.scale * (q @ self.mean[:, None].transpose(-1, -2))
        scan = _Scan(self, turned, offset, sealed)
        key, value, mass, read = scan.decide(dense)
        self.owner.read += float(read)
        spread = lambda x: x.repeat_interleave(page, -1)
        score = torch.zeros_like(scan.scores(8))
        for bits, rank in {(int(b), float(r)) for b, r in key.reshape(-1, 2).unique(dim=0)}:
            here = spread((key[..., 0] == bits) & (key[..., 1] == rank))[:, None]
            score = torch.where(here, scan.scores(bits, rank), score)
        kept = value > 0
        score = score.masked_fill(~spread(kept)[:, None], NONE)
        skipped = mass.masked_fill(kept[:, None], NONE)
        weights = torch.cat([score, skipped, dense], -1).softmax(-1)
        w_kept, w_mean, w_dense = weights.split([n, sealed, end - n], -1)
        out = w_mean @ self.value_mean[:, None, :sealed] + w_dense @ self.v[:, None, n:end]
        attended = torch.zeros_like(out)
        for bits in (2, 4, 6, 8):
            here = spread(value == bits)
            if bool(here.any()):
                attended = attended + (w_kept * here[:, None]) @ self.value[bits][:, None, :n]
        if self.owner.variant.corrects:  # by all of them but the sink, which is read at 8 bits
            shares = w_kept.reshape(*w_kept.shape[:-1], sealed, page).sum(-1)[..., 1:]
            sink = w_kept[..., :page] @ self.value[8][:, None, :page]
            off_means = attended - sink - shares @ self.value_mean[:, None, 1:sealed]
            of_each = w_mean.sum(-1, keepdim=True) / shares.sum(-1, keepdim=True).clamp_min(1e-9)
            out = out + of_each.clamp_max(1) * off_means
        out = out + attended
        return out.reshape(-1, rows, self.d)


class _Scan:
    """Scores of rows over the sealed pages, and the decision. q frames [heads, group, rows, d]."""

    def __init__(self, cache: _Cache, turned: torch.Tensor, offset: torch.Tensor, sealed: int):
        self.cache, self.turned, self.offset, self.sealed = cache, turned, offset, sealed
        self.variant, self.n = cache.owner.variant, sealed * cache.owner.variant.page
        self._scores: dict[tuple[int, float], torch.Tensor] = {}

    def scores(self, bits: int, rank: float = 1.0) -> torch.Tensor:
        """[heads, group, rows, tokens]"""
        if (bits, rank) not in self._scores:
            lead = round(rank * self.cache.d)
            keys = self.cache.key[bits][:, None, :self.n, :lead]
            self._scores[bits, rank] = (self.cache.scale * self.turned[..., :lead] @ keys.transpose(-1, -2)
                                        + self.offset)
        return self._scores[bits, rank]

    def variance(self, bits: int, rank: float = 1.0) -> torch.Tensor:
        """Of the scores' rounding errors, by page. [heads, group, rows, pages]"""
        lead = round(rank * self.cache.d)
        unit = torch.full((self.cache.d,), 1 / 6, device=self.turned.device)
        unit[:lead] = 4.0 ** (1 - bits) / 12
        weighted = self.cache.range2[:, None, :self.sealed] * unit
        return self.cache.scale ** 2 * (self.turned ** 2) @ weighted.transpose(-1, -2)

    def page_lse(self, bits: int, rank: float = 1.0) -> torch.Tensor:
        scores = self.scores(bits, rank)
        return scores.reshape(*scores.shape[:-1], self.sealed, self.variant.page).logsumexp(-1)

    def decide(self, dense: torch.Tensor):
        """(key [heads, rows, pages, (bits, rank)], value bits [heads, rows, pages], log mass of each page
        [heads, group, rows, pages], bytes read)."""
        variant, bits = self.variant, self.variant.scan_bits
        heads, _, rows, _ = self.turned.shape
        shape = (heads, rows, self.sealed)
        if variant.static:
            key_bits, rank, value_bits = variant.static
            key = torch.tensor([float(key_bits), rank], device=dense.device).expand(*shape, 2)
            value = torch.full(shape, value_bits, device=dense.device)
            return key, value, self.page_lse(key_bits, rank), self._bytes(key, value)
        full = self.page_lse(bits) + 0.5 * self.variance(bits).clamp_max(4)
        opened = torch.ones(shape, dtype=torch.bool, device=dense.device)
        mass = full
        if variant.coarse_rank:
            coarse, noise = self.page_lse(bits, variant.coarse_rank), self.variance(bits, variant.coarse_rank)
            corrected = coarse + 0.5 * noise.clamp_max(4)
            total = torch.cat([corrected, dense], -1).logsumexp(-1, True)
            opened = (coarse + variant.coarse_z * noise.sqrt() - total > math.log(variant.theta)).any(1)
            opened[..., 0] = True
            mass = torch.where(opened[:, None], full, corrected)
        total = torch.cat([mass, dense], -1).logsumexp(-1, True)
        share = self._shares(mass, dense)
        theta = self._theta((mass - total).exp(), dense)
        value = torch.zeros(shape, dtype=torch.long, device=dense.device)
        for depth, factor in ((2, 1), (4, 4), (6, 16), (8, 64)):
            value[share > theta * factor] = depth
        value[~opened] = 0
        key_depth = torch.where(value > 0, (value + 2).clamp(4, 8), torch.full_like(value, bits))
        key_depth, value = at_least(key_depth, variant.key_bits), at_least(value, variant.value_bits)
        if not variant.skips:
            value = value.clamp_min(variant.value_bits[0])
        key_depth[..., 0] = value[..., 0] = 8  # the first page holds the attention sink
        rank = torch.where(opened, 1.0, variant.coarse_rank or 1.0)
        key = torch.stack([key_depth.float(), rank], -1)
        return key, value, mass, self._bytes(key, value)

    def _shares(self, mass: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """[heads, rows, pages], the largest of the group's, from the estimator of the variant."""
        if self.variant.shares == "exact":
            mass = self.page_lse(EXACT)
        elif self.variant.shares == "uncorrected":
            mass = self.page_lse(self.variant.scan_bits)
        share = (mass - torch.cat([mass, dense], -1).logsumexp(-1, True)).exp().amax(1)
        if self.variant.shares == "of the row before":  # the first of these rows takes its own
            share = torch.cat([share[:, :1], share[:, :-1]], 1)
        return share

    def _theta(self, shares: torch.Tensor, dense: torch.Tensor):
        """The variant's, or by entropies [heads, rows, 1] as kernels/policy/theta.h. shares [..., pages] of the scan."""
        variant = self.variant
        if not variant.entropy:
            return variant.theta
        assert not variant.coarse_rank
        if variant.entropy == "all tokens":
            entropy = entropy_of(torch.cat([self.scores(EXACT), dense], -1))
        else:
            items = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1).clamp_min(1e-30)
            entropy = -(items * items.log()).sum(-1)
            if variant.entropy == "4 pages drawn":
                scores = self.scores(variant.scan_bits)
                inside = entropy_of(scores.reshape(*scores.shape[:-1], self.sealed, variant.page))
                inside = torch.cat([inside, entropy_of(dense)[..., None]], -1).flatten(0, -2)
                drawn = torch.multinomial(items.flatten(0, -2), 4, True, generator=torch.Generator().manual_seed(self.n))
                entropy = entropy + inside.gather(1, drawn).mean(1).reshape(entropy.shape)
        return (variant.theta * (-entropy.mean(1)).exp()).clamp(2.0 ** -16, 0.25)[..., None]

    def _bytes(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of K and V, as kernels/format/page_layout.h lays pages out: ranges, summary, planes."""
        d, page = self.cache.d, self.variant.page
        k = d + page * d * (key[..., 0] * key[..., 1]).double() / 8
        v = 16 + d + (value > 0).double() * page * self.cache.groups + page * d * value.double() / 8
        return (k + v).sum()


def entropy_of(scores: torch.Tensor) -> torch.Tensor:
    """Of softmax(scores) along the last axis, nats."""
    p = scores.softmax(-1)
    return scores.logsumexp(-1) - (p * scores).sum(-1)


def at_least(bits: torch.Tensor, depths: tuple[int, ...]) -> torch.Tensor:
    """Bits above 0 raised to the next depth there is."""
    raised = torch.full_like(bits, depths[-1])
    for depth in reversed(depths):
        raised[bits <= depth] = depth
    return torch.where(bits > 0, raised, bits)
