"""Chunked imports. Internal to the package."""
from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Mapping, Sequence

import grpc
import numpy as np

from adaattn import retry as retries
from adaattn.tensors import to_tensor
from adaattn.types import Error
from adaattn.v1 import attention_pb2 as pb

if TYPE_CHECKING:
    from adaattn.client import Client, Session

_CHUNK_BYTES = 4 << 20
_MESSAGE_SLACK = 4096  # everything in a message but tensors


def run_import(client: "Client", session: "Session", lengths: Sequence[int], first_layer: int,
               k: np.ndarray, v: np.ndarray, extras: Mapping[str, pb.Tensor]) -> list[int]:
    """Sends k and v in chunks of one layer each; the lengths of all layers after it.

    A lost connection is taken up again chunk by chunk: one that ends where its layer ends is ignored
    by the server, an earlier one refused as too early, the first new one applied.
    Errors: ValueError for shapes that make no sense, Error from the server.
    """
    chunks = list(_chunks(session, lengths, first_layer, k, v, extras))
    state = retries.RetryState(client.retry, retries.Rule.REPEATABLE)
    try:
        return _send(client, session, chunks)
    except grpc.RpcError as failure:
        state.wait_or_raise(retries.to_error(failure))
    answer = list(lengths)
    for index, chunk in enumerate(chunks):
        while True:
            try:
                answer = _send(client, session, [chunk])
                state.reset()
                break
            except grpc.RpcError as failure:
                error = retries.to_error(failure)
                if error.code is grpc.StatusCode.FAILED_PRECONDITION and index + 1 < len(chunks):
                    break  # applied before the loss
                state.wait_or_raise(error)
    return answer


def _send(client: "Client", session: "Session", chunks: Sequence[pb.ImportKvRequest]) -> list[int]:
    def messages() -> Iterator[pb.ImportKvRequest]:
        for index, chunk in enumerate(chunks):
            message = pb.ImportKvRequest()
            message.CopyFrom(chunk)
            if index == 0:
                message.session_id, message.epoch = session.ref.session_id, session.ref.epoch
            yield message

    timeout = max(client.timeout, 300.0)  # of a whole prefill
    return list(client.stub.ImportKv(messages(), timeout=timeout, metadata=client.metadata).kv_len)


def _chunks(session: "Session", lengths: Sequence[int], first_layer: int, k: np.ndarray, v: np.ndarray,
            extras: Mapping[str, pb.Tensor]) -> Iterator[pb.ImportKvRequest]:
    if k.shape != v.shape or k.ndim not in (3, 4):
        raise ValueError(f"k {k.shape} and v {v.shape}: must have one shape, [num_layers, tokens, "
                         "num_kv_heads, head_dim] or without the first")
    if k.ndim == 3:
        k, v = k[None], v[None]
    if not 0 <= first_layer <= len(lengths) - len(k):
        raise ValueError(f"first_layer {first_layer} with {len(k)} layers: must be within 0 to {len(lengths) - 1}")
    budget = _CHUNK_BYTES
    if session.grant.max_message_bytes:
        budget = min(budget, session.grant.max_message_bytes - _MESSAGE_SLACK
                     - sum(tensor.ByteSize() for tensor in extras.values()))
    tokens = k.shape[1]
    step = max(1, budget // max(1, k[0, :1].nbytes + v[0, :1].nbytes))
    for layer in range(len(k)):
        base = session.start_position + lengths[first_layer + layer]
        for begin in range(0, max(tokens, 1), step):
            rows = slice(begin, begin + step)
            yield pb.ImportKvRequest(
                first_layer=first_layer + layer, num_layers=1, position=base + begin,
                k=to_tensor(k[layer:layer + 1, rows]), v=to_tensor(v[layer:layer + 1, rows]),
                **(extras if layer == begin == 0 else {}))
