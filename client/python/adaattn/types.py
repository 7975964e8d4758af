"""What goes into the client and comes out of it, as plain data.

Fields mean what the field of the same name means in attention.proto; zero stands for the same
default there.
"""
from __future__ import annotations

import dataclasses
import enum
from typing import Optional, Sequence

import grpc
import numpy as np

from adaattn.v1 import attention_pb2 as pb


class DType(enum.IntEnum):
    DEFAULT = 0
    FP32 = 1
    FP16 = 2
    BF16 = 3
    FP8_E4M3 = 4


class PageFormat(enum.IntEnum):
    DEFAULT = 0
    FP32 = 1
    FP16 = 2
    BF16 = 3
    FP8_E4M3 = 4
    PROGRESSIVE = 5


class Mode(enum.IntEnum):
    DEFAULT = 0
    EXACT = 1
    FULL_DEPTH = 2
    STATISTICAL = 3
    DETERMINISTIC = 4
    STATIC = 5


class Policy(enum.IntEnum):
    DEFAULT = 0
    THRESHOLD = 1
    BUDGET = 2
    ENTROPY = 3
    LEARNED = 4
    FEEDBACK = 5


class Detail(enum.IntEnum):
    DEFAULT = 0
    NONE = 1
    SUMMARY = 2
    PER_HEAD = 3


class Fallback(enum.IntEnum):
    NONE = 0
    NO_BASIS = 1
    BUDGET = 2
    PRESSURE = 3
    STORED_BITS = 4
    EXACT_PAGES = 5
    BOUND_UNMET = 6


class Error(Exception):
    """A call, or one sequence of a call, that the server refused or that was lost.

    code: a grpc.StatusCode. retry_after: seconds that the server asked to wait; 0 = no hint.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float = 0.0):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.retry_after = retry_after


def status_code(number: int) -> grpc.StatusCode:
    """The grpc.StatusCode of a google.rpc.Code number; UNKNOWN for others."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)


_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclasses.dataclass(frozen=True)
class ModelShape:
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float = 0.0  # 0 = 1 / sqrt(head_dim)


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    window: int = 0
    softcap: float = 0.0


