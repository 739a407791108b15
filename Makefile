# make demo   train, distil, measure and report on handwritten digits (about five minutes on two cores)
# make test   the whole test suite
# make check  lint, format and types
# make package  the wheel and the sdist in dist/, each installed into a clean environment and used there
# make docs   the documentation as a site in build/site; a link that leads nowhere is an error
# All make the virtual environment .venv first where it is missing. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check package docs setup clean
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: $(READY)
	$(BIN)/python .ci/package.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist runs
