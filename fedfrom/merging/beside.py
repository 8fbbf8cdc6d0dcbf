"""What lies beside a LoRA module's factors: lora_B's bias and DoRA's magnitudes, merged by the module's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfrom.merging.clipping import clip_factors
from fedfrom.merging.linalg import sums
from fedfrom.merging.linalg.norms import delta_norms
from fedfrom.merging.linalg.rounding import is_rounding, rescaled
from fedfrom.merging.sources import Inputs, Source, check_finite
from fedfrom.merging.stability import Weighing


def merge_beside(
    inputs: Inputs, name: str, part: str, weighing: Weighing, order: Sequence[int], clip: float | None, scaling: float
) -> Tensor:
    """Return what goes with a LoRA module, merged by the module's weights and clipped to its own median norm.

    Parameters
    ----------
    inputs : Inputs
        What the clients sent and were sent.
    name, part : str
        The module, and "bias" (lora_B.bias, which acts as s * bias) or "magnitude" (DoRA's).
    weighing : Weighing
        The module's weights, in the order of sums, and its server learning rate.
    order : Sequence[int]
        Clients in that order.
    clip : float | None
        See `clipping.clip_factors`.
    scaling : float
        s of the config that the result goes with.
    """
    is_bias = part == "bias"
    W, received = inputs.reference_of(name), inputs.received_of(name)
    check_finite([W, *received, *inputs.sent], name, [part])

    def held(source: Source, own: float) -> Tensor:
        """Return what a client of that scaling holds, in the dtype that it came in."""
        tensor = source.tensor(name, part)
        return rescaled(tensor, source.scaling(name) / own) if is_bias else tensor

    def acting(tensor: Tensor, own: float) -> Tensor:
        return tensor.to(torch.float64) * (own if is_bias else 1.0)

    values, references = [], []
    for sent, source in zip(inputs.sent, received, strict=True):
        own, found = sent.scaling(name), sent.tensor(name, part)
        reference = None if source is None else held(source, own)
        is_rescaled = is_bias and source is not None and own != source.scaling(name)
        if is_rescaled and reference is not None and is_rounding(found, reference.to(torch.float64)):
            found = reference
        values.append(acting(found, own))
        references.append(None if reference is None else acting(reference, own))
    norms = delta_norms(list(zip(values, references, strict=True)))
    # without a reference a magnitude is no update, and has nothing to be clipped
    factors = clip_factors(norms, None if W is None else clip)
    total, _, _ = sums.weighted_sum(
        [values[i] for i in order],
        [references[i] for i in order],
        [w * factors[i] for w, i in zip(weighing.weights.tolist(), order, strict=True)],
        None if W is None else acting(W.tensor(name, part), W.scaling(name)),
        # nor anything that the server scales; a bias without one is an update of zero, as its product is
        weighing.server_lr if is_bias or W is not None else 1.0,
    )
    return (total / scaling if is_bias else total).to(inputs.template(name).tensor(name, part).dtype)
