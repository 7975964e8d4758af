"""Calls to an AdaAttn server.

Every function raises `Error` when the server refuses or is lost; calls are asked again by the rule
of docs/api.md, appends at most once.
"""
from __future__ import annotations

import dataclasses
import threading
import uuid
from typing import Iterable, Iterator, Optional, Sequence

import grpc
import numpy as np

from adaattn import retry as retries
from adaattn.importer import run_import
from adaattn.stream import AttendStream
from adaattn.tensors import from_tensor, to_tensor
from adaattn.types import (
    AttendOptions, AttendResult, Decision, DType, Error, LayerOptions, ModelShape, PageFormat,
    Profile, SequenceResult, SessionGrant, StageTimes, status_code)
from adaattn.v1 import attention_pb2 as pb
from adaattn.v1 import attention_pb2_grpc

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclasses.dataclass(frozen=True)
class Step:
    """One session's part of a message: rows to append, rows to attend with.

    q [q_len, num_q_heads, head_dim]; k, v [append_len, num_kv_heads, head_dim]. Absent = no rows.
    q_position: position of the first q row when it is not position + append_len - q_len.
    """

    session: "Session"
    q: Optional[np.ndarray] = None
    k: Optional[np.ndarray] = None
    v: Optional[np.ndarray] = None
    q_position: Optional[int] = None


class Client:
    """A connection. address: host:port or unix:/path. timeout: seconds of one attempt.

    route_key: 1 to 64 characters of [A-Za-z0-9._-] that keep proxies on one server; drawn if absent.
    Threads: any; AttendStream and Session say their own.
    """

    def __init__(self, address: str, *, route_key: Optional[str] = None, timeout: float = 30.0,
                 retry: retries.RetryOptions = retries.RetryOptions(),
                 credentials: Optional[grpc.ChannelCredentials] = None):
        self.route_key = route_key or uuid.uuid4().hex
        self.timeout = timeout
        self.retry = retry
        self._channel = (grpc.secure_channel(address, credentials, _UNLIMITED) if credentials
                         else grpc.insecure_channel(address, _UNLIMITED))
        self._stub = attention_pb2_grpc.AttentionStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    @property
    def stub(self) -> attention_pb2_grpc.AttentionStub:
        """The generated stub, for calls that have no function here."""
        return self._stub

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("adaattn-route", self.route_key),)

    def call(self, method: str, request: object, rule: retries.Rule = retries.Rule.REPEATABLE) -> object:
        """A unary call by the name of its RPC, asked again by `rule`."""
        rpc = getattr(self._stub, method)
        return retries.call(self.retry, rule,
                            lambda: rpc(request, timeout=self.timeout, metadata=self.metadata))

    def server_info(self) -> pb.GetServerInfoResponse:
        return self.call("GetServerInfo", pb.GetServerInfoRequest())

    def list_sessions(self) -> list[pb.SessionSummary]:
        """All sessions of the caller."""
        sessions, token = [], ""
        while True:
            page = self.call("ListSessions", pb.ListSessionsRequest(page_size=1000, page_token=token))
            sessions += page.sessions
            token = page.next_page_token
            if not token:
                return sessions

    def upload_profile(self, name: str, model: ModelShape, *, basis_mean: Optional[np.ndarray] = None,
                       basis: Optional[np.ndarray] = None, key_scales: Sequence[float] = (),
                       value_scales: Sequence[float] = (), policy_json: str = "",
                       error_factors: Sequence[float] | np.ndarray = (), extends: str = "") -> int:
        """Stores what is known of a model for later sessions (open_session(profile=name)); bytes of host memory.

        basis_mean [num_layers, num_kv_heads, head_dim], basis [num_layers, num_kv_heads, head_dim, head_dim] FP32;
        scales and error_factors [num_layers, num_kv_heads], flat or not. extends: a profile that gives what is left out.
        """
        request = pb.UploadProfileRequest(
            name=name, model=pb.ModelShape(**dataclasses.asdict(model)), policy_json=policy_json, extends=extends,
            key_scales=np.ravel(key_scales), value_scales=np.ravel(value_scales), error_factors=np.ravel(error_factors),
            **{field: to_tensor(array) for field, array in (("basis_mean", basis_mean), ("basis", basis))
               if array is not None})
        return self.call("UploadProfile", request).bytes

    def get_profile(self, name: str) -> Profile:
        return Profile.from_proto(self.call("GetProfile", pb.GetProfileRequest(name=name)))

    def open_session(self, model: ModelShape, *, page_format: PageFormat = PageFormat.DEFAULT,
                     element_type: DType = DType.DEFAULT, options: AttendOptions = AttendOptions(), layers: Sequence[LayerOptions] = (),
                     max_tokens: int = 0, lease_seconds: float = 0.0, profile: str = "",
                     start_position: int = 0, key_scales: Sequence[float] = (),
                     value_scales: Sequence[float] = (), **fields: object) -> "Session":
        """fields: of OpenSessionRequest, for those that have no argument here."""
        request = pb.OpenSessionRequest(
            model=pb.ModelShape(**dataclasses.asdict(model)), page_format=int(page_format),
            element_type=int(element_type), layers=[pb.LayerOptions(**dataclasses.asdict(layer)) for layer in layers],
            max_tokens=max_tokens, lease_seconds=lease_seconds, default_options=options.to_proto(),
            key_scales=key_scales, value_scales=value_scales, profile=profile,
            start_position=start_position, **fields)
        answer = self.call("OpenSession", request, retries.Rule.CREATES)
        grant = SessionGrant(answer.max_tokens, answer.lease_seconds, PageFormat(answer.page_format),
                             DType(answer.element_type), answer.max_message_bytes)
        ref = pb.SessionRef(session_id=answer.session_id, epoch=answer.epoch)
        return Session(self, ref, grant, start_position, [(0, 0)] * model.num_layers)

    def attend(self, layer: int, steps: Sequence[Step], *, options: Optional[AttendOptions] = None,
               output_dtype: DType = DType.DEFAULT) -> AttendResult:
        """One layer of one or more sessions. An error of one sequence is in its SequenceResult."""
        request = make_request(layer, steps, options, output_dtype)
        result = to_result(self.call("Attend", request), request)
        commit(layer, steps, result)
        return result

    def attend_stream(self, *, max_unanswered: int = 16) -> AttendStream:
        """A stream of steps; see AttendStream."""
        return AttendStream(self, max_unanswered)


