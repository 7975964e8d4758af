#!/usr/bin/env bash
# Packs the GPU tests and benchmarks, and the server where it was built, with every shared library
# that they need, for a GPU machine that has only the driver: build/gpu-bundle, whose run-tests runs
# them there.
#
#   scripts/gpu_bundle.sh [BUILD_DIR]      default: build/cuda, configured and built first
#
# ADAATTN_BUNDLE_DATA=0 leaves the captured traces out: run-tests then takes those of the checkout
# that the bundle lies in. ADAATTN_BUNDLE_SANITIZER=1 adds compute-sanitizer (30 MB, from PyPI) of the
# toolkit's version, ADAATTN_BUNDLE_SANITIZER=13.5.25 that one, for `run-tests sanitize`; without it
# that takes the machine's own.
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

sanitizer=${ADAATTN_BUNDLE_SANITIZER:-0}
if [ "$sanitizer" != 0 ]; then
  [ "$sanitizer" != 1 ] || sanitizer=13.0.85
  wheels=.cache/sanitizer
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps -d "$wheels" \
    "nvidia-cuda-sanitizer-api==$sanitizer"
  mkdir "$bundle/sanitizer"
  python3 - "$wheels/nvidia_cuda_sanitizer_api-$sanitizer-"*.whl "$bundle/sanitizer" <<'PY'
import pathlib, sys, zipfile
target = pathlib.Path(sys.argv[2])
with zipfile.ZipFile(sys.argv[1]) as wheel:
    # The tool looks for its libraries beside itself. Newer wheels have all of it in a folder of its
    # name, and a script in bin/.
    folders = {"compute-sanitizer"}
    if not any(pathlib.PurePath(name).parent.name in folders for name in wheel.namelist()):
        folders = {"bin", "lib"}
    for name in wheel.namelist():
        path = pathlib.PurePath(name)
        if path.parent.name in folders and path.name != "libsanitizer-public.so":
            (target / path.name).write_bytes(wheel.read(name))
            (target / path.name).chmod(0o755)
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
#   run-tests SUITE...            these: host, decode, backend (twice: few heads' steps end with one
#                                 launch, then they do not), server, client_server, process,
#                                 estimators (their cost, bias and spread on the device)
#   run-tests sanitize [WHAT]...  small shapes under compute-sanitizer; WHAT: tools (memcheck,
#                                 racecheck, synccheck; all if none) and parts (dense, pages,
#                                 progressive, progressive_d256, conclude, conclude_slots,
#                                 bounded, estimators; all if none)
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
  summary+=("$(printf '%-24s %s in %d s' "$name" "$result" $((SECONDS - begin)))")
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
  # The tools do not look for it, and it makes their work more than twice as long.
  export ADAATTN_TEST_POISON_SCRATCH=0
  # Every kernel family once, few launches of each, since a tool makes them a hundred times slower.
  declare -A filters=(
    # Pages of each type, in one split and in many.
    [dense]='*/DenseTest.*_d128_g4:SplitLawTest.*:Fp8ScalesTest.*'
    # Sealing, reopening, copies.
    [pages]='SealTest.KeepsTokensToTheStoredDepth:*/PageTypeTest.*:CopyPageTest.*:ZeroPageTest.*'
    # Every policy where two warps share a page of attend, and four; head_dim 64 over several bases.
    [progressive]='*/ProgressiveShapeTest.*/d128_g6:ProgressiveTest.MatchesTheReferenceOverSeveralBases'
    [progressive_d256]='*/ProgressiveShapeTest.*/d256_g3'
    # Steps that end with one launch, where a warp has its pages to itself, and where several share
    # them.
    [conclude]='*/ProgressiveShapeTest.*/d64_g3:ProgressiveTest.MatchesTheReferenceOverSeveralBases'
    [conclude_slots]='*/ProgressiveShapeTest.*/d128_g6:*/ProgressiveShapeTest.*/d256_g3'
    [bounded]='BoundTest.OriginalsMakeItHold'
    [estimators]='*/EstimatorTest.RanksOfPages*/device:*/EstimatorTest.Finds*/device:*/EstimatorTest.Degenerate*/device:*/EstimatorTest.Entropies*/device'
  )
  tools=()
  parts=()
  for what in "$@"; do
    case "$what" in
      memcheck | racecheck | synccheck) tools+=("$what") ;;
      *)
        if [ -z "${filters[$what]:-}" ]; then
          echo "run-tests: sanitize $what: neither a tool nor a part" >&2
          exit 2
        fi
        parts+=("$what") ;;
    esac
  done
  [ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck)
  [ ${#parts[@]} -gt 0 ] || parts=(dense pages progressive progressive_d256 conclude conclude_slots bounded estimators)
  for tool in "${tools[@]}"; do
    options=(--tool "$tool" --error-exitcode 9)
    # The tools track as many mbarriers of a CTA as the compiler counts initialisations, which is one
    # for a whole array of them; what is beyond they take for no synchronisation. Attend has 64 a CTA.
    [ "$tool" = memcheck ] || options+=(--num-cuda-barriers 8192)
    for part in "${parts[@]}"; do
      binary=adaattn_backend_tests
      [ "$part" != estimators ] || binary=adaattn_cuda_host_tests
      conclude=()
      [[ "$part" != progressive* ]] || conclude=(env ADAATTN_TEST_CONCLUDE_PAGES=0)
      # To it no barrier of a whole CTA orders anything once some warps have met on their own, as
      # those of a slot do (docs/kernels.md).
      [ "$tool $part" != "racecheck conclude_slots" ] || continue
      run "$tool $part" ${conclude[@]+"${conclude[@]}"} "$sanitizer" "${options[@]}" \
        "$here/bin/$binary" --gtest_brief=1 --gtest_filter="${filters[$part]}"
    done
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
    backend)
      run backend "$here/bin/adaattn_backend_tests" --gtest_brief=1
      ADAATTN_TEST_CONCLUDE_PAGES=0 \
        run "backend, launch by launch" "$here/bin/adaattn_backend_tests" --gtest_brief=1 ;;
    decode) run decode "$here/bin/adaattn_decode_bench" --check ;;
    estimators)
      run estimators "$here/bin/adaattn_control_bench" --backend=cuda --estimators \
        --trace=data/qwen25-coder-1.5b-layer14-8k.safetensors \
        --trace=data/smollm2-135m-layer15-8k.safetensors ;;
    bench)
      run bench "$here/bin/adaattn_decode_bench" --time --steps --progressive \
        --bounded --host-pages --json="$out/decode.json" ;;
    *) run "$name" "$here/bin/adaattn_${name}_tests" --gtest_brief=1 ;;
  esac
done
finish
EOF
chmod +x "$bundle/run-tests"
du -sh "$bundle"
