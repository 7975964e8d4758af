"""The parts of the harness that need no model."""
import json
import math

import numpy as np
import pytest
import torch

import adaattn
from quality import arms, audit, calibrate, dense, ladder, statistics, tasks, text
from quality.model import Prefill, attend_rows
from quality.served import Lane, segments


def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs():
    first = np.array([True] * 9 + [False] * 1 + [True] * 90)
    second = np.array([False] * 9 + [True] * 1 + [True] * 90)
    assert statistics.mcnemar(first, second) == pytest.approx(2 * (1 + 10) / 2 ** 10)
    assert statistics.mcnemar(second, first) == statistics.mcnemar(first, second)
    assert statistics.mcnemar(first, first) == 1.0


def test_the_bootstrap_draws_whole_blocks():
    values = np.repeat(np.random.default_rng(0).standard_normal(100), 25)  # 100 blocks of equal values
    blocked = statistics.block_bootstrap([values], np.mean, np.arange(2500) // 25)
    single = statistics.block_bootstrap([values], np.mean, np.arange(2500))
    assert blocked.low < blocked.value < blocked.high
    # A mean of 100 unit normals: 2 * 1.96 / sqrt(100); drawn singly it would look five times as sure.
    assert blocked.high - blocked.low == pytest.approx(0.392, rel=0.25)
    assert single.high - single.low == pytest.approx(0.392 / 5, rel=0.25)


def test_html_is_read_by_paragraphs(tmp_path):
    page = tmp_path / "page.html"
    long = "word " * 20
    page.write_text(f"<html><head><title>no</title></head><body><p>{long}one<br>two &amp; three</p><pre>no</pre>"
                    f"<div class='para'>{long}<i>four</i><table><tr><td>no</td></tr></table></div><p>short</p>")
    (tmp_path / "plain.txt").write_text("as it is\n")
    found = text.read([str(page), str(tmp_path / "plain.txt")])
    assert [paragraph.split()[-1] for paragraph in found.split("\n\n")] == ["three", "four", "is"]
    assert "no" not in found.split()


def test_last_words_end_sentences_and_lines():
    passage = "He gave her the letter. It was so! A line of a file about nothing\nend of another"
    assert [passage[begin:end] for begin, end in tasks.last_words(passage)] == ["letter", "nothing", "another"]


def test_segments_cover_every_row_once_in_whole_pages():
    for rows, count in ((7168, 16), (576, 16), (65, 2), (1, 4)):
        lanes = segments(3, rows, count)
        assert [lane.begin for lane in lanes] == [0] + [lane.end for lane in lanes[:-1]]
        assert lanes[-1].end == rows and len(lanes) <= count
        assert all(lane.entry == 3 and lane.begin % 64 == 0 for lane in lanes)
    assert segments(0, 130, 2) == [Lane(0, 0, 128), Lane(0, 128, 130)]


def test_error_factors_come_back_from_their_file(tmp_path):
    path = tmp_path / "deep" / "factors.json"
    factors = np.array([[0.5, 2], [1, 1.2345]], np.float32)
    calibrate.save(path, "model", [0.05, 0.1], factors, np.full((2, 2), 7))
    np.testing.assert_allclose(calibrate.load(path), factors, rtol=1e-4)
    assert json.loads(path.read_text())["audits"] == [[7, 7], [7, 7]]
    for content in ('{"format": "adaattn-error-factors", "version": 2}', "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match="version 1"):
            calibrate.load(path)


def test_feedback_scans_in_two_stages_where_a_margin_is_given():
    one, two, quarter = (arms.parse(f"feedback=.05{rest}", 64).options for rest in ("", "/2", "/1/16"))
    assert {o.policy for o in (one, two, quarter)} == {adaattn.Policy.FEEDBACK}
    assert {o.target_relative_error for o in (one, two, quarter)} == {0.05}
    assert (one.coarse_rank, two.coarse_rank, quarter.coarse_rank) == (None, 32, 16)
    assert (two.coarse_z, quarter.coarse_z) == (2, 1)


@pytest.mark.parametrize("name", ["nonsense", "theta=x", "static=8", "int5"])
def test_unknown_arms_are_refused(name):
    with pytest.raises(ValueError):
        arms.parse(name, 64)


def test_integer_codes_err_by_half_a_step_and_keep_the_largest():
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(1))
    for code, levels in (("int8", 127), ("int4", 7)):
        step = x.abs().amax(-1, keepdim=True) / levels
        assert ((dense.round_trip(x, code) - x).abs() <= 0.5 * step * 1.002).all()
    assert dense.bytes_ratio("int8", 64) == (64 + 2) / 128
    assert dense.bytes_ratio("int4", 128) == (64 + 2) / 256
    assert (dense.round_trip(torch.zeros(1, 64), "int8") == 0).all()


def test_attend_rows_is_causal_softmax():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, rows, 64, generator=generator) for heads, rows in ((4, 5), (2, 9), (2, 9)))
    o = attend_rows(q, k, v, 0.3, chunk=2)
    for row in range(5):
        seen = 9 - 5 + row + 1
        weights = (0.3 * q[1, 3, row] @ k[1, 1, :seen].T).softmax(-1)
        torch.testing.assert_close(o[1, 3, row], weights @ v[1, 1, :seen])


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_every_prefix_of_the_nested_code_is_a_quantiser(bits):
    x = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(3))
    code, r = ladder.nested(x, 1)
    assert ((ladder.decode(code, r, bits) - x).abs() <= r / 2 ** bits + 1e-6).all()
    octaves = 4 * torch.log2(r)
    torch.testing.assert_close(octaves, octaves.round(), atol=1e-4, rtol=0)
    assert (r >= x.abs().amax(1, True) * (1 - 1e-5)).all() and (r <= x.abs().amax(1, True) * 2 ** 0.25 * 1.001).all()


