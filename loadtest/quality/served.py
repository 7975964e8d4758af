"""Attention of new rows by an AdaAttn server: every row is one decode step of its sequence.

Teacher forcing knows all keys and values of a layer before its first query is answered. So a long text is cut
into segments that decode side by side: the session of a segment holds what a live decode would hold at its
first row (imported, due pages sealed), and then takes one row a message. No row sees anything else than it
would see live.
"""
from __future__ import annotations

import collections
import dataclasses
import time
from typing import Optional, Sequence

import numpy as np
import torch

import adaattn
from quality.arms import Arm
from quality.ladder import fit_basis
from quality.model import Prefill, Shape

PAGE_TOKENS = 64
FIT_TOKENS = 1024     # of the server: nothing is sealed in shorter sessions
SEAL_SECONDS = 600.0  # longest wait for pages to be sealed


@dataclasses.dataclass(frozen=True)
class Lane:
    """Rows [begin, end) of a batch entry, decoded one after another by a session of their own."""

    entry: int
    begin: int
    end: int


def segments(entry: int, rows: int, count: int) -> list[Lane]:
    """The rows of a batch entry in at most `count` lanes of whole pages."""
    size = -(-rows // (count * PAGE_TOKENS)) * PAGE_TOKENS
    return [Lane(entry, begin, min(rows, begin + size)) for begin in range(0, rows, size)]


@dataclasses.dataclass
class BytesRead:
    """Summed over steps: what the kernels loaded of K and V, what BF16 would have, and bases on top."""

    read: int = 0
    bf16: int = 0
    basis: int = 0

    def add(self, decision: adaattn.Decision) -> None:
        self.read += decision.bytes_read
        self.bf16 += decision.bytes_bf16
        self.basis += decision.basis_bytes

    def merge(self, other: "BytesRead") -> None:
        self.read += other.read
        self.bf16 += other.bf16
        self.basis += other.basis

    @property
    def ratio(self) -> float:
        return self.read / self.bf16 if self.bf16 else float("nan")

    @property
    def basis_ratio(self) -> float:
        return self.basis / self.bf16 if self.bf16 else float("nan")


class Served:
    """Arms of one page format over a prefill; bytes_read[i] belongs to arms[i].

    lanes[i]: the lanes of arms[i]. Lanes that begin above row 0 follow earlier rows of the same batch entry.
    Every layer is a session of one layer, opened for its pass and closed after it. Tensors travel as FP16.
    """

    def __init__(self, client: adaattn.Client, shape: Shape, arms: Sequence[Arm], lanes: Sequence[Sequence[Lane]],
                 prefill: Prefill):
        self.client, self.arms, self.lanes, self.prefill = client, arms, lanes, prefill
        self.shape = shape
        self.bytes_read = [BytesRead() for _ in arms]

    def open_pass(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> "Pass":
        """q [batch, q_heads, rows, d], k, v [batch, kv_heads, rows, d]."""
        one_layer = adaattn.ModelShape(1, self.shape.num_q_heads, self.shape.num_kv_heads, self.shape.head_dim, scale)
        k, v = to_rows(k), to_rows(v)
        bases = [self.client.open_session(one_layer, page_format=arm.page_format, options=arm.options, lease_seconds=3600,
                                          profile=profile_name(arm.profile, layer) if arm.profile else "",
                                          exact_tier=arm.exact_tier) for arm in self.arms]
        prefix_q, prefix_k, prefix_v = (to_rows(x[layer][0]) for x in
                                        (self.prefill.q, self.prefill.k, self.prefill.v))
        progressive = self.arms[0].page_format is adaattn.PageFormat.PROGRESSIVE
        for base, arm in zip(bases, self.arms):
            mean, rotation = self._basis(arm, layer)
            base.import_kv(prefix_k, prefix_v, query_sample=prefix_q if progressive else None, basis_mean=mean,
                           basis=rotation)
        opened: list[tuple[Lane, adaattn.Session, int]] = []  # lane, session, arm
        for begin in sorted({lane.begin for lanes in self.lanes for lane in lanes}):
            starting = [[lane for lane in lanes if lane.begin == begin] for lanes in self.lanes]
            for base, lanes in zip(bases, starting):
                done = base.length(0) - self.prefill.keep
                if lanes and begin > done:
                    base.import_kv(k[lanes[0].entry, done:begin], v[lanes[0].entry, done:begin])
            if progressive:
                wait_until_sealed(self.client, bases)
            for arm, (base, lanes) in enumerate(zip(bases, starting)):
                for i in range(0, len(lanes), 64):
                    some = lanes[i:i + 64]
                    opened += [(lane, fork, arm) for lane, fork in zip(some, base.fork(len(some)))]
        for base in bases:
            base.close()
        return Pass(self, opened, to_rows(q), k, v)

    def _basis(self, arm: Arm, layer: int) -> tuple[Optional[np.ndarray], Optional[np.ndarray]]:
        """Mean [kv_heads, d] and rotation [kv_heads, d, d] that the arm brings along, if any."""
        if not arm.basis:
            return None, None
        q, k = self.prefill.q[layer][0].half().float(), self.prefill.k[layer][0, :, :FIT_TOKENS].half().float()
        mean, rotation = fit_basis(arm.basis, k, q.reshape(len(k), -1, k.shape[2]))
        return mean[:, 0].cpu().numpy(), np.ascontiguousarray(rotation.cpu().numpy())


def profile_name(name: str, layer: int) -> str:
    """Of the profile of a layer, whose sessions hold that layer alone."""
    return f"{name}.{layer}"


def wait_until_sealed(client: adaattn.Client, sessions: Sequence[adaattn.Session]) -> None:
    """Until all pages that are due are sealed in sessions of one layer. Errors: TimeoutError."""
    due = {session.ref.session_id: session.length(0) // PAGE_TOKENS - 1
           for session in sessions if session.length(0) >= FIT_TOKENS}
    deadline = time.monotonic() + SEAL_SECONDS
    while due:
        missing = sum(max(0, due[s.session_id] - s.pages_sealed) for s in client.list_sessions() if s.session_id in due)
        if not missing:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{missing} pages were not sealed within {SEAL_SECONDS} s")
        time.sleep(0.005)


class Pass:
    """The steps of one layer: message t holds row begin + t of every lane that has one."""

    def __init__(self, served: Served, opened: Sequence[tuple[Lane, adaattn.Session, int]], q: np.ndarray,
                 k: np.ndarray, v: np.ndarray, o: Optional[np.ndarray] = None):
        self._served, self._opened = served, opened
        self._q, self._k, self._v = q, k, v
        self.o = np.zeros(q.shape, np.float32) if o is None else o  # [batch, rows, q_heads, d]
        self.steps = max(lane.end - lane.begin for lane, _, _ in opened)

    def halves(self) -> list["Pass"]:
        """Two passes of every other lane, which fill one `o`: while one is answered the other is made ready."""
        parts = [self._opened[start::2] for start in (0, 1)]
        return [Pass(self._served, part, self._q, self._k, self._v, self.o) for part in parts if part]

    def message(self, t: int) -> list[adaattn.Step]:
        steps = []
        for lane, session, _ in self._running(t):
            row = slice(lane.begin + t, lane.begin + t + 1)
            steps.append(adaattn.Step(session, self._q[lane.entry, row], self._k[lane.entry, row],
                                      self._v[lane.entry, row]))
        return steps

    def answered(self, t: int, result: adaattn.AttendResult) -> None:
        for (lane, _, arm), sequence in zip(self._running(t), result.sequences, strict=True):
            if sequence.error:
                raise sequence.error
            self.o[lane.entry, lane.begin + t] = sequence.o[0]
            if sequence.decision:
                self._served.bytes_read[arm].add(sequence.decision)

    def close(self) -> None:
        for _, session, _ in self._opened:
            session.close()

    def _running(self, t: int):
        return [one for one in self._opened if one[0].begin + t < one[0].end]


def run_passes(client: adaattn.Client, passes: Sequence[Pass]) -> None:
    """Runs passes of different sessions side by side over one stream, and closes their sessions."""
    passes = [half for one in passes for half in one.halves()]
    if not passes:
        return
    waiting = collections.deque()
    with client.attend_stream(max_unanswered=len(passes)) as stream:

        def send(one: Pass, t: int) -> None:
            stream.send(0, one.message(t), output_dtype=adaattn.DType.FP32)
            waiting.append((one, t))

        for one in passes:
            send(one, 0)
        while waiting:
            one, t = waiting.popleft()
            one.answered(t, stream.receive())
            if t + 1 < one.steps:
                send(one, t + 1)
    for one in passes:
        one.close()


def to_rows(x: torch.Tensor) -> np.ndarray:
    """[..., heads, rows, d] -> [..., rows, heads, d] in FP16."""
    return np.ascontiguousarray(x.transpose(-3, -2).to(torch.float16).cpu().numpy())
