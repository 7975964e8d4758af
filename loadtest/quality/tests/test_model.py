"""A tiny random model through every part of the harness."""
import dataclasses

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from quality import ablation, capture, perplexity, retrieval
from quality.arms import parse
from quality.mixture import Mixture
from quality.model import NAME, ExactOverPrefill, Model, Prefill, Shape, attend_rows
from quality.served import Lane
from quality.tasks import Question

PREFILL, TOKENS = 1088, 1280


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=500, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
                         initializer_range=0.2, attn_implementation=NAME)
    return Model("tiny", LlamaForCausalLM(config).eval(), None, Shape(2, 4, 2, 64))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 500, (TOKENS,), generator=torch.Generator().manual_seed(8))


def test_our_attention_is_the_models_own(model, ids):
    ours = model.hidden(ids[None, :300], 0, Prefill(10))
    model.weights.set_attn_implementation("sdpa")
    theirs = model.weights.model(ids[None, :300]).last_hidden_state
    model.weights.set_attn_implementation(NAME)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-4, rtol=1e-4)


def test_rows_over_a_prefill_are_the_rows_of_one_pass(model, ids):
    prefill = Prefill(200)
    whole = model.hidden(ids[None, :300], 0, prefill)
    rest = model.hidden(ids[None, 200:300], 200, ExactOverPrefill(prefill))
    torch.testing.assert_close(rest, whole[:, 200:], atol=1e-4, rtol=1e-4)


def test_arms_keep_their_order_of_fidelity(client, model, ids):
    window = perplexity.Window(ids, [(5, 5), (PREFILL + 10, PREFILL + 11), (TOKENS - 1, TOKENS - 1)])
    names = ["bf16", "full", "two-stage=.016", "int4", "budget=.1"]
    rows, words, audits = perplexity.run(client, model, [window], PREFILL, [parse(name, 64) for name in names], 2, quiet=True)
    by_name = {row.arm: row for row in rows}
    assert by_name["exact"].kl.value == 0 and by_name["exact"].perplexity_change.value == 0
    assert 0 < by_name["bf16"].kl.value < by_name["full"].kl.value < by_name["int4"].kl.value
    assert by_name["bf16"].bytes_ratio == 1.0
    assert by_name["two-stage=.016"].bytes_ratio < by_name["full"].bytes_ratio < 0.65
    assert abs(by_name["bf16"].perplexity_change.value) < abs(by_name["int4"].perplexity_change.value)
    assert [word.trials for word in words] == [2] * 6  # the first stands before the scored rows
    bf16, full, two_stage, int4, budget = audits
    assert all(one.head_steps == 2 * 2 * (TOKENS - PREFILL) for one in audits)  # layers, kv heads, rows
    assert 0 < bf16.error < full.error < two_stage.error < int4.error
    assert budget.target == 0.1 and len(budget.layers) == 2 and two_stage.above is None
    assert full.error < budget.error < 0.1


def test_captured_traces_hold_exact_answers(model, ids, tmp_path):
    path, = capture.run(model, ids[:512], 3, [1], tmp_path)
    with safe_open(path, "pt") as file:
        q, k, v, positions, o = (file.get_tensor(name) for name in ("q", "k", "v", "positions", "expected_o"))
        scale = float(file.metadata()["softmax_scale"])
    assert positions.tolist() == [256, 383, 511] and k.shape == (2, 512, 64) and q.shape == (4, 3, 64)
    for row, position in enumerate(positions.tolist()):
        exact = attend_rows(*(x.float()[None] for x in (q[:, row:row + 1], k[:, :position + 1], v[:, :position + 1])), scale)
        torch.testing.assert_close(o[:, row:row + 1], exact[0], atol=1e-4, rtol=1e-4)


def test_trials_are_judged_by_every_token_of_the_answer(model, ids):
    prefill = Prefill(100)
    model.hidden(ids[None, :100], 0, prefill)
    question = ids[100:110].tolist()
    said = []
    for _ in range(3):  # greedy decoding
        hidden = model.hidden(torch.tensor([question + said]), 100, ExactOverPrefill(prefill))
        said.append(int(model.log_probs(hidden[0, -1]).argmax()))
    wrong = said[:2] + [(said[2] + 1) % 500]
    asked = [Question(question + answer, 3) for answer in (said, wrong)]
    hidden = model.hidden(torch.tensor([q.ids for q in asked]), 100, ExactOverPrefill(prefill))
    assert retrieval.answered(model, hidden, asked).tolist() == [True, False]


def test_questions_over_one_context_do_not_see_each_other(client, model, ids):
    prefill = Prefill(PREFILL)
    model.hidden(ids[None, :PREFILL], 0, prefill)
    questions = torch.stack([ids[:20], ids[50:70], ids[100:120]])
    lanes = [[Lane(0, 0, 20), Lane(1, 0, 12), Lane(2, 0, 20)]]
    served = model.hidden(questions, PREFILL, Mixture(client, model.shape, [parse("bf16", 64)], lanes, prefill))
    exact = model.hidden(questions, PREFILL, ExactOverPrefill(prefill))
    error = (served - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error[0].max() < 0.05 and error[1, :12].max() < 0.05 and error[2].max() < 0.05
    assert not client.list_sessions()


def test_the_ablation_measures_server_and_simulation_alike(client, model, ids, tmp_path):
    one = ablation.Ablation(model, ids, PREFILL, ids.flip(0)[:PREFILL])
    budget, served, static = one.served(client, {"budget": ["budget=.1"], "served": ["theta=.004"],
                                                 "static bits": ["static=8/0/8"]}, 2)
    simulated = one.simulated("simulated", "theta=.004", ablation.SHARED["theta=.004"])
    assert simulated.bytes == pytest.approx(served.bytes, rel=0.02)
    assert simulated.error == pytest.approx(served.error, rel=0.1)
    assert served.kl == pytest.approx(simulated.kl, rel=0.3)
    assert one.dense("int4").error > 3 * one.dense("int8").error > 0
    points = [budget, served, simulated, static]
    assert ablation.front(points)[0] in points
    assert ablation.table(points).count("\n") == 5
    assert budget.bytes < static.bytes and budget.kl > static.kl
    assert ablation.unbeaten(points) == [static]
    beaten = dataclasses.replace(static, bytes=budget.bytes, kl=budget.kl)
    assert ablation.unbeaten([budget, beaten]) == []
    ablation.plot([*points, dataclasses.replace(simulated, family="page 16")], tmp_path)
    assert "budget" in (tmp_path / "policies_kl.svg").read_text()


def test_every_variant_of_the_ablation_answers(model, ids):
    one = ablation.Ablation(model, ids[:PREFILL + 64], PREFILL, ids.flip(0)[:PREFILL])
    points = {(family, name): one.simulated(family, name, variant) for family, name, variant in ablation.variants()}
    assert all(0 < point.bytes < 1 and 0 < point.error < 1 and 0 < point.kl for point in points.values())
    assert len({(point.bytes, point.kl) for point in points.values()}) > 0.9 * len(points)  # each does something