@pytest.mark.parametrize("kind", ["none", "hadamard", "pca", "pca-query"])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_bases_are_rotations(kind, d):
    generator = torch.Generator().manual_seed(4)
    k, q = torch.randn(2, 300, d, generator=generator), torch.randn(2, 40, d, generator=generator)
    mean, rotation = ladder.fit_basis(kind, k, q)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, torch.eye(d).expand(2, d, d), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean[:, 0], k.mean(1))


def test_full_depth_of_the_simulation_is_nearly_exact_and_read_deeper_means_better():
    generator = torch.Generator().manual_seed(5)
    prefill = Prefill(256)
    prefill.k, prefill.v = ([torch.randn(1, 2, 256, 64, generator=generator)] for _ in range(2))
    prefill.q = [torch.randn(1, 4, 64, 64, generator=generator)]
    q, k, v = (torch.randn(1, heads, 100, 64, generator=generator) for heads in (4, 2, 2))
    errors = []
    for depth in (4, 6, 8):
        attend = ladder.LadderOverPrefill(ladder.Ladder(static=(depth, 1.0, depth)), prefill, 256)
        attend(0, q, k, v, 0.125)
        errors.append(attend.mean_error)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02
    assert math.isclose(attend.rows, 4 * 100)


def test_corrected_means_make_up_for_what_skipped_pages_share_with_attended_ones():
    generator = torch.Generator().manual_seed(6)
    prefill = Prefill(2048)
    prefill.k, prefill.v = ([torch.randn(1, 1, 2048, 64, generator=generator)] for _ in range(2))
    prefill.q = [torch.randn(1, 2, 64, 64, generator=generator)]
    sought, found = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
    for page in range(1, 31):  # tokens alike in key and value, more of them in some pages than in others
        where = torch.arange(64 * page, 64 * page + (8 if page % 5 == 0 else 1))
        prefill.k[0][0, 0, where], prefill.v[0][0, 0, where] = sought, found
    q, k, v = (torch.randn(1, heads, 20, 64, generator=generator) for heads in (2, 1, 1))
    errors = {}
    for corrects, theta in ((False, 0.05), (True, 0.05), (False, 0.0), (True, 0.0)):
        variant = ladder.Ladder(theta=theta, value_bits=(8,), corrects=corrects)
        attend = ladder.LadderOverPrefill(variant, prefill, 1024)
        attend(0, 0.1 * q + sought, k, v, 0.1)
        errors[corrects, theta] = attend.mean_error
    assert errors[True, 0.05] < 0.7 * errors[False, 0.05]
    assert errors[True, 0.0] == errors[False, 0.0]  # nothing is skipped


def test_errors_of_heads_are_the_audits():
    exact = torch.zeros(4, 2, 64)
    exact[0, :, 0], exact[1, :, 1], exact[2, :, 2] = 3, 4, 2  # q heads 0 and 1 share a kv head, 2 and 3 the next
    o = exact.clone()
    o[0, 0, 5], o[1, 0, 6] = 0.3, 0.4
    o[2, 1, 0] = 1
    kv, q = audit.errors(o, exact, 2)
    np.testing.assert_allclose(kv, [[0.5 / 5, 0], [0, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(q, [[0.1, 0], [0.1, 0], [0, 0.5], [0, 0]], rtol=1e-6)
    result = audit.result_of("budget=.2", 0.2, [[(kv, q), (kv, q)], [(0 * kv, 0 * q), (kv, q)]])
    assert result.head_steps == 2 * 2 * 4 and len(result.layers) == 2
    assert result.error == pytest.approx(3 * 0.6 / 16) and result.error_q == pytest.approx(3 * 0.7 / 32)
    assert result.above == pytest.approx(3 / 16) and result.above_q == pytest.approx(3 / 32)
    np.testing.assert_allclose(result.layers, [(0.075, 1 / 8), (0.15, 2 / 8)], rtol=1e-6)
