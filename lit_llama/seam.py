"""What an adapter may add to a layer of the base model. To write a method, read this file and then `lit_llama.bias`.

A layer of the base computes, with x its normalised input,

    q, k, v = W_q x, W_k x, W_v x          out = W_o concat_h( attention(q_h, k, v) )          mlp(x) = ...

and an adapter may add two kinds of things to it.

**Prefixes**: tokens P (N, C) that every position attends to with a softmax of its own, outside the sequence, so that
their keys are not rotated. Each query head h multiplies what comes of it by its gate g_h. The paper's formula
(arXiv 2312.05503), with the layer's own frozen projections:

    out = W_o concat_h( attention(q_h, k, v) + g_h * softmax(q_h K^T / sqrt(hs)) V ),       K, V = P W_k, P W_v

Where the layer's projections have biases, and its keys a norm, those of the prefix have them too.

**Updates** of a projection y = W x, by the projection's name: functions u of its input and its output that are added
to the output,

    y + u_1(x, y) + u_2(x, y) + ...

LoRA's is B A x, a bias's is b, the scaling of IA3 is s * y.

The contract:

- A fresh adapter adds nothing: its gates, or what its updates are multiplied by, are zero, and the logits are the
  base's bit for bit.
- An adapter is passed to the forward and never changes the model, so one frozen base serves any number of them.
- Contributions add. Several adapters at once are the sum of what each adds alone; every update sees the output of the
  projection as the base computes it.
- Adapters scale: a prefix by its gates, an update by `scaled`.
- Rows of a batch may have different adapters. That is why an update is a named tuple of tensors whose first dimension
  counts rows, 1 for the whole batch, and in which zeros add nothing: `lit_llama.row_adapters` stacks them.
- What is saved and loaded by its name is a module with float32 parameters, which says what it is (see
  `lit_llama.bias`): `method`, the name in `lit_llama.adapters.METHODS`; `base_sizes`, the fields of the configuration
  that its shapes depend on; `sizes`, their values and its own arguments; `scale_`, which multiplies what it adds; and,
  if several can be made one, `merged`. If its class itself, and not one that it inherits from, says `takes_rows`, its
  parameters may have a dimension for rows in front, and `layer` then says what each row adds. Then adapters of the same
  `sizes`, which differ in their parameters alone, are stacked once and not in each layer.
- An update is affine in x and y together, u(x, y) = c + M x + S y, so that it folds exactly into a weight and a bias,
  W' = (I + S) W + M and b' = (I + S) b + c. So does a prefix of one token, whose softmax is 1 for every query. See
  `lit_llama.formats.folding`, which refuses an update that is not affine.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # of the attention and of the MLP


Positions = Literal["all", "prompt"]  # that attend to a prefix


def by_row(parameter: Tensor, dims: int) -> Tensor:
    """A parameter of `dims` dimensions, or of one more if it has rows in front, as a tensor (1 or B, ...)."""
    return parameter if parameter.dim() > dims else parameter[None]


class LayerPrefix(NamedTuple):
    """Tokens that one layer attends to outside its own sequence: one prefix for the whole batch, or one for each row.

    Args:
        tokens: (1 or B, N, C), in the place of the layer's normalised input x: no norm is applied to them.
        gates: (1 or B, nh), what each query head's contribution is multiplied by.
        share: (B, T), what the contribution is multiplied by at each position; None means 1 at all.
        prompt_only: bool (1 or B), whether only positions of the prompt attend to it, and none that is decoded; None
            means that all do.
    """

    tokens: Tensor
    gates: Tensor
    share: Tensor | None = None
    prompt_only: Tensor | None = None

    @classmethod
    def of(cls, tokens: Tensor, gates: Tensor, prompt_only: bool = False) -> "LayerPrefix":
        """Tokens (N, C) and gates (nh) for all rows, or (B, N, C) and (B, nh), which perhaps the prompt alone sees."""
        tokens, gates = by_row(tokens, 2), by_row(gates, 1)
        acts = torch.ones(gates.size(0), dtype=torch.bool, device=gates.device) if prompt_only else None
        return cls(tokens, gates, prompt_only=acts)

    def after_prompt(self) -> "LayerPrefix":
        """What is left of it once the prompt is over."""
        if self.prompt_only is None:
            return self
        return self._replace(gates=self.gates * ~self.prompt_only[:, None], prompt_only=None)

    def scaled(self, scale: float) -> "LayerPrefix":
        """The prefix with its contribution times a number."""
        return self._replace(gates=scale * self.gates)


class Update(Protocol):
    """What is added to the output of a projection: a named tuple of tensors (1 or B, ...); see the contract above."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added.

        Args:
            x: the projection's input, (B, T, in).
            y: its output as the base computes it, (B, T, out).

        Returns:
            Of a shape that broadcasts to (B, T, out), in the dtype of `y`.
        """
        ...

    def scaled(self, scale: float) -> "Update":
        """The update times a number."""
        ...


Updates = Mapping[str, tuple[Update, ...]]
NO_UPDATES: Updates = MappingProxyType({})


class LayerAdapter(NamedTuple):
    """What an adapter adds to one layer; nothing, unless said otherwise.

    Args:
        prefixes: what the attention attends to in addition to its sequence, each with a softmax of its own.
        updates: what is added to the outputs of projections, by the names in `PROJECTIONS`.
    """

    prefixes: tuple[LayerPrefix, ...] = ()
    updates: Updates = NO_UPDATES


class Adapter(Protocol):
    """Anything that says what it adds to each layer, such as an Aligner."""

    def layer(self, index: int) -> LayerAdapter:
        """What is added to layer `index`, counted from 0."""
        ...


def after_prompt(adapter: LayerAdapter) -> LayerAdapter:
    """What an adapter adds to what is decoded: prefixes for the prompt alone have closed gates."""
    if all(prefix.prompt_only is None for prefix in adapter.prefixes):
        return adapter
    return adapter._replace(prefixes=tuple(prefix.after_prompt() for prefix in adapter.prefixes))


class ExpandedPrefix(NamedTuple):
    """A prefix as the heads of one layer see it.

    Args:
        v: values (1 or B, nkv, N, hs). Of one token (1 or B, nh, 1, hs), times the gates: all that it adds.
        k: keys (1 or B, nkv, N, hs), not rotated. One token needs none, as its softmax is 1 for every query.
        gates: (1 or B, nh, 1, 1); None where `v` has been multiplied by them.
        share: (B, 1, T, 1), what the contribution is multiplied by at each position; None means 1 at all.
    """

    v: Tensor
    k: Tensor | None = None
    gates: Tensor | None = None
    share: Tensor | None = None


class ExpandedAdapter(NamedTuple):
    """What an adapter adds to one layer, with what is the same at every step of a generation worked out.

    Args:
        prefixes: their keys and values in this layer.
        updates: see `LayerAdapter`.
    """

    prefixes: tuple[ExpandedPrefix, ...] = ()
    updates: Updates = NO_UPDATES


def updated(projection: str, y: Tensor, x: Tensor, updates: Updates) -> Tensor:
    """The output `y` of a projection of `x`, with all that an adapter adds to it."""
    added = [update(x, y) for update in updates.get(projection, ())]
    return y + sum(added[1:], added[0]) if added else y
