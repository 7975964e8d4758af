#!/usr/bin/env bash
# Packs the GPU tests and benchmarks with every shared library that they need, for a GPU machine
# that has only the driver: build/gpu-bundle, whose run-tests runs them there.
#
#   scripts/gpu_bundle.sh [BUILD_DIR]      default: build/cuda, configured and built first
set -euo pipefail
cd "$(dirname "$0")/.."

build=${1:-build/cuda}
bundle=build/gpu-bundle
binaries=(loadtest/adaattn_decode_bench)

if [ $# -eq 0 ]; then
  cmake --preset cuda -Wno-dev --log-level=WARNING
  ninja -C "$build" adaattn_decode_bench
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
done | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
  grep -Ev '/(ld-linux[^/]*|lib(c|m|dl|rt|pthread|cuda|nvidia-ml)\.so[^/]*)$' |
  while read -r library; do
    install -m 644 "$(readlink -f "$library")" "$bundle/lib/$(basename "$library")"
  done
if compgen -G "$bundle/lib/*" >/dev/null; then strip --strip-unneeded "$bundle"/lib/*; fi

cat >"$bundle/run-tests" <<'EOF'
#!/usr/bin/env bash
# Runs the GPU tests; with `bench`, the timings too. Exits non-zero when one fails.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
"$here/bin/adaattn_decode_bench" --check
if [ "${1:-}" = bench ]; then
  "$here/bin/adaattn_decode_bench" --time --json="${OUT:-.}/decode.json"
fi
EOF
chmod +x "$bundle/run-tests"
du -sh "$bundle"
