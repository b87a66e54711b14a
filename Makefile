# Two commands are all that a newcomer needs: make demo, make test.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
IMAGE ?=
CHECKPOINT ?= flickr8k-soft
JOBS ?= 2
# not the environment's: `clean` removes it
OUT := demo

.PHONY: demo test lint types clean

demo: $(VENV)/.demo  ## caption a photo: make demo, or make demo IMAGE=my.jpg
	@photo="$(IMAGE)"; \
	[ -n "$$photo" ] || photo=$$($(BIN)/python -c "import matplotlib.cbook as c; print(c.get_sample_data('grace_hopper.jpg', asfileobj=False))"); \
	$(BIN)/python caption.py "$$photo" --checkpoint "$(CHECKPOINT)" --overlay "$(OUT)" --words
	@echo "soft attention: CHECKPOINT=flickr8k-soft; hard attention, one cell per word and view: make demo CHECKPOINT=flickr8k-hard"

test: $(VENV)/.dev lint types  ## lint, types and every test, JOBS at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3.11 is needed ($(PYTHON) was not found; try make PYTHON=python3)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml requirements.txt
	@echo "setting up $(VENV): a few minutes when packages must be downloaded"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml requirements.txt
	@echo "setting up $(VENV): a few minutes when packages must be downloaded"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean:  ## remove what make has made
	rm -rf $(VENV) $(OUT) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build
