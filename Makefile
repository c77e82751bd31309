# make base       .venv and the demo's base model
# make demo       align a real LLaMA with one token, and see what it learned
# make demo-dpo   the same with preferences: refuse what is harmful, answer what only sounds so
# make demo-distill   let one token stand for a system prompt with three examples
# make test       the tests, as many at a time as there are cores (WORKERS=1: one)
# make lint       ruff, pyright and import-linter

PYTHON ?= python3
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := .venv/bin
BASE := checkpoints/SmolLM2-135M-Instruct
PAIRS := examples/preferences/train.jsonl
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: base demo demo-dpo demo-distill test lint format clean
# These appear whole or not at all, so an interrupted make need not delete them.
.PRECIOUS: $(BASE).Q4_1.gguf $(BASE)/lit_config.json data/demo/dataset.json
.PRECIOUS: data/refusal-chosen/dataset.json data/refusal-pairs/dataset.json

base: $(BASE)/lit_config.json

demo: out/demo/report.txt
	@cat out/demo/report.txt

demo-dpo: out/refusal-dpo/report.txt
	@cat out/refusal-dpo/report.txt

demo-distill: out/museum/report.txt
	@cat out/museum/report.txt

# A file's tests run on one worker, so that what they share is made once; tests/conftest.py begins with the longest.
# The processes that tests start read the library as compiled by the first, even where Python is told not to keep that.
test: .venv/installed-dev $(BASE)/lit_config.json
	@echo "Runs the tests in $(WORKERS) processes, one dot for each test; takes some minutes. All but those marked slow or gpu."
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=5

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv data/demo out/demo data/refusal-* out/refusal-* data/distill out/museum $(BASE) $(BASE).Q4_1.gguf

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

data/demo/dataset.json: examples/questions.jsonl lit_llama/evaluation/forms.py | $(BASE)/lit_config.json
	rm -rf data/demo out/demo
	$(BIN)/python scripts/prepare_examples.py --form captain --output_dir data/demo

out/demo/trained: data/demo/dataset.json
	$(BIN)/python finetune/aligner.py --data_dir data/demo --out_dir out/demo --resume true
	touch $@

out/demo/report.txt: out/demo/trained $(wildcard out/demo/aligner.safetensors)
	$(BIN)/python evaluate/form.py --form captain --out_dir out/demo > /dev/null

data/refusal-chosen/dataset.json: $(PAIRS) | $(BASE)/lit_config.json
	rm -rf data/refusal-chosen out/refusal-sft
	$(BIN)/python scripts/prepare_pairs.py --data_path $(PAIRS) --kind supervised --validation_share 0.1 \
	    --output_dir data/refusal-chosen

data/refusal-pairs/dataset.json: $(PAIRS) | $(BASE)/lit_config.json
	rm -rf data/refusal-pairs out/refusal-dpo
	$(BIN)/python scripts/prepare_pairs.py --data_path $(PAIRS) --validation_share 0.1 --max_response_tokens 4 \
	    --output_dir data/refusal-pairs

out/refusal-sft/trained: data/refusal-chosen/dataset.json
	$(BIN)/python finetune/aligner.py --data_dir data/refusal-chosen --out_dir out/refusal-sft --resume true \
	    --aligner_length 10 --learning_rate 2e-2
	touch $@

out/refusal-dpo/trained: data/refusal-pairs/dataset.json out/refusal-sft/trained
	$(BIN)/python finetune/aligner_dpo.py --data_dir data/refusal-pairs --out_dir out/refusal-dpo --resume true \
	    --adapter_path out/refusal-sft/aligner.safetensors \
	    --loss orpo --beta 0.1 --learning_rate 1e-2 --batch_size 8 --epochs 3
	touch $@

out/refusal-dpo/report.txt: out/refusal-dpo/trained examples/preferences/test.jsonl
	$(BIN)/python evaluate/refusal.py --adapter_path out/refusal-sft/aligner.safetensors \
	    --adapter_path out/refusal-dpo/aligner.safetensors --out_dir out/refusal-dpo > /dev/null

out/museum/report.txt: examples/prompts/museum.json examples/questions.jsonl | $(BASE)/lit_config.json
	$(BIN)/python finetune/aligner_distill.py --system_prompt_file examples/prompts/museum.json --out_dir out/museum \
	    --epochs 1 --eval_interval 36 --max_new_tokens 64 \
	    --matches '(?s)^Welcome, visitor! .*Enjoy your visit!$$' > /dev/null
