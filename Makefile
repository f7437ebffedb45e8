# Everything is set up by the target that needs it: `make run` and `make test` work in a fresh clone.

VENV := .venv
BIN := $(VENV)/bin
PROTOS := protos/assistant.proto
GENERATED := gateway_app/rpc
# Options of pip that keep a build log readable.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
# A database test needs no engine, no platform and no browser; those run once, on SQLite.
DATABASE_TESTS := tests/models tests/gateway -m "not engine and not platform and not browser"

.DEFAULT_GOAL := help
.PHONY: help run test test-sqlite test-postgres lint format bench protos clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 22

run: $(VENV)/installed ## run the whole platform on this machine; Ctrl-C stops it
	@exec $(BIN)/python manage.py up

test: test-sqlite test-postgres ## run the whole test suite

test-sqlite: $(VENV)/installed-dev
	$(BIN)/pytest -q

test-postgres: $(VENV)/installed-dev
	$(BIN)/python -m tests.postgres $(BIN)/pytest -q $(DATABASE_TESTS)

lint: $(VENV)/installed-dev ## check style, types, imports and migrations
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(in_empty_home) $(BIN)/mypy .
	$(BIN)/lint-imports
	$(in_empty_home) $(BIN)/python manage.py makemigrations --check --dry-run

format: $(VENV)/installed-dev ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev ## measure the gateway against a stand-in upstream
	$(BIN)/python -m tests.bench

protos: $(VENV)/installed-dev ## generate gateway_app/rpc/*_pb2* from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(GENERATED) --pyi_out=$(GENERATED) --grpc_python_out=$(GENERATED) $(PROTOS)

clean: ## remove the virtual environment and caches; var/ (your data) stays
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A home that is gone afterwards: settings make secrets in it.
define in_empty_home
@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && ASSISTANT_HOME="$$home"
endef

# The first Python that is new enough and can make virtual environments; $PYTHON is asked first.
define make_venv
@for python in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then lacking="$$lacking $$python"; continue; fi; \
	echo "Making a virtual environment with $$("$$python" --version) ..."; \
	exec "$$python" -m venv --clear $(VENV); \
done; \
if [ -n "$$lacking" ]; then \
	echo "$$lacking: venv or ensurepip is missing. Install it (Debian: apt install python3-venv), then run make again." >&2; \
else \
	echo "Python 3.11 or newer is needed and was not found. Install it, or name it: make run PYTHON=/path/to/python" >&2; \
fi; exit 1
endef

$(BIN)/python:
	$(make_venv)

$(VENV)/installed: requirements.txt | $(BIN)/python
	@echo "Installing what Assistant needs (this happens once) ..."
	@$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(BIN)/python
	@echo "Installing what the tests and linters need (this happens once) ..."
	@$(PIP) install -r requirements-dev.txt
	@touch $@ $(VENV)/installed
