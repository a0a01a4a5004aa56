# make         prepare data, train a small Amber, evaluate it, see what it memorized, audit it, and say whether
#              all is as expected: minutes on a laptop CPU, no downloads but the packages. Again: goes on where it was.
# make crystal the same for Crystal: three stages, each begun from the one before
# make test    the tests
# make ablation  three learning rates x two seeds, then a table: which differences are more than chance
# make bench   speed against other code, as ratios
# make gpu     what one GPU says of the kernels, of 7B steps and of replays, in nine minutes
# make clean   remove data/ and runs/
CONFIG ?= configs/amber_tiny.py
PYTHON ?= python3
PY = .venv/bin/python
# OpenMP's threads spin while they wait. Beside other work each takes the core that another needs, and a step takes
# up to 26 times as long (seen on two cores); with a bounded wait 4 % longer alone, and 4 times beside one process.
export GOMP_SPINCOUNT ?= 10000

run: .venv/run.installed
	@$(PY) tools/corpus.py
	@$(PY) prepare_data.py $(CONFIG)
	@$(PY) train.py $(CONFIG)
	@$(PY) eval.py $(CONFIG)
	@$(PY) memorize.py $(CONFIG) --sequences=100
	@$(PY) audit.py $(CONFIG) --sequences=16
	@$(PY) tools/report.py $(CONFIG)

crystal: .venv/run.installed
	@$(PY) tools/corpus.py
	@for stage in 1 2 3; do for step in prepare_data train eval; do \
	  $(PY) $$step.py configs/crystal_tiny_stage$$stage.py || exit; done; done
	@$(PY) tools/report.py configs/crystal_tiny_stage3.py

test: .venv/dev.installed
	@$(PY) -m ruff check .
	@$(PY) -m pytest -n 3 --dist=worksteal

bench: .venv/dev.installed
	@$(PY) tools/bench_cpu.py

# With what is there: a machine with a GPU may reach no package index.
gpu:
	@$(firstword $(wildcard $(PY)) $(PYTHON)) tools/gpu.py

ablation: .venv/run.installed
	@$(PY) tools/corpus.py
	@$(PY) prepare_data.py configs/ablation.py
	@for rate in 1e-3 3e-3 1e-2; do for seed in 1 2; do \
	  $(PY) train.py configs/ablation.py --learning_rate=$$rate --seed=$$seed \
	    --run_dir=runs/ablation/rate_$${rate}_seed_$$seed || exit 1; done; done
	@$(PY) tools/report.py runs/ablation/rate_*

.venv/run.installed: requirements.txt
.venv/dev.installed: requirements-dev.txt requirements.txt
.venv/%.installed: | .venv/bin/python
	@echo "Installing $< into .venv (a minute or two) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) must be Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv

clean:
	rm -rf data runs

.PHONY: run crystal test bench gpu ablation clean
.DELETE_ON_ERROR:
