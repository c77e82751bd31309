# make demo   align a real LLaMA with one token, and see what it learned
# make test   the tests
# make lint   ruff and pyright

PYTHON ?= python3
BIN := .venv/bin
BASE := checkpoints/SmolLM2-135M-Instruct
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format clean
# These appear whole or not at all, so an interrupted make need not delete them.
.PRECIOUS: $(BASE).Q4_1.gguf $(BASE)/lit_config.json data/demo/dataset.json

demo: out/demo/report.txt
	@cat out/demo/report.txt

test: .venv/installed-dev $(BASE)/lit_config.json
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv data/demo out/demo $(BASE) $(BASE).Q4_1.gguf

.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(BASE).Q4_1.gguf: | .venv/installed
	$(BIN)/python scripts/download_demo_base.py --output_path $@

$(BASE)/lit_config.json: | $(BASE).Q4_1.gguf
	$(BIN)/python scripts/convert_gguf_checkpoint.py --gguf_path $(BASE).Q4_1.gguf --output_dir $(BASE)

data/demo/dataset.json: examples/questions.jsonl lit_llama/forms.py | $(BASE)/lit_config.json
	rm -rf data/demo out/demo
	$(BIN)/python scripts/prepare_examples.py --form captain --output_dir data/demo

out/demo/trained: data/demo/dataset.json
	$(BIN)/python finetune/aligner.py --data_dir data/demo --out_dir out/demo --resume true
	touch $@

out/demo/report.txt: out/demo/trained $(wildcard out/demo/aligner.safetensors)
	$(BIN)/python evaluate/form.py --form captain --out_dir out/demo > /dev/null
