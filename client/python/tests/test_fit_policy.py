"""The offline fit of the learned policy: features, regression, files."""
import json
import pathlib
import re
import struct

import numpy as np
import pytest

from adaattn import fit_policy

ROOT = pathlib.Path(__file__).resolve().parents[3]
TRACE = ROOT / "tests/data/smollm2-135m-layer15-8k.safetensors"


def write_trace(path, arrays, scale="0.125"):
    names = {"float16": "F16", "float32": "F32", "int32": "I32"}
    header, data = {"__metadata__": {"softmax_scale": scale}}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def small_trace(path, tokens=512, rows=4, **changes):
    random = np.random.default_rng(5)
    k, v = (random.standard_normal((1, tokens, 64)).astype(np.float16) for _ in range(2))
    q = random.standard_normal((2, rows, 64)).astype(np.float16)
    positions = np.linspace(200, tokens - 1, rows).astype(np.int32)
    out = np.zeros((2, rows, 64), np.float32)
    for row, position in enumerate(positions):
        scores = 0.125 * q[:, row].astype(np.float64) @ k[0, :position + 1].astype(np.float64).T
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, row] = weights / weights.sum(1, keepdims=True) @ v[0, :position + 1].astype(np.float64)
    arrays = {"q": q, "k": k, "v": v, "expected_o": out, "positions": positions}
    return write_trace(path, {**arrays, **changes})


def test_features_are_those_of_the_server():
    header = (ROOT / "kernels/policy/theta.h").read_text()
    names = re.search(r"kThetaFeatureNames\[kNumThetaFeatures\] = \{(.*?)\}", header, re.S)
    assert re.findall(r'"(\w+)"', names[1]) == fit_policy.FEATURES


def test_theta_near_zero_leaves_the_error_of_eight_bits(tmp_path):
    trace = fit_policy.load_trace(small_trace(tmp_path / "t"))
    step = fit_policy.Step(fit_policy.SealedHead(trace, 0), 3, 512)
    errors = [step.error(theta) for theta in (1e-9, 1e-3, 0.25)]
    assert errors[0] < 0.02 < errors[2]
    assert errors[0] <= errors[1] <= errors[2]


def test_flat_attention_has_the_entropy_of_its_pages(tmp_path):
    q = np.zeros((2, 4, 64), np.float16)
    trace = fit_policy.load_trace(small_trace(tmp_path / "t", q=q))
    features = fit_policy.Step(fit_policy.SealedHead(trace, 0), 3, 512).features()
    named = dict(zip(fit_policy.FEATURES, features))
    assert named["entropy"] == pytest.approx(np.log(8), abs=1e-3)  # seven sealed pages, one dense
    assert named["log_pages"] == pytest.approx(np.log2(7))
    assert named["log_sealed"] == pytest.approx(np.log2(7 / 8), abs=1e-3)
    assert named["log_token_square"] == pytest.approx(np.log2(7 / 64 / 64), abs=1e-2)


def test_regression_finds_the_quantile():
    random = np.random.default_rng(3)
    features = np.ones((4000, len(fit_policy.FEATURES)))
    features[:, 2:] = random.standard_normal((4000, 6))
    # Errors grow as theta; the largest theta that fits is spread over four octaves.
    scatter = random.uniform(-2, 2, (4000, 1))
    errors = fit_policy.THETAS[None] * 2.0 ** scatter
    samples = fit_policy.Samples("made", features, errors)
    weights = fit_policy.fit([samples], quantile=0.25)
    for target in fit_policy.TARGETS:
        _, above = fit_policy.evaluate(weights, samples, target)
        assert above == pytest.approx(0.25, abs=0.12)  # half an octave of the grid is an eighth
    assert weights[1] == pytest.approx(1, abs=0.2), "theta follows the target"


def test_writes_a_file_for_a_real_trace(tmp_path, capsys):
    output = tmp_path / "policy.json"
    assert fit_policy.main(["-o", str(output), str(TRACE)]) == 0
    policy = json.loads(output.read_text())
    assert (policy["format"], policy["version"]) == ("adaattn-policy", fit_policy.VERSION)
    assert policy["features"] == fit_policy.FEATURES
    assert len(policy["weights"]) == 8 and np.isfinite(policy["weights"]).all()
    assert policy["weights"][1] > 0.5, "a wider target gives a larger theta"
    assert policy["fitted_on"] == {TRACE.stem: 192}
    assert "above" in capsys.readouterr().err


@pytest.mark.parametrize("spoil, message", [
    (lambda path: path.write_bytes(b"\x10"), "not a trace"),
    (lambda path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "not a trace"),
    (lambda path: small_trace(path, v=np.zeros((1, 100, 64), np.float16)), "do not go together"),
    (lambda path: small_trace(path, q=np.full((2, 4, 64), np.nan, np.float16)), "NaN"),
    (lambda path: small_trace(path, positions=np.full(4, 100, np.int32)), "no row sees"),
])
def test_refuses_what_is_no_trace(tmp_path, capsys, spoil, message):
    path = tmp_path / "trace"
    spoil(path)
    assert fit_policy.main([str(path)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fit_policy.main([str(path), "--quantile", "2"])
