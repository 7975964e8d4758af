"""Appends are applied once, whatever is lost: a proxy that drops answers stands before a real server."""
import concurrent.futures

import grpc
import numpy as np
import pytest

import adaattn
from adaattn import retry as retries
from adaattn.v1 import attention_pb2_grpc
from attention import attention, relative_error

SHAPE = adaattn.ModelShape(num_layers=2, num_q_heads=2, num_kv_heads=1, head_dim=64)
UNAVAILABLE, LOST = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED


class LossyProxy(attention_pb2_grpc.AttentionServicer):
    """Forwards calls. `lose` counts the answers that it drops after the server has acted, with `code`;
    `cut_import` forwards only so many chunks of the next import before it drops the call."""

    def __init__(self, stub):
        self.stub, self.lose, self.code, self.trailing, self.calls = stub, 0, UNAVAILABLE, (), []
        self.cut_import = None

    def _maybe_lose(self, context):
        if self.lose > 0:
            self.lose -= 1
            context.set_trailing_metadata(self.trailing)
            context.abort(self.code, "the answer was dropped")

    def _unary(self, name, request, context):
        self.calls.append((name, dict(context.invocation_metadata()).get("adaattn-route")))
        answer = getattr(self.stub, name)(request)
        self._maybe_lose(context)
        return answer

    def OpenSession(self, request, context):
        return self._unary("OpenSession", request, context)

    def CloseSession(self, request, context):
        return self._unary("CloseSession", request, context)

    def Attend(self, request, context):
        return self._unary("Attend", request, context)

    def AttendStream(self, requests, context):
        self.calls.append(("AttendStream", None))
        for answer in self.stub.AttendStream(requests):
            self._maybe_lose(context)
            yield answer

    def ImportKv(self, requests, context):
        self.calls.append(("ImportKv", None))
        cut, self.cut_import = self.cut_import, None
        chunks = list(requests)
        try:
            answer = self.stub.ImportKv(iter(chunks[:cut]))
        except grpc.RpcError as refused:
            context.abort(refused.code(), refused.details())
        if cut is not None:
            context.abort(UNAVAILABLE, "cut")
        return answer


@pytest.fixture
def proxy(server):
    executor = concurrent.futures.ThreadPoolExecutor(4)
    with grpc.insecure_channel(server.unix) as channel:
        servicer = LossyProxy(attention_pb2_grpc.AttentionStub(channel))
        front = grpc.server(executor)
        attention_pb2_grpc.add_AttentionServicer_to_server(servicer, front)
        servicer.address = f"127.0.0.1:{front.add_insecure_port('127.0.0.1:0')}"
        front.start()
        yield servicer
        front.stop(None).wait()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def session(proxy, waits):
    options = adaattn.RetryOptions(sleep=waits.append)
    with adaattn.Client(proxy.address, retry=options, route_key="here") as client:
        with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as opened:
            yield opened


def row(seed, heads):
    return np.random.default_rng(seed).standard_normal((1, heads, 64), np.float32)


@pytest.mark.parametrize("code", [UNAVAILABLE, grpc.StatusCode.CANCELLED, LOST])
def test_a_lost_answer_is_asked_again_and_appended_once(session, proxy, waits, code):
    proxy.lose, proxy.code = 2, code
    k, v, q = row(1, 1), row(2, 1), row(3, 2)
    answer = session.attend(0, q=q, k=k, v=v)
    assert answer.sequences[0].replayed
    assert session.length(0) == answer.sequences[0].kv_len == 1
    assert len(waits) == 2
    np.testing.assert_allclose(answer.o[0, 1], v[0, 0], rtol=1e-6)


def test_retries_end_and_the_same_step_may_be_asked_later(session, proxy, waits):
    proxy.lose = 5
    step = dict(q=row(1, 2), k=row(2, 1), v=row(3, 1))
    with pytest.raises(adaattn.Error) as raised:
        session.attend(0, **step)
    assert raised.value.code is UNAVAILABLE and len(waits) == 4
    answer = session.attend(0, **step)
    assert answer.sequences[0].replayed and session.length(0) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_other_errors_are_returned_at_once(session, proxy, waits, code):
    proxy.lose, proxy.code = 1, code
    with pytest.raises(adaattn.Error) as raised:
        session.attend(0, q=row(1, 2), k=row(2, 1), v=row(3, 1))
    assert raised.value.code is code and not waits


def test_a_full_server_is_asked_again_after_its_hint(session, proxy, waits):
    proxy.lose, proxy.code = 1, grpc.StatusCode.RESOURCE_EXHAUSTED
    proxy.trailing = ((retries.RETRY_AFTER, "7.5"),)
    session.attend(0, q=row(1, 2), k=row(2, 1), v=row(3, 1))
    assert waits == [7.5]


def test_opening_is_repeated_only_when_nothing_can_be_left_behind(session, proxy, waits):
    proxy.lose, proxy.code = 1, LOST
    with pytest.raises(adaattn.Error):
        session.client.open_session(SHAPE)
    assert not waits
    proxy.lose, proxy.code = 1, UNAVAILABLE
    session.client.open_session(SHAPE).close()
    assert len(waits) == 1


def test_a_lost_stream_goes_on_where_it_was(session, proxy, waits):
    k = np.concatenate([row(seed, 1) for seed in range(10)])
    q = row(99, 2)
    with session.client.attend_stream() as stream:
        for t in range(10):
            proxy.lose = 1 if t in (3, 7) else 0
            for layer in (0, 1):
                stream.send(layer, [adaattn.Step(session, q=q, k=k[t:t + 1], v=k[t:t + 1])])
            answers = [stream.receive() for _ in range(2)]
            expected, _ = attention(q, k[:t + 1], k[:t + 1], t)
            for answer in answers:
                assert answer.sequences[0].error is None
                assert answer.sequences[0].kv_len == t + 1
                assert relative_error(answer.o, expected) < 1e-5
    assert len(waits) == 2


@pytest.mark.parametrize("cut", [None, 1, 3, 4])
def test_an_import_cut_off_anywhere_ends_with_every_token_once(session, proxy, monkeypatch, cut):
    monkeypatch.setattr("adaattn.importer._CHUNK_BYTES", 64 * 4 * 2 * 50)  # 50 tokens
    k = np.random.default_rng(5).standard_normal((2, 100, 1, 64)).astype(np.float32)
    proxy.cut_import = cut
    session.import_kv(k, k)
    assert [session.length(layer) for layer in (0, 1)] == [100, 100]
    q = row(1, 2)
    expected, _ = attention(q, k[1], k[1], 99)
    assert relative_error(session.attend(1, q=q).o, expected) < 1e-5


def test_every_call_carries_the_route(session, proxy):
    session.attend(0, q=row(1, 2), k=row(2, 1), v=row(3, 1))
    assert proxy.calls and all(route == "here" for _, route in proxy.calls)


def test_waits_grow_with_jitter_up_to_the_largest():
    options = adaattn.RetryOptions(max_attempts=9, initial_backoff=1, max_backoff=8, multiplier=2, jitter=0.25)
    state = retries.RetryState(options, retries.Rule.REPEATABLE)
    error = adaattn.Error(UNAVAILABLE, "")
    for backoff in (1, 2, 4, 8, 8):
        assert 0.75 * backoff <= state.next_wait(error) <= backoff
    state.reset()
    assert state.next_wait(error) <= 1
