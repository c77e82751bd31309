"""Export a base model, with adapters in it, to Hugging Face's format.

    python scripts/export_hf_checkpoint.py --output_dir export/base
    python scripts/export_hf_checkpoint.py --adapter_path out/demo/aligner.safetensors --output_dir export/captain
    python scripts/export_hf_checkpoint.py --adapter_path out/lora/lora.safetensors --format peft \\
        --base_name HuggingFaceTB/SmolLM2-135M-Instruct --output_dir export/lora

An Aligner of one token becomes biases and a LoRA is merged: the result is a stock `LlamaForCausalLM`, which
transformers, vLLM and other programs that read this format load without custom code. For longer prefixes, a small
modelling file is added, which transformers runs if given `trust_remote_code=True`. `--format peft` writes an Aligner of
one token, a bias or a LoRA without the base model, for PEFT. scripts/verify_export.py checks the result.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import lit_llama
from lit_llama.adapters import AdapterInfo
from lit_llama.base import open_adapters
from lit_llama.chat_template import thinking_switch
from lit_llama.checkpoint import base_fingerprint, read_config
from lit_llama.config import LLaMAConfig
from lit_llama.conversion import copy_tokenizer, source_names, write_weights
from lit_llama.devices.precision import DType
from lit_llama.files import atomic_folder, read_json, write_json
from lit_llama.formats.folding import FoldedLayer, biased, fold
from lit_llama.formats.hf import HF_LAYER, NAMES, PROJECTIONS, config_to_hf, halves_from_pairs
from lit_llama.formats.peft import CONFIG_FILE, write_peft
from lit_llama.formats.tokenizer_files import write_for_transformers
from lit_llama.model import LLaMA
from lit_llama.prompts import CHAT_STYLES, prompt_style
from lit_llama.script.command_line import run
from lit_llama.seam import Adapter, LayerAdapter
from lit_llama.tensor_files import TensorFiles, weight_files
from lit_llama.tokenizer import Tokenizer

MODELING_FILE = Path(lit_llama.__file__).parent / "formats" / "modeling_prefix_llama.py"


def main(
    output_dir: Path,
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    adapter_path: list[Path] | None = None,
    adapter_scale: list[float] | None = None,
    format: Literal["transformers", "peft"] = "transformers",
    dtype: DType | None = None,
    base_name: str | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
) -> None:
    """Export.

    Args:
        output_dir: folder that is written.
        checkpoint_dir: folder of the base model.
        adapter_path: file or run folder of an adapter of any method; may be given several times, and then the sum of
            the adapters is exported.
        adapter_scale: factor by which the adapter is multiplied, 1 if not given; may be given once for each adapter.
        format: format of the export: "transformers" is the whole model, "peft" is the adapter without its base model: a
            LoRA, or Aligners of one token and biases, which are BEFT's vectors to PEFT.
        dtype: number format of the weights on disk; if not given, they keep the format that they have. Biases and
            prefixes are always float32.
        base_name: name by which PEFT and the README refer to the base model: OWNER/NAME on the hub, or a folder in
            Hugging Face's format; if not given, the name that is recorded in --checkpoint_dir.
        allow_other_base: export adapters that were trained on other weights than those in --checkpoint_dir.
        overwrite: replace the folder if it exists already.
    """
    paths = adapter_path or []
    config, tensors = read_config(checkpoint_dir), TensorFiles(weight_files(checkpoint_dir))
    base_name = base_name or config.name or checkpoint_dir.name
    with torch.device("meta"):
        base = LLaMA(config)
    base.fingerprint = base_fingerprint(tensors) if paths else ""
    adapter, infos = open_adapters(base, paths, adapter_scale, allow_other_base)
    if format == "peft":
        if adapter is None:
            raise ValueError("--format peft exports an adapter without its base model: give its file as --adapter_path")
        metadata = {"base_fingerprint": base.fingerprint, "prompt_style": infos[0].style}
        with atomic_folder(output_dir, overwrite, CONFIG_FILE) as folder:
            write_peft(folder, adapter, config, tensors, base_name, metadata)
            write_readme(folder, output_dir.name, base_name, infos, Tokenizer(checkpoint_dir))
    else:
        with atomic_folder(output_dir, overwrite, "config.json") as folder:
            write_model(folder, config, tensors, adapter, dtype and getattr(torch, dtype))
            write_tokenizer(folder, checkpoint_dir)
            write_readme(folder, output_dir.name, base_name, infos, Tokenizer(checkpoint_dir))
    print(f"{format}: {output_dir}", file=sys.stderr)


def write_model(
    folder: Path, config: LLaMAConfig, tensors: TensorFiles, adapter: Adapter | None, dtype: torch.dtype | None
) -> None:
    """Write weights and config.json, one shard and one layer in memory at a time."""
    added = [LayerAdapter() if adapter is None else adapter.layer(i) for i in range(config.n_layer)]
    lengths = [[prefix.tokens.size(1) for prefix in layer.prefixes] for layer in added]
    biases = set().union(*(biased(config, layer) for layer in added))
    if not biases <= set("qkvo"):
        raise ValueError(
            f"the adapter adds biases to {', '.join(sorted(biases - set('qkvo')))}, where a stock LLaMA has none"
        )
    has_bias = bool(biases)
    longer = [[length for length in some if length > 1] for some in lengths]

    def groups() -> Iterator[dict[str, Tensor]]:
        outside = [name for name in tensors if ".h." not in name]
        yield {NAMES[name][0]: tensors[name].to(dtype) for name in outside}
        for i in range(config.n_layer):
            layer = fold(config, tensors, i, added[i])
            yield layer_tensors(i, layer, has_bias, config.head_size, dtype) | {
                source_names(name, NAMES)[0]: tensors[name].to(dtype)
                for name in (f"transformer.h.{i}.rms_1.scale", f"transformer.h.{i}.rms_2.scale")
            }

    write_weights(folder, groups(), 1 + config.n_layer)
    fields = config_to_hf(config)
    if has_bias:
        fields["attention_bias"] = True
    if any(longer):
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
        fields |= {
            "architectures": ["PrefixLlamaForCausalLM"],
            "model_type": "prefix_llama",
            "auto_map": {
                "AutoConfig": f"{MODELING_FILE.stem}.PrefixLlamaConfig",
                "AutoModelForCausalLM": f"{MODELING_FILE.stem}.PrefixLlamaForCausalLM",
            },
            "prefix_lengths": longer,
        }
    fields["dtype"] = str(dtype or tensors["transformer.wte.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", fields)


def layer_tensors(
    index: int, layer: FoldedLayer, has_bias: bool, head_size: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A layer's projections under Hugging Face's names, where each head's rotary pairs stand as two halves.

    Stock models have biases on all projections of the attention or on none: those that nothing is folded into are zero.
    """
    found: dict[str, Tensor] = {}
    for name, weight in layer.weights.items():
        module = HF_LAYER.format(index) + PROJECTIONS[name]
        rows = halves_from_pairs(weight, head_size) if name in "qk" else weight
        found[f"{module}.weight"] = rows.to(dtype).contiguous()
        if has_bias and name in "qkvo":
            bias = layer.biases.get(name, torch.zeros(weight.size(0)))
            found[f"{module}.bias"] = halves_from_pairs(bias, head_size) if name in "qk" else bias
    if layer.prefixes:
        k, v = (torch.cat([prefix[part][0] for prefix in layer.prefixes], dim=1) for part in (0, 1))  # (nh, N, hs)
        pairs = k.transpose(1, 2).flatten(0, 1)  # (nh * hs, N)
        k = halves_from_pairs(pairs, head_size).unflatten(0, (-1, head_size)).transpose(1, 2)
        attention = HF_LAYER.format(index) + "self_attn"
        found |= {f"{attention}.prefix_k": k.contiguous(), f"{attention}.prefix_v": v.contiguous()}
    return found


