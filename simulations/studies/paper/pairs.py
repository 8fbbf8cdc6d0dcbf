"""A head on two sentences that are encoded apart, as sentence encoders are trained to encode them."""

from typing import Any

import torch
from torch import Tensor, nn

PARTS = 4  # of the head's input: u, v, |u - v| and u * v


class PairClassifier(nn.Module):
    """A linear head on [u, v, |u - v|, u * v], with u and v the sentences' mean token vectors at length sqrt(d).

    The head of InferSent (Conneau et al., 2017). A small encoder learns to compare two sentences by attention only
    after thousands of steps; the sentences' own vectors are comparable from the start.

    Parameters
    ----------
    encoder : nn.Module
        A BERT of transformers with PyTorch's attention, which accepts a boolean mask.
    num_labels : int
        Number of classes.
    """

    def __init__(self, encoder: Any, num_labels: int) -> None:
        super().__init__()
        self.config = encoder.config  # PEFT chooses its default target modules by the model type
        self.encoder = encoder
        self.classifier = nn.Linear(PARTS * int(encoder.config.hidden_size), num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return the logits, (batch, number of labels), of pairs as a BERT tokenizer joins them.

        The encoder takes both sentences at once. Tokens attend to their own sentence alone, and the positions of the
        second sentence start at 0.
        """
        second = token_type_ids * attention_mask
        first = attention_mask - second
        sentence = torch.where(attention_mask.bool(), second, -1)
        alone = (sentence[:, None, :] == sentence[:, :, None])[:, None]
        counted = torch.arange(input_ids.shape[1], device=input_ids.device)
        tokens = self.encoder(
            input_ids=input_ids,
            attention_mask=alone,
            position_ids=counted - second * first.sum(1, keepdim=True),
            token_type_ids=torch.zeros_like(token_type_ids),
        ).last_hidden_state
        u, v = _mean(tokens, first), _mean(tokens, second)
        logits: Tensor = self.classifier(torch.cat([u, v, (u - v).abs(), u * v], dim=-1))
        return logits


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the masked tokens, (batch, d), scaled to length sqrt(d)."""
    summed = (tokens * mask.unsqueeze(-1).to(tokens.dtype)).sum(1)
    return nn.functional.normalize(summed, dim=-1) * float(tokens.shape[-1] ** 0.5)