class Session:
    """An open session. Knows the length of each layer and numbers the steps.

    Threads: calls about different layers may run at the same time; of one layer, one at a time.
    After UNAVAILABLE, CANCELLED or DEADLINE_EXCEEDED it is open whether the step was applied: ask the
    same step with the same rows again before any other of that layer. Leaving `with` closes it.
    """

    def __init__(self, client: Client, ref: pb.SessionRef, grant: SessionGrant, start_position: int,
                 layers: list[tuple[int, int]]):
        self.client = client
        self.ref = ref
        self.grant = grant
        self.start_position = start_position
        self._mutex = threading.Lock()
        self._layers = layers  # (length, steps answered)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def length(self, layer: int) -> int:
        """Tokens of the layer as last heard from the server, start_position not included."""
        with self._mutex:
            return self._layers[layer][0]

    def import_kv(self, k: np.ndarray, v: np.ndarray, *, first_layer: int = 0,
                  query_sample: Optional[np.ndarray] = None, basis_mean: Optional[np.ndarray] = None,
                  basis: Optional[np.ndarray] = None) -> None:
        """Appends a prefill of any length.

        k, v [num_layers, tokens, num_kv_heads, head_dim], or without the first of one layer.
        query_sample [rows, num_q_heads, head_dim] of first_layer orders the basis by what queries look
        at. basis_mean [num_kv_heads, head_dim] and basis [num_kv_heads, head_dim, head_dim] replace a
        fitted basis of first_layer.
        """
        with self._mutex:
            lengths = [length for length, _ in self._layers]
        extras = {"query_sample": query_sample, "basis_mean": basis_mean, "basis": basis}
        lengths = run_import(self.client, self, lengths, first_layer, k, v,
                             {name: to_tensor(array) for name, array in extras.items() if array is not None})
        with self._mutex:
            self._layers = [(length, steps) for length, (_, steps) in zip(lengths, self._layers)]

    def attend(self, layer: int, *, q: Optional[np.ndarray] = None, k: Optional[np.ndarray] = None,
               v: Optional[np.ndarray] = None, q_position: Optional[int] = None,
               options: Optional[AttendOptions] = None,
               output_dtype: DType = DType.DEFAULT) -> AttendResult:
        """One step of one layer (arrays as in `Step`); an error of the sequence is raised."""
        result = self.client.attend(layer, [Step(self, q, k, v, q_position)], options=options,
                                    output_dtype=output_dtype)
        if result.sequences[0].error:
            raise result.sequences[0].error
        return result

    def attend_stream(self, layer: int, steps: Iterable[dict], *,
                      options: Optional[AttendOptions] = None,
                      output_dtype: DType = DType.DEFAULT) -> Iterator[AttendResult]:
        """Runs steps of one layer, each a dict of `attend`'s q, k, v, over one stream; errors are raised."""
        with self.client.attend_stream() as stream:
            for step in steps:
                stream.send(layer, [Step(self, **step)], options=options, output_dtype=output_dtype)
                result = stream.receive()
                if result.sequences[0].error:
                    raise result.sequences[0].error
                yield result

    def truncate(self, position: int) -> int:
        """Drops tokens from `position` (start_position included) on, in every layer; the new length."""
        answer = self.client.call("TruncateSession", pb.TruncateSessionRequest(
            session=self.ref, position=position))
        with self._mutex:  # the next step is another one, even at an old position
            self._layers = [(answer.kv_len, steps + 1) for _, steps in self._layers]
        return answer.kv_len

    def fork(self, count: int = 1) -> list["Session"]:
        """Branches that share their pages until they write; 1 to 64."""
        answer = self.client.call("ForkSession", pb.ForkSessionRequest(session=self.ref, count=count),
                                  retries.Rule.CREATES)
        grant = dataclasses.replace(self.grant, lease_seconds=answer.lease_seconds)
        with self._mutex:
            return [Session(self.client, ref, grant, self.start_position, list(self._layers))
                    for ref in answer.sessions]

    def keep_alive(self) -> float:
        """Renews the lease; the seconds left."""
        lease = self.client.call("KeepAlive", pb.KeepAliveRequest(sessions=[self.ref])).leases[0]
        if lease.code:
            raise Error(status_code(lease.code), lease.message)
        return lease.lease_seconds

    def close(self) -> None:
        self.client.call("CloseSession", pb.CloseSessionRequest(session=self.ref))

    def next_step(self, layer: int, append_len: int, q_len: int) -> pb.SequenceInput:
        """The SequenceInput of the layer's next step. Until it is answered the layer has no other."""
        with self._mutex:
            length, steps = self._layers[layer]
        return pb.SequenceInput(session_id=self.ref.session_id, epoch=self.ref.epoch,
                                position=self.start_position + length, step_id=steps + 1,
                                append_len=append_len, q_len=q_len)

    def step_answered(self, layer: int, kv_len: int) -> None:
        with self._mutex:
            self._layers[layer] = (kv_len, self._layers[layer][1] + 1)


