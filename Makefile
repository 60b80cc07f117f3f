PYTHON ?= python3
VENV := .venv
setup:
	$(PYTHON) -m venv $(VENV)
