# From a fresh clone, with Python 3.11+ and make: `make repro` runs the pipeline, `make test` the tests.
PYTHON ?= python3
# cpu or gpu: which ONNX Runtime to install; they exclude each other.
ORT ?= cpu
# What `make load-test` serves.
BUNDLE ?= artifacts/bundles/reptile
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed-$(ORT)

export PATH := $(BIN):$(PATH)

.PHONY: help setup repro photos test test-slow test-versions test-images test-browser page docs lint bench load-test images lock clean

help:
	@echo "make repro      run the whole pipeline: data, training, evaluation, verified ONNX bundle"
	@echo "make photos     make a bundle that learns from photographs, on a pretrained network"
	@echo "make test       run the tests"
	@echo "make test-slow  run the long ones too (whole pipelines from fresh clones)"
	@echo "make test-versions  try the oldest and the newest onnxruntime (from the package index)"
	@echo "make page       fetch onnxruntime-web, so that the page can learn in the browser too (npm)"
	@echo "make test-browser  try the page in Chromium, and the JavaScript examples in Node (npm)"
	@echo "make docs       build the site of the documentation: guides, topics, reference"
	@echo "make lint       run ruff and mypy"
	@echo "make bench      time everything beside its baseline (ROWS='overhead tasks' for some of it)"
	@echo "make load-test  serve a bundle to many clients, beside ONNX Runtime in a loop (BUNDLE=artifacts/bundles/reptile)"
	@echo "make images     build the container images (deploy/build-image --help); make test-images tries it"
	@echo "make lock       pin what is in the images, with hashes, to the versions of constraints.txt"
	@echo "make clean      remove the environment and all artifacts"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"error: Python {v[0]}.{v[1]} is too old, 3.11 is needed: make PYTHON=python3.11")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(ORT),serve,train,dvc,kubeflow,dev,docs]'
	touch $@

repro: setup
	dvc pull --quiet --remote starter data.dvc
	dvc repro
	@python -m reptile show

# Of a folder of class folders: make photos PHOTOS=FOLDER
PHOTOS ?= photographs

photos: setup
	pip install --quiet --constraint constraints.txt --editable '.[$(ORT),photos]'
	for stage in prepare train evaluate export verify; do \
		python -m reptile $$stage --preset photos --artifacts artifacts/photos \
			-S prepare.source=$(PHOTOS) || exit; \
	done

# A file's tests share fixtures, so each file stays in one process.
test: setup
	pytest --numprocesses auto --dist loadfile \
		-m "not slow and not versions and not browser and not alone"
	pytest -m "alone and not slow" tests/serve

test-slow: setup
	pytest -m "not versions and not browser"

# In environments of their own, from the package index.
test-versions: setup
	pytest -m versions

NPM := npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
WEB := ort.wasm.bundle.min.mjs ort-wasm-simd-threaded.wasm

# npm's package comes without its licence; the Python package is built from the same sources.
page: setup
	$(NPM)
	rm -rf reptile/serve/ort && mkdir reptile/serve/ort
	cp $(addprefix node_modules/onnxruntime-web/dist/,$(WEB)) reptile/serve/ort/
	ort=$$(python -c 'import onnxruntime; print(*onnxruntime.__path__)') && \
		cp "$$ort/LICENSE" "$$ort/ThirdPartyNotices.txt" reptile/serve/ort/

test-browser: page
	cd clients/node && $(NPM)
	pytest -m browser

docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "the site is in artifacts/site: open artifacts/site/index.html"

lint: setup
	ruff format --check .
	ruff check .
	mypy

bench: setup
	python -m benchmarks $(ROWS)

load-test: setup
	python -m benchmarks.serving $(BUNDLE)

images:
	@deploy/build-image

test-images: setup
	pytest -m images

# The existing locks' hashes are taken over, so this is quick unless much has changed.
lock:
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet --upgrade pip pip-tools
	for lock in build train-cpu train-gpu serve-cpu serve-gpu; do \
		ort=$${lock#*-}; \
		case $$lock in \
			build) set -- requirements/build.in ;; \
			train-*) set -- --constraint constraints.txt --extra $$ort,train,dvc,kubeflow pyproject.toml ;; \
			serve-*) set -- --constraint constraints.txt --extra $$ort,serve pyproject.toml ;; \
		esac; \
		CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/lock/bin/pip-compile --quiet --generate-hashes \
			--no-emit-index-url --no-emit-find-links --strip-extras --allow-unsafe \
			--output-file requirements/$$lock.txt "$$@" || exit; \
	done
	rm -rf $(VENV)/lock

clean:
	rm -rf $(VENV) artifacts
