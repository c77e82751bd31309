"""Fixtures: the golden numbers, tiny random models made by transformers, and scripts as modules."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from lit_llama.aligner import Aligner
from lit_llama.config import LLaMAConfig
from lit_llama.devices import precision
from lit_llama.model import LLaMA
from lit_llama.script.command_line import run

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
DEMO_BASE = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"

# Text that tokenizers get wrong: leading spaces, newlines, digits, emoji, combining marks, the markers themselves.
AWKWARD = [
    "Hello world",
    " a leading space",
    "   three",
    "line\n\nline\n \n",
    "tabs\tand trailing  ",
    "123 4567 89.01 2,000",
    "it's, we'll; don't!",
    "emoji 🙂👩‍🚀 and é è ü ß",
    "two 🦙🦙 ok",
    "combining e\u0301 and 漢字 かな",
    "<s>a marker</s> in text",
    "",
    "x",
]

# Tests compare numbers in float32, also where a CPU has instructions for bfloat16; test_precision.py puts those back.
CPU_INSTRUCTIONS = dict(precision.CPU_INSTRUCTIONS)
precision.CPU_INSTRUCTIONS.clear()

# Of this process and those that tests start: the models are tiny; threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Waiting for a disk is a third of a training run here, and nothing that tests write has to survive a loss of power.
os.fsync = lambda descriptor: None

# Files whose tests take longest: `make test` hands out files in this order, so that none of them is left for the end.
LONGEST = ("distributed", "scripts", "serve", "resume", "families", "harness", "distill", "inference", "dpo", "judging",
           "compare", "second_device", "llama_cpp")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_make_parametrize_id(val: object) -> str | None:
    """The same name in every worker: bytes of a file may hold the time at which it was made."""
    return "bytes" if isinstance(val, bytes) else None


def load_script(path: str) -> ModuleType:
    """A script of the repo as a module."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a script with command-line options in this process: exit status, stdout, stderr."""

    def call(path: str, *more: str, **options: Any) -> tuple[int, str, str]:
        main = load_script(path).main
        arguments = [f"--{name}={value}" for name, value in options.items()]
        monkeypatch.setattr(sys, "argv", [path, *arguments, *more])
        capsys.readouterr()
        status = 0
        try:
            run(main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed: a picture takes most of the time of a small run."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return torch.load(GOLDEN / "expected.pth", weights_only=True)


@pytest.fixture(scope="session")
def golden_config() -> LLaMAConfig:
    sizes = json.loads((GOLDEN / "config.json").read_text())["config"]
    return LLaMAConfig(name="golden", **sizes)


def tiny_config(**changes: Any) -> LLaMAConfig:
    """Grouped-query, tied, with a head size of its own, biases, norms: everything that can differ from LLaMA 1."""
    sizes: dict[str, Any] = {
        "name": "tiny",
        "block_size": 64,
        "vocab_size": 96,
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "head_size": 16,
        "intermediate_size": 48,
        "tie_embeddings": True,
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "unrotated_layers": [1],
    }
    return LLaMAConfig(**{**sizes, **changes})


@pytest.fixture
def tiny_model() -> LLaMA:
    torch.manual_seed(2)
    model = LLaMA(tiny_config()).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(mean=float("scale" in name), std=0.25 if parameter.dim() == 2 else 0.1)
    return model


def random_aligner(config: LLaMAConfig, length: int, start_layer: int = 1, init_std: float = 0.1) -> Aligner:
    """An Aligner as if it were trained: its gates are open. Another length is another one."""
    torch.manual_seed(length)
    aligner = Aligner(config, length, start_layer, init_std)
    torch.nn.init.normal_(aligner.gates)
    return aligner


def train_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer with chat markers, as transformers does; return its size."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "examples" / "questions.jsonl").read_text()], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def byte_fallback_tokenizer(folder):
    """A tokenizer.json as Llama 2's: SentencePiece's pieces, bytes as a fallback, BOS put in front by a template."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlotwk", "▁ok"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    merges = [("o", "k"), ("▁", "ok")]
    vocabulary["ok"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 3}  # that of `train_tokenizer`
# transformers' own classes, with everything that a family may have; see `make_hf_checkpoint`.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"attention_bias": True, "head_dim": 16},
    "smollm3": {"attention_bias": True, "no_rope_layers": [1, 0, 1, 0], **SPECIAL_TOKENS},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "phi3": SPECIAL_TOKENS,
    "granite": {
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "head_dim": 16, "tie_word_embeddings": False},
    "internlm3": {"head_dim": 16},
    "llama": {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": False},
}


def make_hf_checkpoint(folder: Path, seed: int = 0, model_type: str = "llama", **changes: Any) -> Path:
    """A tiny random model of a class of transformers with its tokenizer, as transformers saves it.

    Biases and weights of norms are drawn at random as well: transformers begins with zeros and ones, with which nobody
    would miss them.
    """
    vocab_size = train_tokenizer(folder)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,  # large enough that wrong attention shows
        "tie_word_embeddings": True,
    }
    save = {key: changes.pop(key) for key in ("max_shard_size",) if key in changes}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **{**sizes, **changes})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name), 0.2)
    model.save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_checkpoint(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def base_dir(hf_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted by the project's script."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    load_script("scripts/convert_hf_checkpoint.py").main(checkpoint_dir=hf_checkpoint, output_dir=folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "alpaca"
    file = folder.parent / "alpaca.json"
    rows = [
        {"instruction": f"Count to {n}.", "input": "" if n % 3 else "slowly", "output": " ".join(map(str, range(n)))}
        for n in range(1, 21)
    ]
    file.write_text(json.dumps(rows))
    load_script("scripts/prepare_alpaca.py").main(
        data_path=file, checkpoint_dir=base_dir, output_dir=folder, prompt_style="chat", validation_share=0.2
    )
    return folder


@pytest.fixture(scope="session")
def aligner_path(base_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Aligner trained for a few steps by the project's script."""
    out_dir = tmp_path_factory.mktemp("out") / "aligner"
    load_script("finetune/aligner.py").main(
        checkpoint_dir=base_dir,
        data_dir=data_dir,
        out_dir=out_dir,
        aligner_length=2,
        batch_size=4,
        micro_batch_size=2,
        max_steps=3,
        warmup_steps=1,
        eval_interval=2,
    )
    return out_dir / "aligner.safetensors"
