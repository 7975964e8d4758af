"""The client against a real server, over a Unix socket and TCP."""
import time

import grpc
import ml_dtypes
import numpy as np
import pytest

import adaattn
from attention import attention, relative_error

SHAPE = adaattn.ModelShape(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=64)


def rows(seed, count, heads, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((count, heads, 64), np.float32).astype(dtype)


def wait_until_sealed(client, session, pages):
    """Sealing follows an import."""
    for _ in range(1000):
        (summary,) = [s for s in client.list_sessions() if s.session_id == session.ref.session_id]
        if summary.pages_sealed >= pages:
            return
        time.sleep(0.01)
    raise AssertionError(f"{summary.pages_sealed} of {pages} pages were sealed within 10 s")


@pytest.mark.parametrize("dtype, page_format, tolerance", [
    (np.float32, adaattn.PageFormat.FP32, 1e-5),
    (np.float16, adaattn.PageFormat.FP16, 1e-3),
    (ml_dtypes.bfloat16, adaattn.PageFormat.BF16, 1e-2),
])
def test_attends_over_what_was_imported_and_appended(client, dtype, page_format, tolerance):
    k, v = rows(1, 200, 2, dtype), rows(2, 200, 2, dtype)
    q = rows(3, 3, 4, dtype)
    with client.open_session(SHAPE, page_format=page_format) as session:
        assert session.grant.page_format is page_format
        assert session.grant.element_type is adaattn.DType[page_format.name]
        session.import_kv(k[:197], v[:197], first_layer=1)
        assert (session.length(0), session.length(1)) == (0, 197)
        answer = session.attend(1, q=q, k=k[197:], v=v[197:], output_dtype=adaattn.DType.FP32)
        assert session.length(1) == answer.sequences[0].kv_len == 200
    o, lse = attention(q, k, v, 197)
    assert answer.o.shape == (3, 4, 64) and answer.o.dtype == np.float32
    assert relative_error(answer.o, o) < tolerance
    np.testing.assert_allclose(answer.lse, lse, atol=20 * tolerance)


def test_output_has_the_type_of_q_unless_asked_otherwise(client):
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.BF16) as session:
        k = rows(1, 1, 2, ml_dtypes.bfloat16)
        answer = session.attend(0, q=rows(2, 1, 4, ml_dtypes.bfloat16), k=k, v=k)
    assert answer.o.dtype == ml_dtypes.bfloat16
    assert answer.lse.dtype == np.float32
    np.testing.assert_array_equal(answer.o[0, 0], k[0, 0])  # one token: its value is the answer


def test_a_progressive_session_says_what_it_read(client):
    k, v = rows(1, 2048, 2, np.float16), rows(2, 2048, 2, np.float16)
    # Mass on few pages: one direction that only the last 256 keys share with the query.
    q = rows(3, 1, 4, np.float16)
    k[-256:-128] += 2 * q[0, ::2]
    per_head = adaattn.AttendOptions(policy=adaattn.Policy.THRESHOLD, theta=0.004,
                                     detail=adaattn.Detail.PER_HEAD)
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.PROGRESSIVE, options=per_head) as session:
        session.import_kv(k, v, query_sample=rows(4, 32, 4, np.float16))
        wait_until_sealed(client, session, 31)
        decision = session.attend(0, q=q).decision
    assert decision.pages_sealed == 2 * 31
    assert 0 < decision.bytes_read < 0.6 * decision.bytes_bf16
    assert decision.bytes_bf16 == 2048 * 2 * 2 * 64 * 2
    assert decision.bytes_read == sum(head.key_bytes + head.value_bytes for head in decision.heads)
    assert [sum(head.value_pages.values()) for head in decision.heads] == [31, 31]
    assert decision.fallback is adaattn.Fallback.NONE


def test_a_profile_says_what_it_holds(client):
    factors = np.array([[1, 2], [0.5, 4]], np.float32)
    basis = np.broadcast_to(np.eye(64, dtype=np.float32), (2, 2, 64, 64))
    size = client.upload_profile("said", SHAPE, basis_mean=np.zeros((2, 2, 64), np.float32), basis=basis,
                                 error_factors=factors)
    profile = client.get_profile("said")
    assert (profile.model, profile.bytes) == (SHAPE, size)
    assert profile.has_basis and not profile.has_policy
    np.testing.assert_array_equal(profile.error_factors, factors)
    np.testing.assert_array_equal(profile.audited_error_factors, factors)  # no audits, no news
    assert not profile.audits.any() and profile.audits.shape == (2, 2)
    assert client.upload_profile("more", SHAPE, error_factors=2 * factors, extends="said") == size
    assert client.get_profile("more").has_basis
    np.testing.assert_array_equal(client.get_profile("more").error_factors, 2 * factors)
    with pytest.raises(adaattn.Error, match="not uploaded"):
        client.get_profile("unsaid")
    with pytest.raises(adaattn.Error, match="error_factors: 3 factors"):
        client.upload_profile("said", SHAPE, error_factors=[1, 1, 1])


