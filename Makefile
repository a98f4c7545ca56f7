# Sugar over bootstrap.py, which does the work (and needs no make).
PYTHON ?= python3

.PHONY: setup reproduce test bench gpu lab publish
setup reproduce test bench gpu lab publish:
	@$(PYTHON) bootstrap.py $@
