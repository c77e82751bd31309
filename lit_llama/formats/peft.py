"""PEFT's files of a LoRA (https://huggingface.co/docs/peft/developer_guides/checkpoint)."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lit_llama.config import LLaMAConfig
from lit_llama.files import write_json
from lit_llama.formats.hf import HF_LAYER, PROJECTIONS, halves_from_pairs
from lit_llama.lora import LoRA


def write_peft(folder: Path, lora: LoRA, config: LLaMAConfig, base_name: str) -> None:
    """Write a LoRA as PEFT's adapter_config.json and adapter_model.safetensors.

    Args:
        folder: folder that exists, where both files are written.
        lora: the adapter.
        config: configuration of the base model.
        base_name: what PEFT finds the base model by: OWNER/NAME on the hub, or a folder in Hugging Face's format.
    """
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(lora.layers):
        for name, factors in layer.named_children():
            module = f"base_model.model.{HF_LAYER.format(i)}{PROJECTIONS[name]}"
            a, b = (factors.get_parameter(part).data for part in "ab")
            b = halves_from_pairs(b, config.head_size) if name in "qk" else b
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b.contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": lora.sizes["r"],
            "lora_alpha": lora.sizes["alpha"],
            "lora_dropout": lora.sizes["dropout"],
            "target_modules": [PROJECTIONS[name].rpartition(".")[2] for name in lora.sizes["targets"]],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