def write_tokenizer(folder: Path, checkpoint_dir: Path) -> None:
    """Copy the tokenizer's files, and add to them and to config.json what transformers wants to know."""
    copy_tokenizer(checkpoint_dir, folder)
    write_for_transformers(folder)
    tokenizer = Tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(folder / "config.json", read_json(folder / "config.json") | ids)
    generation_file = folder / "generation_config.json"
    if not generation_file.is_file():
        write_json(generation_file, {**ids, "eos_token_id": sorted(tokenizer.stop_ids)})


MODEL_README = """# {title}

{base}{adapters}, exported to Hugging Face's format by Lit-LLaMA-Aligner {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}"{options})
tokenizer = AutoTokenizer.from_pretrained("{title}"{options})
{answer}
```

{how}
"""
PEFT_README = """---
base_model: {base}
library_name: peft
---

# {title}

An adapter for {base} ({adapters}), exported to PEFT's format by Lit-LLaMA-Aligner {version}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{title}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
{answer}
```

{how}
"""
ANSWER = """
{ids}
answer = model.generate(ids, max_new_tokens=256, do_sample=False)[0, ids.size(1) :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def write_readme(folder: Path, name: str, base: str, infos: Sequence[AdapterInfo], tokenizer: Tokenizer) -> None:
    """Say what the folder holds and how to get an answer from it."""
    styles = [info.prompt_style for info in infos if info.prompt_style]
    untrained = "chat" if tokenizer.chat_template else "none"
    style = prompt_style(styles[0] if styles else "alpaca" if infos else untrained, tokenizer)
    ids = f'prompt = {style.prompt("Name three rivers.")!r}\nids = tokenizer(prompt, return_tensors="pt")["input_ids"]'
    if style.name in CHAT_STYLES:
        thinking = CHAT_STYLES[style.name]
        switch = "" if thinking is None else f", {thinking_switch(tokenizer)}={thinking}"
        ids = (
            'messages = [{"role": "user", "content": "Name three rivers."}]\n'
            f"text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False{switch})\n"
            'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]'
        )
    for_peft = (folder / CONFIG_FILE).is_file()
    code = not for_peft and "auto_map" in read_json(folder / "config.json")
    how = "Stock `LlamaForCausalLM`; what the adapters add is in the weights and biases of its projections."
    if code:
        how = f"`{MODELING_FILE.name}` holds the attention that the prefixes need."
    if not infos:
        how = "The weights are those of the base model."
    if for_peft:
        how = "The base model is not in this folder: it is read from where its name says."
    if styles:
        how += f" Trained with prompts in the style {', '.join(sorted(set(styles)))}."
    adapters = [
        " ".join([info.method, *(str(info.config[size]) for size in ("length", "r") if size in info.config)])
        for info in infos
    ]
    text = (PEFT_README if for_peft else MODEL_README).format(
        title=name,
        base=base,
        adapters=" + ".join(adapters) if for_peft else "".join(f" + {adapter}" for adapter in adapters),
        version=lit_llama.__version__,
        options=", trust_remote_code=True" if code else "",
        answer=ANSWER.format(ids=ids),
        how=how,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
