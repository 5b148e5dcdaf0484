# make fuzz   a 60-second campaign: the model, the oracle and fla on the same inputs
# make test   the tests, on all cores
# make lint   ruff, and clang-format where there are CUDA sources
#
# Each creates .venv first, or reuses it; `make install` does only that. PYTHON chooses the interpreter it is made of.

PYTHON ?= python3
BUDGET ?= 60s
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: fuzz test lint format install clean
.DEFAULT_GOAL := test

fuzz: $(STAMP)
	$(BIN)/python -m fuzz run --budget $(BUDGET)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z 'csrc/*.cu' 'csrc/*.h' 'flash_kda/*.cpp' 'tests/emulator/*' | xargs -0 -r $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -z 'csrc/*.cu' 'csrc/*.h' 'flash_kda/*.cpp' 'tests/emulator/*' | xargs -0 -r $(BIN)/clang-format -i

install: $(STAMP)

# ci/install.py writes the stamp last, so an installation that broke off is done again. The CUDA library is compiled
# with the installation, and again when a source of it changed; FLASH_KDA_BUILD=0 leaves it out.
BUILT_FROM := pyproject.toml CMakeLists.txt $(wildcard build_backend/*.* csrc/*.* csrc/*/*.* flash_kda/*.cpp)

$(STAMP): ci/install.py $(BUILT_FROM)
	$(PYTHON) ci/install.py $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
