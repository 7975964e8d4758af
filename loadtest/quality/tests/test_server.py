"""The harness against a server: rows are live decode steps, and the simulation states what the server does."""
import re
import time
import urllib.request

import numpy as np
import pytest
import torch
from safetensors import safe_open

import adaattn
from adaattn.v1 import attention_pb2 as pb
from conftest import ROOT, SERVER
from quality import calibrate
from quality.arms import AUDITED_PROFILE, Arm, parse
from quality.ablation import SHARED
from quality.audit import Audited, errors, result_of
from quality.ladder import LadderOverPrefill
from quality.mixture import Mixture
from quality.model import Prefill, Shape, attend_rows
from quality.served import Lane, segments, to_rows, wait_until_sealed

TRACE = ROOT / "tests/data/smollm2-135m-layer15-8k.safetensors"
SHAPE = Shape(1, 9, 3, 64)
FIRST, ROWS = 2048, 192


@pytest.fixture(scope="module")
def layer():
    """A prefill and the rows after it: keys and values of a real layer, its captured queries again and again."""
    with safe_open(TRACE, "pt") as file:
        q, k, v = (file.get_tensor(name).float()[None] for name in ("q", "k", "v"))
        scale = float(file.metadata()["softmax_scale"])
    prefill = Prefill(FIRST)
    prefill.k, prefill.v, prefill.q = [k[:, :, :FIRST]], [v[:, :, :FIRST]], [q[:, :, :16]]
    rows = slice(FIRST, FIRST + ROWS)
    return prefill, q[:, :, torch.arange(ROWS) % q.shape[2]], k[:, :, rows], v[:, :, rows], scale


def serve(client, arms, lanes, layer):
    prefill, q, k, v, scale = layer
    mixture = Mixture(client, SHAPE, arms, lanes, prefill)
    entries = 1 + max(lane.entry for of_arm in lanes for lane in of_arm)
    return mixture, mixture(0, *(x.expand(entries, -1, -1, -1) for x in (q, k, v)), scale)


def test_an_exact_server_answers_exactly(client, layer):
    arm = Arm("fp32", adaattn.PageFormat.FP32)
    mixture, o = serve(client, [arm], [segments(0, ROWS, 2)], layer)
    prefill, q, k, v, scale = layer
    exact = attend_rows(q, *(torch.cat([old[0], new], 2) for old, new in ((prefill.k, k), (prefill.v, v))), scale)
    assert ((o - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2e-3  # tensors travel as FP16
    assert mixture.ratios(0)[0] == 2.0
    assert not client.list_sessions()


def test_segments_side_by_side_answer_as_one_live_decode(client, layer):
    arm = parse("two-stage=.004", 64)
    mixture, o = serve(client, [arm, arm], [[Lane(0, 0, ROWS)], segments(1, ROWS, 3)], layer)
    assert torch.equal(o[0], o[1])
    assert mixture.bytes_read(0) == mixture.bytes_read(1)
    assert not client.list_sessions()


def test_each_arm_and_batch_entry_gets_its_own_answer(client, layer):
    arms = [parse(name, 64) for name in ("bf16", "int8", "full")]
    _, together = serve(client, arms, [segments(i, ROWS, 2) for i in range(3)], layer)
    for i, arm in enumerate(arms):
        _, alone = serve(client, [arm], [segments(0, ROWS, 2)], layer)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_the_simulation_reads_and_errs_as_the_server_does(client, layer, name):
    prefill, q, k, v, scale = layer
    mixture, served = serve(client, [parse(name, 64)], [segments(0, ROWS, 2)], layer)
    attend = LadderOverPrefill(SHARED[name], prefill, 1024)
    simulated = attend(0, q, k, v, scale)
    exact = attend_rows(q, *(torch.cat([old[0], new], 2) for old, new in ((prefill.k, k), (prefill.v, v))), scale)
    error = lambda o: float(((o - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())
    assert attend.ratio == pytest.approx(mixture.ratios(0)[0], rel=0.01)
    assert error(simulated) == pytest.approx(error(served), rel=0.05)


def test_errors_of_heads_are_those_of_the_servers_audits(layer):
    prefill, q, k, v, scale = layer
    rows = 64
    q, k, v = (x[:, :, :rows] for x in (q, k, v))
    arm = parse("budget=.05", 64)
    flags = ["--backend=cpu", "--threads=1", "--max-seal-backlog-pages=0", "--seal-pages-per-slice=4096",
             "--audit-share=1", "--metrics-listen=127.0.0.1:0"]
    with adaattn.LocalServer(SERVER, *flags) as server, adaattn.Client(server.unix) as client:
        with client.open_session(adaattn.ModelShape(1, 9, 3, 64, scale), page_format=arm.page_format,
                                 options=arm.options, exact_tier=pb.EXACT_TIER_BF16_PAGES) as session:
            session.import_kv(to_rows(prefill.k[0][0]), to_rows(prefill.v[0][0]), query_sample=to_rows(prefill.q[0][0]))
            wait_until_sealed(client, [session])
            answer = lambda t: session.attend(0, q=to_rows(q[0])[t:t + 1], k=to_rows(k[0])[t:t + 1],
                                              v=to_rows(v[0])[t:t + 1], output_dtype=adaattn.DType.FP32).o
            o = torch.from_numpy(np.concatenate([answer(t) for t in range(rows)])).transpose(0, 1)
            audits = audited_errors(server.metrics, 3 * rows)
    audited = Audited(lambda *_: o[None], prefill)
    audited(0, q, k, v, scale)
    result = result_of(arm.name, arm.target, [audited.of_entry(0)])
    assert result.head_steps == 3 * rows
    assert 0.25 * arm.target < result.error < arm.target
    assert result.error == pytest.approx(audits, rel=1e-3)


def test_audits_become_error_factors_that_the_budget_follows(layer):
    prefill, q, k, v, scale = layer
    budget, audited = parse("budget=.05", 64), parse("audited=.05", 64)
    flags = ["--backend=cpu", "--threads=1", "--max-seal-backlog-pages=0", "--seal-pages-per-slice=4096",
             "--audit-share=1"]
    with adaattn.LocalServer(SERVER, *flags) as server, adaattn.Client(server.unix) as client:
        calibrate.upload(client, SHAPE, None)
        asking = calibrate.arm_of(budget.target)
        serve(client, [asking], [segments(0, ROWS, 2)], layer)
        profile = client.get_profile("audited.0")
        np.testing.assert_array_equal(profile.audits, [[ROWS] * 3])
        factors = profile.audited_error_factors
        # Far enough from 1 to tell, on either side.
        factors[0, 0], factors[0, 1] = max(factors[0, 0], 2.0), min(factors[0, 1], 0.5)
        calibrate.upload(client, SHAPE, factors)
        _, o = serve(client, [budget, audited], [segments(i, ROWS, 2) for i in range(2)], layer)
    exact = attend_rows(q, *(torch.cat([old[0], new], 2) for old, new in ((prefill.k, k), (prefill.v, v))), scale)
    before, after = (errors(one, exact[0], 3)[0].mean(1) for one in o)
    assert after[0] < 0.9 * before[0] and after[1] > 1.1 * before[1]


def audited_errors(address, count, seconds=30.0):
    """Mean of the server's audited errors, once there are `count`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
        figure = lambda name: sum(map(float, re.findall(rf"^adaattn_audited_relative_error_{name}(?:{{.*}})? (\S+)$", text, re.M)))
        if figure("count") == count:
            return figure("sum") / count
        time.sleep(0.05)
    raise AssertionError(f"{figure('count')} of {count} audits within {seconds} s")
