# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo_output

.PHONY: demo test lint docs bench clean

demo: $(STAMP)
	$(BIN)/cryolike-data demo $(DEMO)/project --overwrite
	$(BIN)/cryolike-data info $(DEMO)/project/J3/J3_particles.cs
	$(BIN)/cryolike-data info $(DEMO)/project --job 4
	$(BIN)/cryolike-data show $(DEMO)/project/J3/J3_particles.cs $(DEMO)/montage.png --box 32
	$(BIN)/cryolike-data export $(DEMO)/project/J3/J3_particles.cs $(DEMO)/particles.zarr --box 32 --overwrite
	$(BIN)/cryolike-data export $(DEMO)/project/J3/J3_particles.cs $(DEMO)/for_cryosparc --format mrc --box 32 --overwrite
	$(BIN)/cryolike-data export $(DEMO)/project --job 4 $(DEMO)/cryolike --factor 2 --batch-size 60 --group 0 --plots --overwrite
	@echo
	@echo "All of it lies in $(DEMO)/:"
	@echo "  project/         a synthetic CryoSPARC project, its truth in truth.npz"
	@echo "  montage.png      some of its particles"
	@echo "  particles.zarr   all of them at half the box, as a Zarr store"
	@echo "  for_cryosparc/   the same as MRC stacks, with particles.cs and particles.star"
	@echo "  cryolike/        one exposure group of job J4 as CryoLike stacks, with pictures in plots/"

# Two at a time: most tests leave a core idle. Those of one file stay together, as they share what it sets up.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# torch first and by itself: pinned, so that pip takes a CPU build where one is offered.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
