"""The model that is fine-tuned: the first layers of a pretrained encoder, a head, and LoRA or all weights trained."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfrom.errors import BadInput
from simulations import assets
from simulations.options import DEFAULT_MODEL, Options

HEADS = ("classifier", "score")  # what transformers calls a sequence classification head


@dataclass(frozen=True)
class Head:
    """The head's outputs: a number of classes, or one real number."""

    num_labels: int
    regression: bool


class MeanPoolingClassifier(nn.Module):
    """A linear head on the mean of the encoder's token vectors, without padding.

    Sentence encoders are trained for this mean. It separates classes after tens of steps; a head on the first token's
    vector needs about three times as many.
    """

    def __init__(self, encoder: Any, head: Head) -> None:
        super().__init__()
        self.config = encoder.config  # PEFT chooses its default target modules by the model type
        self.encoder = encoder
        self.classifier = nn.Linear(int(encoder.config.hidden_size), head.num_labels)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits, (batch, number of labels)."""
        tokens = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits: Tensor = self.classifier(pooled)
        return logits


def source(options: Options) -> str:
    """Return the folder or Hub name that transformers loads the model from."""
    if options.model == DEFAULT_MODEL:
        return str(assets.model_folder())
    folder = os.path.expanduser(options.model)
    return folder if os.path.exists(folder) else options.model


def pooling(options: Options) -> str:
    """Return "mean" or "head"; for `--pooling auto`, "mean" where the model's modules.json has a pooling module.

    Raises
    ------
    BadInput
        The model's name is neither a folder nor one the Hub could have.
    """
    if options.pooling != "auto":
        return options.pooling
    if os.path.isdir(source(options)):
        modules = Path(source(options)) / "modules.json"
    else:
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(
                options.model,
                "modules.json",
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except (OSError, ValueError) as error:
            raise _unreadable(options, "configuration", error) from None
        modules = Path(found) if found else Path()
    if not modules.is_file():
        return "head"
    try:
        kinds = [str(module.get("type", "")) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(options, "modules.json", error) from None
    return "mean" if any(kind.endswith("Pooling") for kind in kinds) else "head"


def tokenizer(options: Options) -> Any:
    """Return the model's tokenizer.

    Raises
    ------
    BadInput
        The model's folder or Hub name has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source(options))
    except Exception as error:  # transformers and the Hub's client raise a dozen unrelated types
        raise _unreadable(options, "tokenizer", error) from None


def base_model(options: Options, head: Head) -> nn.Module:
    """Return the pretrained encoder with a fresh head, cut to the layers asked for, without LoRA.

    The same options give the same weights in every process: weights missing in the checkpoint are drawn from the seed.

    Raises
    ------
    BadInput
        The model can't be read, or has fewer layers than asked for.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    mean = pooling(options) == "mean"
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        try:
            config = AutoConfig.from_pretrained(source(options))
            _cut(config, options)
            if not mean:
                config.num_labels = head.num_labels
                config.problem_type = "regression" if head.regression else "single_label_classification"
            kind = AutoModel if mean else AutoModelForSequenceClassification
            # use_safetensors: a pickle is never loaded
            model: Any = kind.from_pretrained(source(options), config=config, dtype=torch.float32, use_safetensors=True)
        except BadInput:
            raise
        except Exception as error:  # as above
            raise _unreadable(options, "model", error) from None
        if not mean:
            return model
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # the mean does not use it; with --full its bytes would be sent in vain
        return MeanPoolingClassifier(model, head)


def _cut(config: Any, options: Options) -> None:
    if options.kept_layers:
        found = getattr(config, "num_hidden_layers", None)
        if found is None or options.kept_layers > found:
            raise BadInput(f"--layers {options.kept_layers}: model {options.model} has {found or 'no such'} layers")
        config.num_hidden_layers = options.kept_layers


def build(options: Options, head: Head, rank: int | None = None) -> nn.Module:
    """Return the model that a client of the given rank trains, or the server's.

    Parameters
    ----------
    options : Options
        Name the model, LoRA's settings, and the seed of the initial weights.
    head : Head
        The task's head.
    rank : int, optional
        LoRA's r; None for the server's. lora_alpha is proportional to it: all ranks have the same scaling.

    Returns
    -------
    nn.Module
        A PeftModel, or the plain model with `--full`.

    Raises
    ------
    BadInput
        The model can't be read, or lacks the modules of `--lora-targets`.
    """
    model = base_model(options, head)
    return model if options.full else adapt(model, options, rank or options.server_rank)


def adapt(model: nn.Module, options: Options, rank: int, own_head: bool = True) -> nn.Module:
    """Return the model with a fresh LoRA adapter, its other weights frozen.

    Parameters
    ----------
    model : nn.Module
        From `base_model`; it is changed in place.
    options : Options
        The adapter's modules and scaling, and the seed of its weights.
    rank : int
        LoRA's r.
    own_head : bool (default: True)
        Train a copy of the head beside the adapter. False: the head is frozen and shared.

    Raises
    ------
    BadInput
        The model lacks the modules of `--lora-targets`.
    """
    from peft import LoraConfig, get_peft_model

    share = rank / options.server_rank
    alpha = options.lora_alpha * (share**0.5 if options.rslora else share)
    own_heads = [name for name in HEADS if hasattr(model, name)]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=options.lora_dropout,
        target_modules=list(options.lora_targets) or None,
        use_rslora=options.rslora,
        use_dora=options.dora,
        modules_to_save=own_heads if own_head else None,
        exclude_modules=own_heads,
    )
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        try:
            adapted: Any = get_peft_model(model, config)
        except ValueError as error:
            raise BadInput(f"--lora-targets: {str(error).splitlines()[0]}") from None
    adapted.peft_config["default"].base_model_name_or_path = options.model
    return adapted


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that messages carry: the adapter and the head, or every weight of a plain model."""
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(model, PeftModel):
        # "auto" would ask the Hub for the embedding's size.
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return dict(model.state_dict())


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of `trained_state` into a model of the same options."""
    from peft import PeftModel, set_peft_model_state_dict

    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(state))
    else:
        model.load_state_dict(state)


def logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return (batch, number of labels) logits, from a model of transformers or from a plain tensor."""
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def _unreadable(options: Options, what: str, error: Exception) -> BadInput:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BadInput(f"--model {options.model}: can't load its {what} ({reason}); give a folder, a Hub name or minilm")
