"""Fine-tune a LLaMA-Adapter (arXiv 2303.16199): prefix tokens for each layer, and a gate per layer and head.

    python finetune/llama_adapter.py
    python finetune/llama_adapter.py --data_dir data/mine --adapter_length 30 --out_dir out/mine

Needs a base model converted by one of scripts/convert_*_checkpoint.py and data made by one of scripts/prepare_*.py.
"""

from pathlib import Path

import torch

from lit_llama.checkpoint import load_base, read_config
from lit_llama.data import open_data
from lit_llama.devices.precision import PRECISIONS, Precision
from lit_llama.devices.quantization import Quantize
from lit_llama.hyperparameters import Decay, check_hyperparameters, total_steps
from lit_llama.llama_adapter import LLaMAAdapter
from lit_llama.losses import supervised_loss
from lit_llama.script.command_line import run
from lit_llama.script.launch import launch, make_loggers
from lit_llama.training import fit


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    data_dir: Path = Path("data/demo"),
    out_dir: Path = Path("out/adapter"),
    adapter_length: int = 10,
    adapter_start_layer: int = 2,
    adapter_init_std: float = 0.1,
    learning_rate: float = 3e-2,
    decay: Decay = "linear",
    weight_decay: float = 0.02,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    epochs: int = 2,
    max_steps: int | None = None,
    warmup_steps: int | None = None,  # 10, or a tenth of a run that is shorter
    max_seq_length: int = 512,
    pack: bool = False,
    max_grad_norm: float | None = None,
    seed: int = 1337,
    eval_interval: int = 48,
    save_interval: int = 100,
    resume: bool = False,
    logger: list[str] | None = None,
    precision: Precision = "auto",
    quantize: Quantize | None = None,
    activation_checkpointing: bool = False,
    devices: int = 1,
    num_nodes: int = 1,
    shard_base: bool = False,
) -> None:
    """Fine-tune.

    Args:
        checkpoint_dir: folder of the base model, which stays as it is.
        data_dir: tokenised examples.
        out_dir: where the adapter, its training state, metrics and the picture of the loss go.
        adapter_length: prefix tokens N in each layer.
        adapter_start_layer: first layer with a prefix, counted from 0.
        adapter_init_std: standard deviation of the prefix tokens at the start.
        learning_rate: peak, reached at the end of warm-up.
        decay: how the learning rate falls from the peak: "linear" to zero, or "none".
        weight_decay: of AdamW.
        batch_size: examples per optimizer step, over all devices.
        micro_batch_size: examples per forward on one device.
        epochs: how often every example is read, unless --max_steps is given.
        max_steps: optimizer steps.
        warmup_steps: optimizer steps over which the learning rate rises; if not given, 10, or a tenth of a run of
            fewer steps than that.
        max_seq_length: longer examples are refused; prepare the data with this length.
        pack: put the examples of a forward into one row, without attention between them, instead of padding them.
        max_grad_norm: scale larger gradients down to this norm.
        seed: of initialisation and the order of examples.
        eval_interval: optimizer steps between validations, which also show a few answers.
        save_interval: optimizer steps between states to resume from; one is also saved every 10 minutes.
        resume: continue the run in --out_dir from its last state, to the bit; if there is none, begin.
        logger: "tensorboard" or "wandb", beside metrics.csv; may be given twice.
        precision: of the base model; "auto" is bf16-true on a GPU that has it and 32-true elsewhere.
        quantize: keep the base's blocks in 4 bits ("nf4") or 8 bits ("int8").
        activation_checkpointing: compute activations again for the backward pass instead of keeping them.
        devices: how many to use on each node.
        num_nodes: machines, each of which runs this script; see howto/resume_and_scale.md.
        shard_base: spread the base over all devices, for one that does not fit a device.
    """
    hyperparameters = dict(locals())
    check_hyperparameters(hyperparameters)
    tokenizer, (train, validation) = open_data(checkpoint_dir, data_dir, max_seq_length)
    max_steps = total_steps(len(train), batch_size, epochs, max_steps, warmup_steps)

    torch.manual_seed(seed)
    adapter = LLaMAAdapter(read_config(checkpoint_dir), adapter_length, adapter_start_layer, adapter_init_std)
    fabric, mesh = launch(devices, num_nodes, shard_base, make_loggers(logger or [], out_dir, resume), out_dir)
    adapter.to(fabric.device)
    model = load_base(checkpoint_dir, PRECISIONS[precision], fabric.device, mesh=mesh, quantize=quantize)
    if activation_checkpointing:
        model.checkpoint_activations()
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=weight_decay)

    fit(
        fabric,
        model,
        adapter,
        optimizer,
        lambda batch: supervised_loss(model, adapter, batch),
        tokenizer,
        train,
        validation,
        max_steps,
        hyperparameters,
    )


if __name__ == "__main__":
    run(main)