def make_request(layer: int, steps: Sequence[Step], options: Optional[AttendOptions],
                 output_dtype: DType) -> pb.AttendRequest:
    """The message of `steps`, rows in their order. Errors: TypeError for dtypes without a wire form."""
    request = pb.AttendRequest(layer=layer, output_dtype=int(output_dtype))
    if options is not None:
        request.options.CopyFrom(options.to_proto())
    for step in steps:
        append_len = 0 if step.k is None else len(step.k)
        q_len = 0 if step.q is None else len(step.q)
        entry = step.session.next_step(layer, append_len, q_len)
        if step.q_position is not None:
            entry.q_position = step.q_position
        request.sequences.append(entry)
    for name in ("q", "k", "v"):
        rows = [rows for step in steps if (rows := getattr(step, name)) is not None]
        if rows:
            getattr(request, name).CopyFrom(to_tensor(rows[0] if len(rows) == 1 else np.concatenate(rows)))
    return request


def to_result(answer: pb.AttendResponse, request: pb.AttendRequest) -> AttendResult:
    """Errors: Error, of the whole message (AttendStream)."""
    if answer.code:
        raise Error(status_code(answer.code), answer.message, answer.retry_after_seconds)
    o, lse = from_tensor(answer.o), from_tensor(answer.lse)
    sequences, row = [], 0
    for entry, reply in zip(request.sequences, answer.sequences, strict=True):
        rows = slice(row, row + entry.q_len)
        row += entry.q_len
        error = (Error(status_code(reply.code), reply.message, answer.retry_after_seconds)
                 if reply.code else None)
        decision = Decision.from_proto(reply.decision) if reply.HasField("decision") else None
        sequences.append(SequenceResult(o[rows], lse[rows], error, reply.kv_len, reply.replayed, decision))
    return AttendResult(o, lse, tuple(sequences), StageTimes.from_proto(answer.stage_times))


def commit(layer: int, steps: Sequence[Step], result: AttendResult) -> None:
    """Tells the sessions what was applied. A refused step keeps its number: asked again, it is the same."""
    for step, sequence in zip(steps, result.sequences):
        if sequence.error is None:
            step.session.step_answered(layer, sequence.kv_len)
