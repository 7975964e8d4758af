"""The harness against a server: rows are live decode steps, and the simulation states what the server does."""

import pytest
import torch
from safetensors import safe_open

import adaattn
from conftest import ROOT
from quality.arms import Arm, parse
from quality.ablation import SHARED
from quality.ladder import LadderOverPrefill
from quality.mixture import Mixture
from quality.model import Prefill, Shape, attend_rows
from quality.served import Lane, segments

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
