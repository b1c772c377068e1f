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

# Some virtual machines announce Intel's AMX and don't let a program use it: what was compiled for it dies there of an
# illegal instruction. Compilers that don't know the flags don't use AMX.
AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
NO_AMX = $(shell echo | $(CC) $(AMX) -x c -fsyntax-only - 2>/dev/null && echo "$(AMX)")

# llama-cpp-python is built from source; its image tools are not needed and take a third of that time.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	CMAKE_ARGS="$${CMAKE_ARGS:--DLLAVA_BUILD=OFF}" CFLAGS="$$CFLAGS $(NO_AMX)" CXXFLAGS="$$CXXFLAGS $(NO_AMX)" \
		$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build *.egg-info