@dataclasses.dataclass(frozen=True)
class AttendOptions:
    mode: Mode = Mode.DEFAULT
    policy: Policy = Policy.DEFAULT
    theta: float = 0.0
    target_relative_error: float = 0.0
    max_relative_error: float = 0.0
    floor_key_bits: int = 0
    floor_value_bits: int = 0
    static_key_bits: int = 0
    static_rank: int = 0
    static_value_bits: int = 0
    coarse_rank: Optional[int] = None  # 0 = one-stage scan; None = the server's default
    coarse_z: Optional[float] = None
    detail: Detail = Detail.DEFAULT
    window: Optional[int] = None
    softcap: Optional[float] = None

    def to_proto(self) -> pb.AttendOptions:
        set_fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return pb.AttendOptions(**{name: value for name, value in set_fields.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class SessionGrant:
    """What OpenSession granted. max_tokens per layer; lease in seconds."""

    max_tokens: int
    lease_seconds: float
    page_format: PageFormat
    element_type: DType  # of pages that are not sealed
    max_message_bytes: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a server holds of a model, and what audits say of the errors that it predicts.

    error_factors, audits, audited_error_factors [num_layers, num_kv_heads]: what predictions are multiplied by, the
    audited steps of the profile's sessions under a budget, and what to upload as error_factors next.
    """

    model: ModelShape
    bytes: int
    has_basis: bool
    has_policy: bool
    error_factors: np.ndarray
    audits: np.ndarray
    audited_error_factors: np.ndarray

    @classmethod
    def from_proto(cls, message: pb.GetProfileResponse) -> "Profile":
        model = ModelShape(**{field.name: getattr(message.model, field.name)
                              for field in dataclasses.fields(ModelShape)})
        by_layer = lambda values, dtype: np.array(values, dtype).reshape(model.num_layers, model.num_kv_heads)
        return cls(model, message.bytes, message.has_basis, message.has_policy,
                   by_layer(message.error_factors, np.float32), by_layer(message.audits, np.int64),
                   by_layer(message.audited_error_factors, np.float32))


@dataclasses.dataclass(frozen=True)
class HeadDecision:
    kv_head: int
    key_pages: dict[tuple[int, int], int]  # (bits, rank) -> pages
    value_pages: dict[int, int]            # bits -> pages; 0: the page's mean stood in
    dense_tokens: int
    theta: float
    entropy: float          # nats, of the page shares
    predicted_error: float  # relative; a prediction, not a bound
    key_bytes: int
    value_bytes: int


@dataclasses.dataclass(frozen=True)
class Decision:
    mean_key_bits: float
    mean_value_bits: float
    mean_rank: float
    pages_sealed: int
    pages_skipped: int
    theta: float
    entropy: float
    predicted_error: float  # relative, rms over heads; a prediction, not a bound
    error_bound: float      # DETERMINISTIC only, as are the next three
    lse_below: float        # the true lse of every row lies in [lse - below, lse + above]
    lse_above: float
    exact_pages: int
    bytes_read: int         # of K and V with all metadata
    bytes_bf16: int         # that a BF16 cache would have read for the same rows
    basis_bytes: int        # on top
    fallback: Fallback
    effective_target: float
    heads: tuple[HeadDecision, ...]  # Detail.PER_HEAD

    @classmethod
    def from_proto(cls, message: pb.Decision) -> "Decision":
        plain = {name: getattr(message, name) for name in _PLAIN_DECISION}
        return cls(fallback=Fallback(message.fallback), heads=tuple(map(_head, message.heads)), **plain)


_PLAIN_DECISION = tuple(f.name for f in dataclasses.fields(Decision) if f.name not in ("fallback", "heads"))


def _head(message: pb.HeadDecision) -> HeadDecision:
    return HeadDecision(
        kv_head=message.kv_head,
        key_pages={(count.bits, count.rank): count.pages for count in message.key_pages},
        value_pages={count.bits: count.pages for count in message.value_pages},
        dense_tokens=message.dense_tokens, theta=message.theta, entropy=message.entropy,
        predicted_error=message.predicted_error, key_bytes=message.key_bytes,
        value_bytes=message.value_bytes)


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Seconds, of the batch that the message was part of."""

    queue: float
    copy_in: float
    append: float
    scan: float
    select: float
    attend: float
    merge: float
    copy_out: float

    @classmethod
    def from_proto(cls, message: pb.StageTimes) -> "StageTimes":
        return cls(message.queue, message.copy_in, message.append, message.scan, message.select, message.attend,
                   message.merge, message.copy_out)


@dataclasses.dataclass(frozen=True)
class SequenceResult:
    """One sequence of a message.

    o [q_len, num_q_heads, head_dim] and lse [q_len, num_q_heads] FP32 (natural log; -inf over an
    empty range) are views into the message's tensors. With an error, o is 0 and lse -inf.
    """

    o: np.ndarray
    lse: np.ndarray
    error: Optional[Error]
    kv_len: int      # tokens in the layer after the step, start_position not included
    replayed: bool   # the append had been applied by an earlier attempt
    decision: Optional[Decision]


@dataclasses.dataclass(frozen=True)
class AttendResult:
    """o [sum q_len, num_q_heads, head_dim], lse [sum q_len, num_q_heads], and each sequence's part."""

    o: np.ndarray
    lse: np.ndarray
    sequences: Sequence[SequenceResult]
    stage_times: StageTimes

    @property
    def decision(self) -> Optional[Decision]:
        """The decision of the only sequence. Errors: ValueError where there are several."""
        if len(self.sequences) != 1:
            raise ValueError(f"the message held {len(self.sequences)} sequences; see .sequences")
        return self.sequences[0].decision
