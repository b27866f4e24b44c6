# make demo   the whole journey on packaged real data      make test   every check
# Both set themselves up. PYTHON=python3.12 chooses the interpreter; tools/env.sh says what else can be chosen.
.DEFAULT_GOAL := help
.PHONY: help env demo test check prove bench build site test-colab clean
BIN := .venv/bin

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

env: ## make .venv, or do nothing when it is current
	@PYTHON="$(PYTHON)" tools/env.sh

demo: env ## setup, train, embed, export on real data; a second time it finds everything done
	WAYSTATION_STORE="$${WAYSTATION_STORE:-$(CURDIR)/runs/store}" $(BIN)/waystation run recipes/demo.yaml --run demo --page runs/demo.html

test: check ## every check: `make check`, the notebooks, and the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --do-print
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n 2 --dist load --maxschedchunk 1

check: env ## the quick ones: lit/ = nbs/ = waystation/, lint, types, tests that take seconds each (seven minutes on two cores)
	$(BIN)/python tools/literate.py check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

prove: env ## the promises in full length: kills, faults, races, sizes (an hour and more); its figures go to nbs/guides/prove.json
	WAYSTATION_PROVE=1 $(BIN)/pytest tests/test_store_kill.py tests/test_store_faults.py tests/test_store_hostile.py tests/test_store_sizes.py tests/test_embed_kill.py tests/test_embed_sizes.py tests/test_table.py tests/test_house.py tests/test_view.py tests/test_train_kill.py tests/test_training_device.py
	cp runs/prove.json nbs/guides/prove.json

build: env ## lit/ (edit here) -> nbs/ and waystation/ and README.md
	$(BIN)/python tools/literate.py build

site: env ## the documentation, from the notebooks' saved outputs, in _site/
	$(BIN)/python tools/site.py

test-colab: env ## setup, embed and export on Python 3.13 with the versions of Colab's image
	tools/test_colab.sh

bench: env ## store, embedding, tables and training beside other ways (8, 20, 30 and 20 minutes); writes their .json and the guides' tables
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/embed.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/train.py

clean: ## remove what can be made again; runs/ stays
	rm -rf _proc _site _docs dist .pytest_cache .mypy_cache .ruff_cache
	find waystation tools tests -name __pycache__ -exec rm -rf {} +
