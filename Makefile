# The two commands are `make demo` and `make test`; both install what is missing on Debian and Ubuntu.
# `make help` lists the rest.
JOBS ?= $(shell nproc)
TEST_JOBS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve test test-python quality ablation bound-check bench test-asan test-tsan cuda lint \
        format format-check docs-check gpu-bundle setup setup-check clean e2e manifests image

help:  ## Lists these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup build/release/build.ninja  ## Replays real model traces through a server and prints what was saved
	@ninja -C build/release -j$(JOBS) adaattn_server adaattn_cli
	@scripts/demo build/release

serve: setup build/release/build.ninja  ## Runs a server in the foreground
	@ninja -C build/release -j$(JOBS) adaattn_server
	@scripts/serve build/release

test: setup build/release/build.ninja  ## Builds everything and runs every test
	@ninja -C build/release -j$(JOBS)
	@ctest --preset release -j$(TEST_JOBS)

test-asan: setup-check build/asan/build.ninja  ## Every test under the address and undefined behaviour sanitizers (clang)
	@ninja -C build/asan -j$(JOBS)
	@ctest --preset asan -j$(TEST_JOBS)

test-tsan: setup-check build/tsan/build.ninja  ## The tests of the gRPC-free core under the thread sanitizer (clang)
	@ninja -C build/tsan -j$(JOBS)
	@ctest --preset tsan -j$(TEST_JOBS)

test-python: setup build/release/build.ninja  ## The tests of the Python client, against a server
	@scripts/python client/python
	@ninja -C build/release -j$(JOBS) adaattn_server
	@.venv/bin/python -m pytest -q client/python/tests

quality: setup build/release/build.ninja  ## A whole model over the server: perplexity, KL, retrieval (short; docs/quality.md has the long form)
	@scripts/setup quality
	@scripts/python client/python loadtest/quality
	@ninja -C build/release -j$(JOBS) adaattn_server
	@.venv/bin/python -m pytest -q loadtest/quality/tests
	@scripts/quality calibrate --tokens 2048 --skip 16384 --out build/quality/error-factors.json '{text}'
	@scripts/quality --report build/quality/perplexity.json --error-factors build/quality/error-factors.json \
	    perplexity --tokens 2048 \
	    --arms bf16,fp8,int8,int4,theta=.002,theta=.004,two-stage=.002,two-stage=.004,budget=.05,audited=.05 '{text}'
	@scripts/quality --report build/quality/retrieval.json retrieval --contexts 2 --tokens 1536 '{text}'

ablation: setup build/release/build.ninja  ## What each part of the design is worth, as a report with plots: build/ablation
	@scripts/setup quality
	@scripts/python client/python loadtest/quality
	@ninja -C build/release -j$(JOBS) adaattn_server adaattn_control_bench
	@scripts/quality --report build/ablation/report.json --policy-file tests/data/policy.json ablation \
	    --control-bench build/release/loadtest/adaattn_control_bench '{text}'

e2e: setup build/release/build.ninja  ## A server under load, watched by a real Prometheus and a real browser
	@scripts/setup e2e
	@command -v chromium >/dev/null || scripts/setup chromium
	@scripts/python deploy
	@ninja -C build/release -j$(JOBS) adaattn_server adaattn_cli
	@.venv/bin/python -m pytest -q deploy/e2e

manifests: setup build/release/build.ninja  ## Checks rules, alerts, dashboards and Kubernetes manifests
	@scripts/setup manifests
	@command -v kubectl >/dev/null || scripts/setup kubectl
	@scripts/python deploy
	@ninja -C build/release -j$(JOBS) adaattn_server
	@deploy/check

image:  ## Builds the CPU container without a daemon and replays a trace through it (as root)
	@scripts/setup image
	@deploy/image

bound-check: setup build/release/build.ninja  ## Error bounds against float64 on a million random head-steps and all captured ones: minutes
	@ninja -C build/release -j$(JOBS) adaattn_backend_tests
	@cd tests && ADAATTN_BOUND_HEAD_STEPS=1000000 ../build/release/tests/adaattn_backend_tests --gtest_filter='BoundTest.*'

bench: setup build/release/build.ninja  ## Times the kernels, judges control, a small Attend beside a bare gRPC echo
	@ninja -C build/release -j$(JOBS) adaattn_cpu_decode_bench adaattn_control_bench adaattn_echo_bench adaattn_server
	@build/release/loadtest/adaattn_cpu_decode_bench
	@build/release/loadtest/adaattn_control_bench
	@build/release/loadtest/adaattn-echo-bench --server=build/release/server/adaattn-server

cuda: setup build/cuda/build.ninja  ## Compiles the CUDA backend and tests its host side (needs nvcc, no GPU)
	@ninja -C build/cuda -j$(JOBS) adaattn_kernels adaattn_decode_bench adaattn_control_bench adaattn_backend_tests \
	    adaattn_cuda_host_tests
	@cd tests && ../build/cuda/tests/adaattn_cuda_host_tests --gtest_brief=1

lint: setup-check build/release/build.ninja  ## clang-tidy over every source; findings are errors
	@ninja -C build/release -j$(JOBS) adaattn_proto
	@scripts/lint

format: setup-check  ## Formats every source
	@scripts/format

format-check: setup-check  ## Fails when `make format` would change a file
	@scripts/format --check

docs-check: setup  ## Fails when a document names a file, target or flag that does not exist
	@scripts/docs_check

gpu-bundle: setup  ## Packs what a GPU machine without this build environment needs to run the CUDA tests
	@scripts/gpu_bundle.sh

clean:  ## Removes build outputs
	rm -rf build

setup:
	@scripts/setup build

setup-check:
	@scripts/setup build check

# CMake runs again by itself when its inputs change.
build/%/build.ninja: | setup
	@mkdir -p build
	@cmake --preset $* -Wno-dev >build/$*.configure.log 2>&1 || { cat build/$*.configure.log; exit 1; }
