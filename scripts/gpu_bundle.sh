#!/usr/bin/env bash
# Packs the GPU tests and benchmarks, and the server where it was built, with every shared library
# that they need, for a GPU machine that has only the driver: build/gpu-bundle, whose run-tests runs
# them there.
#
#   scripts/gpu_bundle.sh [BUILD_DIR]      default: build/cuda, configured and built first
#
# ADAATTN_BUNDLE_DATA=0 leaves the captured traces out: run-tests then takes those of the checkout
# that the bundle lies in. ADAATTN_BUNDLE_SANITIZER=1 adds compute-sanitizer (28 MB, from PyPI), for
# `run-tests sanitize`; without it that takes the machine's own.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${1:-build/cuda}
bundle=build/gpu-bundle
targets=(adaattn_decode_bench adaattn_backend_tests adaattn_cuda_host_tests)
binaries=(loadtest/adaattn_decode_bench tests/adaattn_backend_tests tests/adaattn_cuda_host_tests)

if [ $# -eq 0 ]; then
  cmake --preset cuda -Wno-dev --log-level=WARNING
fi
if grep -q '^ADAATTN_BENCHMARKS:BOOL=ON' "$build/CMakeCache.txt"; then
  targets+=(adaattn_control_bench)
  binaries+=(loadtest/adaattn_control_bench)
fi
if grep -q '^ADAATTN_SERVER:BOOL=ON' "$build/CMakeCache.txt"; then
  targets+=(adaattn_server adaattn_cli)
  binaries+=(server/adaattn-server client/adaattn-cli)
  for name in adaattn_server_tests adaattn_client_server_tests adaattn_process_tests; do
    targets+=("$name")
    binaries+=("tests/$name")
  done
fi
if [ $# -eq 0 ]; then
  ninja -C "$build" "${targets[@]}"
fi

rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/lib"
for binary in "${binaries[@]}"; do
  install -m 755 "$build/$binary" "$bundle/bin/"
done
strip "$bundle"/bin/*

# The loader, libc and the driver belong to the machine that runs it; the rest travels.
for binary in "$bundle"/bin/*; do
  ldd "$binary"
done | awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' | sort -u |
  grep -Ev '/(ld-linux[^/]*|lib(c|m|dl|rt|pthread|cuda|nvidia-ml)\.so[^/]*)$' |
  while read -r name library; do
    install -m 644 "$(readlink -f "$library")" "$bundle/lib/$name"
  done
if compgen -G "$bundle/lib/*" >/dev/null; then strip --strip-unneeded "$bundle"/lib/*; fi
install -m 755 loadtest/{adaattn_bench,peers.py,peer_inputs.py} "$bundle/bin/"

if [ "${ADAATTN_BUNDLE_SANITIZER:-0}" != 0 ]; then
  wheels=.cache/sanitizer
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps -d "$wheels" \
    nvidia-cuda-sanitizer-api==13.0.85
  mkdir "$bundle/sanitizer"
  python3 - "$wheels" "$bundle/sanitizer" <<'PY'
import pathlib, sys, zipfile
wheels, target = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
    for name in wheel.namelist():
        path = pathlib.PurePath(name)
        # The tool looks for its libraries beside itself.
        if path.parent.name in ("bin", "lib") and path.name != "libsanitizer-public.so":
            (target / path.name).write_bytes(wheel.read(name))
(target / "compute-sanitizer").chmod(0o755)
PY
fi

if [ "${ADAATTN_BUNDLE_DATA:-1}" != 0 ]; then
  mkdir "$bundle/data"
  cp -r tests/data/. "$bundle/data"
fi

cat >"$bundle/run-tests" <<'EOF'
#!/usr/bin/env bash
# Runs every GPU test, even after one has failed, and exits non-zero when one has.
#
#   run-tests                     all of them
#   run-tests bench               and the timings too, into $OUT/decode.json
#   run-tests SUITE...            these: host, decode, backend, server, client_server, process,
#                                 estimators (their cost, bias and spread on the device)
#   run-tests sanitize [TOOL]...  small shapes under compute-sanitizer: memcheck, racecheck, synccheck
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(cd "${OUT:-.}" && pwd)
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export ADAATTN_TEST_BACKEND=cuda
export ADAATTN_TEST_SERVER="$here/bin/adaattn-server"
# Tests look for data/ where they run.
tests=$here
[ -d "$here/data" ] || tests="$here/../../tests"
cd "$tests" || exit 1
failed=()
summary=()
run() {
  local name=$1 result=passed begin=$SECONDS
  shift
  echo "=== $name"
  "$@" || { failed+=("$name") && result=FAILED; }
  summary+=("$(printf '%-14s %s in %d s' "$name" "$result" $((SECONDS - begin)))")
}
finish() {
  echo "=== summary"
  printf '%s\n' "${summary[@]}"
  if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
  fi
  echo "all passed"
}

if [ "${1:-}" = sanitize ]; then
  shift
  sanitizer="$here/sanitizer/compute-sanitizer"
  [ -x "$sanitizer" ] || sanitizer=$(command -v compute-sanitizer) || {
    echo "run-tests: no compute-sanitizer here, nor in the bundle (ADAATTN_BUNDLE_SANITIZER=1)" >&2
    exit 1
  }
  [ $# -gt 0 ] || set -- memcheck racecheck synccheck
  # Every kernel family once, few launches of each, since a tool makes them a hundred times slower:
  # dense pages of each type in one split and in many, sealing, reopening, copies, and progressive
  # decode under every policy and over several bases.
  small='SealTest.KeepsTokensToTheStoredDepth:*/PageTypeTest.*:CopyPageTest.*:ZeroPageTest.*'
  small+=':SplitLawTest.*:Fp8ScalesTest.*:*/DenseTest.*_d128_g4'
  small+=':*/ProgressiveShapeTest.*/d128_g6:ProgressiveTest.MatchesTheReferenceOverSeveralBases'
  for tool in "$@"; do
    run "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$here/bin/adaattn_backend_tests" --gtest_brief=1 --gtest_filter="$small"
  done
  finish
  exit
fi

suites=(host decode backend)
for name in server client_server process; do
  [ ! -x "$here/bin/adaattn_${name}_tests" ] || suites+=("$name")
done
if [ "${1:-}" = bench ]; then
  [ ! -x "$here/bin/adaattn_control_bench" ] || suites+=(estimators)
  set -- "${suites[@]}" bench
elif [ $# -eq 0 ]; then
  set -- "${suites[@]}"
fi
for name in "$@"; do
  case "$name" in
    host) run host "$here/bin/adaattn_cuda_host_tests" --gtest_brief=1 ;;
    decode) run decode "$here/bin/adaattn_decode_bench" --check ;;
    estimators)
      run estimators "$here/bin/adaattn_control_bench" --backend=cuda --estimators \
        --trace=data/qwen25-coder-1.5b-layer14-8k.safetensors \
        --trace=data/smollm2-135m-layer15-8k.safetensors ;;
    bench)
      run bench "$here/bin/adaattn_decode_bench" --time --steps --progressive \
        --json="$out/decode.json" ;;
    *) run "$name" "$here/bin/adaattn_${name}_tests" --gtest_brief=1 ;;
  esac
done
finish
EOF
chmod +x "$bundle/run-tests"
du -sh "$bundle"
