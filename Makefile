# setup: the environment in .venv    run: the whole recipe, profile tiny    test, test-triton, lint, bench, clean
# Everything is made below this folder; nothing outside it is changed.

PYTHON := $(shell for p in python3.11 python3.12; do \
	"$$p" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)
BIN := .venv/bin
# Where this is set, every process compiles torch and all other modules again: five seconds each, and there are dozens.
export PYTHONDONTWRITEBYTECODE :=
STAMP := .venv/setup.stamp
# An environment knows the folder it was made in: in a copied or moved checkout its commands are those of the old one.
ELSEWHERE := $(shell test -e .venv/bin/m1 && ! head -n 2 .venv/bin/m1 | grep -qF "$(CURDIR)/.venv/bin/python" && echo yes)
ifeq ($(ELSEWHERE),yes)
.PHONY: $(STAMP)
endif

.PHONY: setup run test test-triton lint bench clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3.12 with the venv module found. Install one (Debian: python3.11-venv), then run make again." >&2; exit 1; }
	@test -z "$(ELSEWHERE)" || { echo "making .venv anew: it is that of another folder"; rm -rf .venv; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	UV_FIND_LINKS="$$($(BIN)/python infra/find_links.py)" $(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

run: $(STAMP)
	@$(BIN)/m1 run --profile tiny

test: $(STAMP)
	@$(BIN)/python -m pytest

# The Triton kernel under Triton's interpreter. The package (700 MB) stays out of .venv, where nothing else uses it.
test-triton: $(STAMP)
	@test -d .triton/triton || $(BIN)/python -m pip install --quiet --disable-pip-version-check --target .triton --no-deps triton==3.7.1
	@PYTHONPATH=.triton $(BIN)/python -m pytest tests/kernels/test_lightning_triton.py

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

bench: $(STAMP)
	@$(BIN)/python -m kernels.bench

# Stops the services and removes all that runs have made; .venv stays.
clean:
	@if test -x $(BIN)/m1; then $(BIN)/m1 down; fi
	rm -rf .m1 .triton runs data build .pytest_cache .hypothesis .mypy_cache .ruff_cache
