# Every target works on a bare clone: the virtual environment is made when it is needed.
# TORCH=cpu installs PyTorch's CPU builds, where PyTorch has them for the platform (Linux, Windows):
# about 1 GB once installed, where the CUDA builds take 6 GB.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
CPU_BUILDS = torch torchvision --index-url https://download.pytorch.org/whl/cpu

.PHONY: demo test lint parity bench gpu chaos clean

# A small sweep on digits that ship, its tables, and demo/report.html.
demo: $(VENV)/installed
	$(PY) -m domainbed_kd demo

test: lint
	$(PY) -m pytest -n auto

lint: $(VENV)/tests-installed
	$(PY) -m ruff check .
	$(PY) -m mypy

# The site, into site/; a link that leads nowhere fails. `serve` shows it while you write.
docs: $(VENV)/docs-installed
	$(VENV)/bin/zensical build --strict --clean

serve: $(VENV)/docs-installed
	$(VENV)/bin/zensical serve

# The numbers, texts and hashes that must equal DomainBed's; DOMAINBED=DIR also compares a
# checkout, every algorithm of which trains for a few updates.
parity: $(VENV)/tests-installed
	$(PY) -m pytest -n auto -k "domainbed or upstream or golden"
	$(if $(DOMAINBED),$(PY) tools/parity.py $(DOMAINBED))

# What our work costs, as ratios measured in one run; PEER=DIR times a DomainBed checkout too,
# DATA=DIR, which holds PACS, loading and training on real images.
bench: $(VENV)/installed
	$(PY) tools/bench.py $(if $(PEER),--peer $(PEER)) $(if $(DATA),--data_dir $(DATA))

# On a GPU machine, without a network: the CUDA tests, the card's own limits, and ours against them.
gpu: $(VENV)/tests-installed
	$(PY) tools/gpu.py $(if $(PEER),--peer $(PEER)) $(if $(DATA),--data_dir $(DATA))

# A sweep of 32 jobs, harmed 25 times by each launcher's troubles, against a quiet one.
LAUNCHERS ?= local ray slurm
chaos: $(VENV)/tests-installed
	for launcher in $(LAUNCHERS); do $(PY) tools/chaos.py --n_hparams 2 --kills 25 \
		--launcher $$launcher --folder chaos/$$launcher || exit 1; done

clean:
	rm -rf $(VENV) .cache demo site chaos train_output bench.json bench.md gpu.json gpu.md

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	@echo "Fetching PyTorch's CPU builds from download.pytorch.org; about 1 GB once all is installed."
	@$(PY) -m pip install --quiet $(CPU_BUILDS) 2>/dev/null || { echo "TORCH=cpu: there is no CPU" \
		"build for this Python and platform, or no connection. Run '$(PY) -m pip install" \
		"$(CPU_BUILDS)' to see which, or leave TORCH=cpu out."; exit 1; }
else
	@echo "Fetching PyTorch and the rest from PyPI; on Linux with CUDA, about 6 GB once installed."
endif
	$(PY) -m pip install --quiet --editable ".[report]"
	touch $@

$(VENV)/tests-installed: $(VENV)/installed
	$(PY) -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(PY) -m pip install --quiet --editable ".[docs]"
	touch $@
