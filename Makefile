# Everything a fresh machine needs: Python >= 3.11, pip and make. Each target makes .venv from the pins when it is missing.
#
#   make quickstart              compare six decoders on 32 word problems (about two minutes on two cores)
#   make test                    the whole test suite on every core (JOBS=1: on one);  make test TESTS="tests/golden -k d2f" runs a part
#   make shapes                  core and golden tests with every shape annotation checked at run time
#   make check                   ruff and pyright
#   make contract PART=my_rule.MyRule      the contract tests on a class of your own
#   make figures                 draw the pictures of docs/ again
#   make clean                   remove .venv and caches; runs/ stays
#
# Another interpreter: make test PYTHON=python3.12. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are respected, for
# instance to choose a build of torch.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/quickstart.yaml
TESTS  ?=
JOBS   ?= logical
PART   ?=
ARGS   ?=

# Stamps: touched once an installation is complete, so a second run starts at once and an interrupted one starts over.
CREATED   := $(VENV)/.created
INSTALLED := $(VENV)/.installed
DEVELOP   := $(VENV)/.installed-dev
PINS      := pyproject.toml constraints.txt

.PHONY: quickstart test shapes check contract figures clean help
.DEFAULT_GOAL := help

help:
	@awk '/^#/ { sub(/^# ?/, ""); print; next } { exit }' Makefile

quickstart: $(INSTALLED)
	$(BIN)/dllm-toolkit compare $(RECIPE) $(ARGS)

# Without TESTS everything, and everything once: what is marked `shapes` under shape checks, then all the rest.
WORKERS := -n $(JOBS) --dist worksteal
ifeq ($(strip $(TESTS)),)
test: shapes
	$(BIN)/python -m pytest $(WORKERS) -m "not shapes"
else
test: $(DEVELOP)
	$(BIN)/python -m pytest $(WORKERS) $(TESTS)
endif

# In a run of its own: the checks wrap every function, which torch.compile(fullgraph=True) refuses to look through.
shapes: $(DEVELOP)
	$(BIN)/python -m pytest -q $(WORKERS) -m shapes --jaxtyping-packages=dllm_toolkit,beartype.beartype tests/golden \
	  tests/unit/test_ops_*.py tests/unit/test_state.py tests/unit/test_transformer.py tests/unit/test_corrupt.py

check: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/pyright

contract: $(DEVELOP)
	@test -n "$(PART)" || { echo "which class? Write: make contract PART=my_rule.MyRule" >&2; exit 2; }
	$(BIN)/dllm-toolkit check $(PART) $(ARGS)

figures: $(INSTALLED)
	$(BIN)/python docs/figures.py
	test ! -d benchmarks/results || $(BIN)/python docs/speed.py

$(CREATED):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "cannot find $(PYTHON). Python 3.11 or newer is needed. Install it, or write: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Write: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@touch $@

$(INSTALLED): $(CREATED) $(PINS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

# The development tools include everything else, so this installation serves both.
$(DEVELOP): $(CREATED) $(PINS)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED) $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
