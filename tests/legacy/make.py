"""How the files of this folder were made: by the code of commit c6a48a8, before the library got its rooms.

    git worktree add /tmp/old c6a48a8
    cd tests && PYTHONPATH=/tmp/old python legacy/make.py /tmp/old

They are never made again: tests/test_legacy.py asks today's code to read what that code wrote.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import tokenizers
import torch
import transformers

HERE = Path("legacy")  # files of that time name the folders that they were made from
PROMPT = "Count to 3."
RUN = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 4, "warmup_steps": 1, "save_interval": 2, "decay": "none"}
RUN |= {"eval_interval": 2, "learning_rate": 0.3, "precision": "32-true"}
METHODS = {"aligner": {"aligner_length": 2}, "adapter": {"adapter_length": 2}, "lora": {"lora_r": 1}}


def script(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), Path(sys.argv[1]) / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make_base(folder):
    """A tiny random LLaMA with a byte-level tokenizer and a chat template."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    markers = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=markers, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Count to 1 2 3 4 5 6 7 8 9 10 11 12, slowly. Say the numbers."] * 2, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def make_data(folder, base):
    """A supervised data set and one of preferences."""
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 9)]
    pairs = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "no"} for row in rows]
    options = {"checkpoint_dir": base, "prompt_style": "chat", "validation_share": 0.25}
    for name, kind, content in (("data", "alpaca", rows), ("pairs", "pairs", pairs)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
        script(f"scripts/prepare_{kind}")(file, output_dir=folder / name, **options)
        file.unlink()


def keep(out_dir, name, state):
    """The adapter of a run as it was at its end, and, for a run to resume, the state and metrics of its second step."""
    shutil.copy(next(out_dir.glob("*.safetensors")), HERE / f"{name}.safetensors")
    if state:
        (HERE / name).mkdir()
        for file in ("state-00000002.pt", "metrics.csv"):
            shutil.copy(out_dir / file, HERE / name / file)


def expected(base):
    """Logits of a row of tokens, and the answer of each adapter."""
    from lit_llama.checkpoint import load_adapter, load_base
    from lit_llama.generation import generate
    from lit_llama.prompts import prompt_style
    from lit_llama.tokenizer import Tokenizer

    model, tokenizer = load_base(base, torch.float32), Tokenizer(base)
    ids = tokenizer.encode(prompt_style("chat", tokenizer).prompt(PROMPT))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].tolist()
    answers = {}
    for name in ("base", *METHODS, "dpo"):
        adapter = None if name == "base" else load_adapter(HERE / f"{name}.safetensors")
        [answers[name]] = generate(model, [ids], 8, adapter=adapter)
    return {"ids": ids, "logits": logits, "answers": answers}


def main():
    work = Path("legacy-work")
    make_base(work / "hf")
    base = HERE / "base"
    script("scripts/convert_hf_checkpoint")(work / "hf", base)
    make_data(HERE, base)
    for method, options in METHODS.items():
        script(f"finetune/{method}")(base, HERE / "data", work / method, **RUN, **options)
        keep(work / method, method, state=method == "aligner")
    options = {"adapter_path": HERE / "aligner.safetensors", "cache_reference": True}
    script("finetune/aligner_dpo")(base, HERE / "pairs", work / "dpo", **RUN, **options)
    keep(work / "dpo", "dpo", state=True)
    (HERE / "expected.json").write_text(json.dumps(expected(base)) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
