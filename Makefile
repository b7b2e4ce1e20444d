# One verb per chore; CI runs the same ones. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
DATA ?=

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-gpu quality lint format generate generate-check dist dist-check lock audit soak fuzz clean

help:  ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamps depend on what was asked for, so that a second run installs nothing.
$(VENV)/.installed: pyproject.toml clients/python/pyproject.toml proto/python/pyproject.toml
	@test -x $(PY) || { \
	  python=$$(command -v $(PYTHON) || command -v python3) && \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: install it, or name it with PYTHON=..." >&2; exit 1; }; \
	  $$python -m venv $(VENV); }
	@test -e $@ && echo "Updating $(VENV)" || echo "Installing into $(VENV): about 6.5 GB, some minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e proto/python -e "clients/python[cli]" -e ".[demo,openvino]"
	@$(PY) -m trainer prepare
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e proto/python -e "clients/python[cli]" -e ".[dev,openvino]"
	touch $@

# Its own, since it pins an older protobuf than ours.
$(VENV)/triton/.installed: $(VENV)/.installed
	$(PY) -m venv $(VENV)/triton
	$(VENV)/triton/bin/python -m pip install --quiet --disable-pip-version-check "tritonclient[grpc]"
	touch $@

# Where there is no npm, or no registry, the test of the client in Node says so.
NODE := clients/node/node_modules/.package-lock.json
$(NODE): clients/node/package-lock.json
	if command -v npm > /dev/null; then npm ci --prefix clients/node --no-audit --no-fund --silent && touch $@ || true; fi

demo: $(VENV)/.installed  ## Fine-tune and serve on sample images, left in demo/ (DATA=folder for your own)
	@$(PY) clients/demo.py $(if $(DATA),--data $(DATA))

# Three files of tests at a time, the longest first: they often wait for processes.
# Lint and types are checked beside them, and what they find is the last that is printed; before
# that what servers of tests would export, each for itself, where the sources have changed.
WORKERS ?= 3
test: $(VENV)/.installed-dev $(VENV)/triton/.installed $(NODE)  ## Lint, type-check and run every test
	@{ $(PY) -m trainer prepare && $(MAKE) --no-print-directory lint generate-check; } \
	  >$(VENV)/lint.txt 2>&1 & lint=$$!; \
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$lint; lint=$$?; cat $(VENV)/lint.txt; test $$tests = 0 && test $$lint = 0

bench: $(VENV)/.installed-dev  ## Measure serving, half an hour (SHORT=1: 9 minutes; DATA=folder for your own photos)
	$(PY) -m bench $(DATA) $(if $(SHORT),--short)

bench-gpu: $(VENV)/.installed-dev  ## Check a GPU against the CPU and measure it (DATA=folder of your own photos)
	$(PY) -m bench.gpu $(DATA)

# Some 45 minutes of processor time. What it computes features of is kept in .quality/: the first run
# takes a quarter of an hour more.
quality: $(VENV)/.installed-dev  ## Measure accuracy, and whether reports are true (DATA=folder of data sets)
	$(PY) -m bench.quality $(DATA)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev  ## Let ruff fix what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

GENERATORS := proto.generate clients.generate_sync docs.generate deploy.generate_rules
generate: $(VENV)/.installed-dev  ## Generate stubs, blocking client, docs/reference/ and Kubernetes' alerts
	for one in $(GENERATORS); do $(PY) -m $$one || exit; done

generate-check: $(VENV)/.installed-dev  ## Fail when what is generated is stale
	stale=0; for one in $(GENERATORS); do $(PY) -m $$one --check || stale=1; done; exit $$stale

# Sources first, then wheels out of these, so that nothing is taken from the folder by chance.
dist: $(VENV)/.installed-dev  ## Build what is installed with pip: wheels and sources, in dist/
	rm -rf dist build
	for project in proto/python clients/python .; do \
	  $(PY) -m build --no-isolation --outdir dist $$project || exit; done

PYTHONS ?=
dist-check: dist  ## Install the wheels elsewhere and try them (PYTHONS="python3.13 ...": network)
	$(PY) deploy/try_wheels.py dist $(PYTHONS)

$(VENV)/.installed-audit: $(VENV)/.installed-dev
	$(PY) -m pip install --quiet --disable-pip-version-check -e proto/python -e clients/python -e ".[audit]"
	touch $@

lock: $(VENV)/.installed-audit  ## Lock the image to the versions that are installed here (network)
	PATH="$(VENV)/bin:$$PATH" $(PY) deploy/lock.py

# Not a part of `make test`: what is known of packages is known on the network, and ruff's S
# rules are bandit's. Both run whatever the first one finds.
audit: $(VENV)/.installed-audit  ## Look for unsafe code and for known vulnerabilities (network)
	$(VENV)/bin/bandit -q -r -c pyproject.toml service trainer clients deploy \
	  && $(VENV)/bin/bandit -q -r -ll -c pyproject.toml bench; \
	  found=$$?; $(PY) deploy/audit.py && exit $$found

MINUTES ?= 30
soak: $(VENV)/.installed-dev  ## Everything at once for MINUTES=30, with kills (DATA=folder of photos)
	$(PY) -m bench.soak $(DATA) --minutes $(MINUTES)

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(PY) -m pip install --quiet --disable-pip-version-check -e proto/python -e clients/python -e ".[fuzz]"
	touch $@

RUNS ?= 100000
fuzz: $(VENV)/.installed-fuzz  ## Feed what strangers send RUNS=100000 inputs each (TARGETS="images ...")
	$(PY) -m tests.fuzz --runs $(RUNS) $(TARGETS)

clean:  ## Remove .venv, caches and demo/ with the models in demo/data
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
