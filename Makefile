# make demo: the main job, end to end.   make demo-causal: a causal student, streamed and scored; TEACHER=1: its teacher too.
# make test, make test-long, make test-gpu: what CI runs; the last compiles for GPUs, and needs none.
# make docs: the documentation as a site, in build/site, as CI checks it;  make site: with the notebooks' outputs.
# make package: wheel and sdist, and the wheel's demo in an environment of its own.
# make test-full: all three, and the slow proofs.
# make clean: removes what make installed and built. output/ is yours.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
OUT ?= output/demo
WORKERS ?= 2

.PHONY: demo demo-causal test test-long test-gpu test-full docs site package lint goldens clean

$(VENV)/.base: pyproject.toml
	@echo "installing into $(VENV), less than a minute"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "installing what the tests need into $(VENV)"
	$(PY) -m pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/.aot: $(VENV)/.test
	@echo "installing XLA's compiler for NVIDIA GPUs into $(VENV): .[aot], 0.6 GB; no GPU is needed"
	$(PY) -m pip install -q --disable-pip-version-check -e '.[test,aot]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PY) -m pip install -q --disable-pip-version-check -e '.[docs]'
	touch $@

# glibc asks for large pages: a step on CPUs touches new memory of over 100 MB (docs/results.md, section 6)
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(VENV)/.base
	$(PY) -m rcm_jax.demo --out $(OUT) $(ARGS)

demo-causal: $(VENV)/.base
	@echo "About $(if $(TEACHER),4,2) minutes on 2 cores: streams a video, then scores the student" \
		"$(if $(TEACHER),and its 50-step teacher,(TEACHER=1 scores its 50-step teacher too: 2 minutes more))"
	$(PY) -m rcm_jax.sample_causal --model toy --stream --profile --warmup_iters 1 --num_samples 4 \
		--prompt "a blue square moving up" --save_path $(OUT)-causal/stream.mp4
	$(PY) -m rcm_jax.evaluate --student causal=toy_causal --teacher_steps 50 $(if $(TEACHER),,--teacher '') \
		--json $(OUT)-causal/scores.json

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

goldens: $(VENV)/.test
	$(PY) -m tests.golden tests/goldens

test: lint goldens
	$(PY) -m pytest -q -n $(WORKERS)

test-long: $(VENV)/.test
	$(PY) -m pytest -q -n $(WORKERS) --long

test-gpu: $(VENV)/.aot
	TF_CPP_MIN_LOG_LEVEL=2 $(PY) -m pytest -q -n $(WORKERS) --aot

test-full: lint goldens
	$(PY) -m pip install -q --disable-pip-version-check -e '.[aot,parity,ray]'
	$(PY) -m pytest -q -n $(WORKERS) --full
	TF_CPP_MIN_LOG_LEVEL=2 $(PY) -m pytest -q -n $(WORKERS) --full --aot

docs: $(VENV)/.docs
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs -q build --strict -d build/site

site: $(VENV)/.test $(VENV)/.docs
	rm -rf build/docs && mkdir -p build && cp -rL docs build/docs
	DOCS_DIR=build/docs JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 EXECUTE_NOTEBOOKS=true $(PY) -m mkdocs build --strict -d build/site

package: $(VENV)/.test
	rm -rf build/package
	$(PY) -m build --outdir build/package . > /dev/null
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/python -m pip install -q --disable-pip-version-check build/package/*.whl
	cd build/package && JAX_PLATFORMS=cpu venv/bin/rcm-demo --steps 5 --out demo

clean:
	rm -rf $(VENV) build *.egg-info
