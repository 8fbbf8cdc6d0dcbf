"""A BERT with random weights and a tokenizer of single words, on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_bert(folder: Path, words: Sequence[str], layers: int, **more: Any) -> Any:
    """Write a BERT of width 16 with so many layers, and return its tokenizer, which is written beside it.

    Parameters
    ----------
    folder : Path
        Of both.
    words : Sequence[str]
        All that the tokenizer knows beside BERT's own marks.
    layers : int
        Of the model.
    **more
        Of `BertConfig`.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **more,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    return tokenizer
