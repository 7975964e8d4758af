#!/usr/bin/env bash
# Packs the GPU tests and benchmarks, and the server where it was built, with every shared library
# that they need, for a GPU machine that has only the driver: build/gpu-bundle, whose run-tests runs
# them there.
#
#   scripts/gpu_bundle.sh [BUILD_DIR]      default: build/cuda, configured and built first
#
# ADAATTN_BUNDLE_DATA=0 leaves the captured traces out: run-tests then takes those of the checkout
# that the bundle lies in.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${1:-build/cuda}
bundle=build/gpu-bundle
targets=(adaattn_decode_bench adaattn_backend_tests adaattn_cuda_host_tests)
binaries=(loadtest/adaattn_decode_bench tests/adaattn_backend_tests tests/adaattn_cuda_host_tests)

if [ $# -eq 0 ]; then
  cmake --preset cuda -Wno-dev --log-level=WARNING
fi
if grep -q '^ADAATTN_SERVER:BOOL=ON' "$build/CMakeCache.txt"; then
  targets+=(adaattn_server adaattn_cli adaattn_server_tests)
  binaries+=(server/adaattn-server client/adaattn-cli tests/adaattn_server_tests)
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

if [ "${ADAATTN_BUNDLE_DATA:-1}" != 0 ]; then
  mkdir "$bundle/data"
  cp -r tests/data/. "$bundle/data"
fi

cat >"$bundle/run-tests" <<'EOF'
#!/usr/bin/env bash
# Runs every GPU test, even after one has failed, and exits non-zero when one has.
#
#   run-tests [bench]     bench: the timings too, into $OUT/decode.json
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(cd "${OUT:-.}" && pwd)
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export ADAATTN_TEST_BACKEND=cuda
# Tests look for data/ where they run.
if [ -d "$here/data" ]; then cd "$here"; else cd "$here/../../tests" || exit 1; fi
failed=()
run() {
  local name=$1
  shift
  echo "=== $name"
  "$@" || failed+=("$name")
}
run host "$here/bin/adaattn_cuda_host_tests" --gtest_brief=1
run decode "$here/bin/adaattn_decode_bench" --check
run backend "$here/bin/adaattn_backend_tests" --gtest_brief=1
if [ -x "$here/bin/adaattn_server_tests" ]; then
  run server "$here/bin/adaattn_server_tests" --gtest_brief=1
fi
if [ "${1:-}" = bench ]; then
  run bench "$here/bin/adaattn_decode_bench" --time --steps --json="$out/decode.json"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
EOF
chmod +x "$bundle/run-tests"
du -sh "$bundle"
