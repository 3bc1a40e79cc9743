# make demo: the main job, end to end.   make test: what CI runs.   make test-full: with the slow proofs.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
OUT ?= output/demo

.PHONY: demo test test-full lint goldens clean

$(VENV)/.base: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PY) -m pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

demo: $(VENV)/.base
	$(PY) -m rcm_jax.demo --out $(OUT) $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

goldens: $(VENV)/.test
	$(PY) -m tests.golden tests/goldens

test: lint goldens
	$(PY) -m pytest -q

test-full: lint goldens
	$(PY) -m pip install -q --disable-pip-version-check -e '.[offline,parity]'
	$(PY) -m pytest -q --full

clean:
	rm -rf $(VENV) output build *.egg-info
