"""Attend messages over one stream, pipelined."""
from __future__ import annotations

import collections
import queue
from typing import TYPE_CHECKING, Iterator, Optional, Sequence

import grpc

from adaattn import retry as retries
from adaattn.types import AttendOptions, AttendResult, DType, Error
from adaattn.v1 import attention_pb2 as pb

if TYPE_CHECKING:
    from adaattn.client import Client, Step


class AttendStream:
    """Answers come in the order of the messages; `max_unanswered` may be in flight.

    A lost stream is opened anew, after a backoff, and all unanswered messages are sent again as they
    were: exact, because a (session, layer) has at most one unanswered step. Threads: one.
    """

    def __init__(self, client: "Client", max_unanswered: int):
        if max_unanswered < 1:
            raise ValueError(f"max_unanswered {max_unanswered}: must be at least 1")
        self._client = client
        self._max_unanswered = max_unanswered
        self._unanswered: collections.deque[tuple[pb.AttendRequest, Sequence["Step"]]] = collections.deque()
        self._busy: set[tuple[str, int]] = set()  # (session, layer) with an unanswered step
        self._retry = retries.RetryState(client.retry, retries.Rule.REPEATABLE)
        self._requests = 0
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._call: Optional[grpc.Call] = None
        self._start()

    def __enter__(self) -> "AttendStream":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.finish() if kind is None and not self._unanswered else self._call.cancel()

    def send(self, layer: int, steps: Sequence["Step"], *, options: Optional[AttendOptions] = None,
             output_dtype: DType = DType.DEFAULT) -> int:
        """Sends a message and returns its request id; never waits.

        Errors: ValueError when max_unanswered are in flight, or a step of one of these sessions and
        this layer is (receive first).
        """
        from adaattn.client import make_request

        keys = {(step.session.ref.session_id, layer) for step in steps}
        if len(self._unanswered) >= self._max_unanswered:
            raise ValueError(f"{len(self._unanswered)} messages are unanswered: receive first")
        if len(keys) < len(steps) or keys & self._busy:
            raise ValueError(f"layer {layer}: a session of this message has an unanswered step already")
        request = make_request(layer, steps, options, output_dtype)
        self._requests += 1
        request.request_id = self._requests
        self._busy |= keys
        self._unanswered.append((request, steps))
        self._outgoing.put(request)
        return request.request_id

    def receive(self) -> AttendResult:
        """The next answer. Errors: Error, of the message or of the stream when its retries are used up;
        ValueError when nothing is unanswered."""
        from adaattn.client import commit, to_result

        if not self._unanswered:
            raise ValueError("nothing is unanswered")
        answer = self._next_answer()
        request, steps = self._unanswered.popleft()
        self._busy -= {(step.session.ref.session_id, request.layer) for step in steps}
        result = to_result(answer, request)
        commit(request.layer, steps, result)
        return result

    def finish(self) -> None:
        """Half-closes and waits for the end of the stream. Requires: nothing is unanswered."""
        self._outgoing.put(None)
        for _ in self._call:
            raise Error(grpc.StatusCode.INTERNAL, "the server answered a message that was not sent")

    def _next_answer(self) -> pb.AttendResponse:
        while True:
            try:
                answer = next(self._call)
                self._retry.reset()
                return answer
            except StopIteration:
                error = Error(grpc.StatusCode.UNAVAILABLE, "the server ended the stream")
            except grpc.RpcError as failure:
                error = retries.to_error(failure)
            self._retry.wait_or_raise(error)
            self._start()
            for request, _ in self._unanswered:
                self._outgoing.put(request)

    def _start(self) -> None:
        if self._call is not None:
            self._outgoing.put(None)  # ends the old call's reader of the queue
        outgoing = self._outgoing = queue.SimpleQueue()

        def messages() -> Iterator[pb.AttendRequest]:
            while (message := outgoing.get()) is not None:
                yield message

        self._call = self._client.stub.AttendStream(messages(), metadata=self._client.metadata)
