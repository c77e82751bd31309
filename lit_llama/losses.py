"""What training minimises. Always in float32, whatever the model computes in."""

import torch.nn.functional as F
from torch import Tensor

from lit_llama.data import Batch
from lit_llama.model import LLaMA, Prefix


def supervised_loss(model: LLaMA, prefix: Prefix | None, batch: Batch) -> Tensor:
    """Cross-entropy of the scored tokens, summed; logits are computed for those alone.

    Args:
        model: the base model.
        prefix: the adapter, if any.
        batch: examples, padded or packed.

    Returns:
        The sum over scored tokens, a float32 scalar. It is no mean, because micro batches hold different numbers of
        scored tokens and the mean is over all those of an optimizer step.
    """
    predicts_scored = F.pad(batch.scored[:, 1:], (0, 1))  # position t predicts token t + 1
    logits = model(batch.ids, prefix, logits_at=predicts_scored, lengths=batch.lengths)  # (n, V)
    return F.cross_entropy(logits.float(), batch.ids[batch.scored], reduction="sum")
