# Each target sets itself up on a new machine: it makes .venv and installs what it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test check format clean

demo: $(VENV)/ready
	$(BIN)/python scripts/demo.py

test: $(VENV)/ready
	$(BIN)/python -m pytest

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy llmlite evals serve scripts benchmarks

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# llama-cpp-python is built from source, without its image tools, which take a third of the time. Its wheel has a cache
# of its own: pip's would hand out one that was built with other flags.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	flags="$$($(PYTHON) benchmarks/llama_cpp_tools.py --flags)" && \
		CMAKE_ARGS="$${CMAKE_ARGS:--DLLAVA_BUILD=OFF}" CFLAGS="$$CFLAGS $$flags" CXXFLAGS="$$CXXFLAGS $$flags" \
		$(BIN)/pip install --quiet -c constraints.txt --no-deps llama-cpp-python \
		--cache-dir "$${XDG_CACHE_HOME:-$$HOME/.cache}/llmlite/pip"
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