def test_one_message_holds_many_sessions_and_one_bad_one_fails_alone(client):
    k, q = rows(1, 8, 2), rows(2, 2, 4)
    sessions = [client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) for _ in range(3)]
    sessions[1].close()
    result = client.attend(0, [adaattn.Step(s, q=q[:n], k=k[:n], v=k[:n]) for s, n in zip(sessions, (1, 2, 2))])
    assert [s.error and s.error.code for s in result.sequences] == [None, grpc.StatusCode.NOT_FOUND, None]
    assert [s.o.shape[0] for s in result.sequences] == [1, 2, 2]
    assert [s.length(0) for s in sessions] == [1, 0, 2]
    assert not result.sequences[1].o.any() and np.isneginf(result.sequences[1].lse).all()
    expected, _ = attention(q, k[:2], k[:2], 0)
    assert relative_error(result.sequences[2].o, expected) < 1e-5


def test_a_stream_answers_in_order(client):
    k, v, q = rows(1, 20, 2), rows(2, 20, 2), rows(3, 20, 4)
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as session:
        steps = [dict(q=q[t:t + 1], k=k[t:t + 1], v=v[t:t + 1]) for t in range(20)]
        answers = np.concatenate([answer.o for answer in session.attend_stream(0, steps)])
    expected, _ = attention(q, k, v, 0)
    assert relative_error(answers, expected) < 1e-5


def test_a_stream_takes_one_step_of_a_layer_at_a_time_and_layers_side_by_side(client):
    k, q = rows(1, 1, 2), rows(2, 1, 4)
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as session:
        with client.attend_stream(max_unanswered=2) as stream:
            step = adaattn.Step(session, q=q, k=k, v=k)
            stream.send(0, [step])
            with pytest.raises(ValueError, match="unanswered step"):
                stream.send(0, [step])
            stream.send(1, [step])
            with pytest.raises(ValueError, match="receive first"):
                stream.send(1, [step])
            assert [stream.receive().sequences[0].kv_len for _ in range(2)] == [1, 1]
            with pytest.raises(ValueError, match="nothing"):
                stream.receive()


def test_branches_and_truncation_keep_their_own_lengths(client):
    k, q = rows(1, 100, 2), rows(2, 1, 4)
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as session:
        session.import_kv(np.stack([k, k]), np.stack([k, k]))
        left, right = session.fork(2)
        assert left.truncate(70) == 70
        answer = left.attend(0, q=q, k=k[70:71], v=k[70:71])
        assert (left.length(0), right.length(0), session.length(1)) == (71, 100, 100)
        expected, _ = attention(q, k[:71], k[:71], 70)
        assert relative_error(answer.o, expected) < 1e-5
        assert left.keep_alive() > 0
        ids = {summary.session_id for summary in client.list_sessions()}
        assert {left.ref.session_id, right.ref.session_id, session.ref.session_id} <= ids


def test_rows_may_stand_at_earlier_positions(client):
    k, q = rows(1, 10, 2), rows(2, 1, 4)
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as session:
        session.import_kv(k, k)
        answer = session.attend(0, q=q, q_position=4)
    expected, _ = attention(q, k[:5], k[:5], 4)
    assert relative_error(answer.o, expected) < 1e-5


def test_imports_are_cut_below_the_message_limit(client):
    tokens = 20000  # 2 x 10 MB a layer, in chunks of 4 MiB
    k = rows(1, tokens, 2)
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as session:
        session.import_kv(np.stack([k, k]), np.stack([k, k]))
        assert [session.length(layer) for layer in (0, 1)] == [tokens, tokens]


@pytest.mark.parametrize("step, code, text", [
    (dict(q=rows(1, 1, 3)), grpc.StatusCode.INVALID_ARGUMENT, "q.shape"),
    (dict(q=np.full((1, 4, 64), np.nan, np.float32)), grpc.StatusCode.INVALID_ARGUMENT, "q"),
    (dict(q=rows(1, 1, 4), options=adaattn.AttendOptions(theta=2.0)), grpc.StatusCode.INVALID_ARGUMENT, "theta"),
])
def test_errors_have_the_servers_code_and_words(client, step, code, text):
    with client.open_session(SHAPE, page_format=adaattn.PageFormat.FP32) as session:
        session.import_kv(rows(2, 4, 2), rows(3, 4, 2))
        with pytest.raises(adaattn.Error, match=text) as raised:
            session.attend(0, **step)
    assert raised.value.code is code


def test_wrong_tensors_are_refused_before_they_are_sent(client):
    with client.open_session(SHAPE) as session:
        with pytest.raises(TypeError, match="float64"):
            session.attend(0, q=np.zeros((1, 4, 64)))
        with pytest.raises(ValueError, match="one shape"):
            session.import_kv(rows(1, 4, 2), rows(1, 5, 2))
        with pytest.raises(ValueError, match="first_layer 2"):
            session.import_kv(rows(1, 4, 2), rows(1, 4, 2), first_layer=2)


def test_an_unreachable_server_is_unavailable_after_the_retries():
    waits = []
    retry = adaattn.RetryOptions(max_attempts=3, sleep=waits.append)
    with adaattn.Client("unix:/nonexistent/socket", retry=retry, timeout=5) as client:
        with pytest.raises(adaattn.Error) as raised:
            client.server_info()
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert len(waits) == 2
