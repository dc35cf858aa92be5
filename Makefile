# make demo | test | test-fast | test-full | check | fmt | docs | bench | clean: each makes .venv
# first where it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
# Processes of the tests without Ray; they leave the cores to those that start Ray.
WORKERS ?= 2
SHARED := OMP_NUM_THREADS=1 nice -n 19 $(PYTEST) -n $(WORKERS) --dist loadfile
# The other folders need not be imported.
WITH_RAY := $(PYTEST) tests/scheduling/ray tests/end_to_end tests/cluster tests/commands
FULL := --hypothesis-profile=full
SLOWEST := --durations=15  # printed, so that what slows the tests down is seen
BENCHMARKS := overhead input_pipeline ablation gpu ensemble_peers generalisation fold_race equal_time \
	controller portfolio

.PHONY: demo test test-fast test-full check fmt docs bench clean
.PHONY: lint format types tests-without-ray tests-with-ray all-without-ray all-with-ray

# Makes each target of the list, whatever becomes of the others; says how each ended.
define each
@+ends=; for part in $(1); do \
  if $(MAKE) --no-print-directory $$part; then end=passed; else end=FAILED; fi; \
  ends="$$ends$$part: $$end\n"; done; \
printf "$$ends"; ! printf "$$ends" | grep -q FAILED
endef

demo: $(STAMP)
	$(BIN)/foldrace demo

# The sweeps on Ray wait more than they compute: the rest runs beside them, in the cores' idle time.
# Each part's output comes when it ends; one that fails hides none of the others (-k).
test: $(STAMP)
	$(MAKE) --no-print-directory -k -j3 --output-sync=target tests-with-ray check \
	  tests-without-ray

# Every example of the property tests, and every sweep on real Ray.
test-full: $(STAMP)
	$(call each,check all-without-ray all-with-ray)

test-fast: $(STAMP)
	$(SHARED) -m 'not ray and not slow'

check: $(STAMP)
	$(call each,lint format types)

tests-without-ray: $(STAMP)
	$(SHARED) -m 'not ray and not full' $(SLOWEST)

tests-with-ray: $(STAMP)
	$(WITH_RAY) -m 'ray and not full' $(SLOWEST)

all-without-ray: $(STAMP)
	$(SHARED) -m 'not ray' $(FULL)

all-with-ray: $(STAMP)
	$(WITH_RAY) -m ray $(FULL)

lint: $(STAMP)
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

fmt: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables in docs/ that are made from the code.
docs: $(STAMP)
	$(BIN)/python tests/test_docs.py

bench: $(STAMP)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Foldrace needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	mkdir -p $(VENV)/checkout
	ln -sfn ../.. $(VENV)/checkout/foldrace  # for mypy, whatever the checkout's name is
	@touch $(STAMP)
