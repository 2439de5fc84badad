# make test          sets up .venv and runs the quick tests (SLOW=1: all of them)
# make demo          a real fine-tune of the embedded base, in about a minute and a half: open impasto-demo/report.html
# make check         ruff and pyright
# TORCH_INDEX_URL    an index that serves another build of torch (CUDA, ROCm, CPU)

PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
BIN    := $(VENV)/Scripts
else
BIN    := $(VENV)/bin
endif
READY  := $(VENV)/.ready

.PHONY: test demo check clean

test: $(READY) check
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 $(if $(SLOW),,-m "not slow") $(PYTEST_ARGS)

demo: $(READY)
	$(BIN)/impasto demo --force

check: $(READY)
	$(BIN)/ruff check --no-cache
	$(BIN)/pyright

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Impasto needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'open("$(READY)", "w").close()'

clean:
	rm -rf $(VENV) build dist *.egg-info
