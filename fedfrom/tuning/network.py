"""The base model as transformers and PEFT run it, with one adapter at a time and one input's head at a time."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfrom.errors import BadInput
from fedfrom.files.folders import Model
from fedfrom.files.heads import Head
from fedfrom.merging.peft.configs import PREFIX
from fedfrom.merging.peft.layers import find_layers

CLASSIFIER, CAUSAL = "SEQ_CLS", "CAUSAL_LM"
_BATCH = 32
_LOGITS = 1 << 25  # a language model's logits at once, in entries

Tokens = list[dict[str, list[int]]]
"""For each row what the model takes: input_ids and the like."""


@dataclass(frozen=True)
class Body:
    """An adapter, or what adapters were merged into.

    Attributes
    ----------
    state : Mapping[str, Tensor]
        As on disk; the factors, and the tensors that are no head.
    config : Mapping[str, Any]
        Its adapter config.
    references : Mapping[str, Tensor]
        Key -> the base's tensor, of the tensors that a scale moves away from it; others than factors stay as they are.
    head, head_references : Mapping[str, Tensor]
        The merged head where there is one, and the base's.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    references: Mapping[str, Tensor] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    head_references: Mapping[str, Tensor] = field(default_factory=dict)


class Network:
    """A base model in evaluation mode.

    Parameters
    ----------
    name : str
        What errors call the base model.
    base : str
        Its folder. Only safetensors are read.
    task : str
        CLASSIFIER or CAUSAL.
    models : Sequence[Model]
        The inputs.
    heads : Sequence[Head]
        Each input's head; empty dicts of language models.
    device : str
        Where it runs.
    max_length : int
        Tokens of a row, at most; the rest is cut off.

    Raises
    ------
    BadInput
        The base can't be loaded, or some of its weights are neither in it nor in an adapter.
    """

    def __init__(
        self,
        name: str,
        base: str,
        task: str,
        models: Sequence[Model],
        heads: Sequence[Head],
        device: str,
        max_length: int,
    ) -> None:
        self.base, self.device, self._task = name, device, task
        self._peft: Any = None
        self._name = ""
        self._scalings: list[tuple[dict[str, float], float]] = []
        self._moved: dict[str, Tensor] = {}
        self._body: Body | None = None
        with _quiet(), _one_line(f"base model {name!r}"):
            import transformers

            self.config = transformers.AutoConfig.from_pretrained(base)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_of(models[0], base))
            kind = (
                transformers.AutoModelForCausalLM if task == CAUSAL else transformers.AutoModelForSequenceClassification
            )
            more = {} if task == CAUSAL else {"num_labels": classes(heads[0], self.config.num_labels)}
            self.model, loaded = kind.from_pretrained(
                base,
                use_safetensors=True,
                dtype="auto",
                ignore_mismatched_sizes=task == CLASSIFIER,
                output_loading_info=True,
                **more,
            )
        fresh = {*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])}
        for model, head in zip(models, heads, strict=True):
            if lacking := sorted(fresh - set(head) - {name.removeprefix(PREFIX) for name in model.tensors}):
                raise BadInput(
                    f"{model.name}: expected {lacking[0]!r}, which base model {name!r} lacks, in the adapter, found "
                    "none: with weights drawn at random a score says nothing; train with it in modules_to_save"
                )
        self.model.to(device).eval()
        self._pad = next(
            (i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if isinstance(i, int)), 0
        )
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self._pad
        limits = [max_length, getattr(self.config, "max_position_embeddings", None), self._tokenizer.model_max_length]
        self._max_length = int(min(limit for limit in limits if limit))
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        own = [self._modules(model.name, head) for model, head in zip(models, heads, strict=True)]
        # an input that saved no head, or less of it than others, has the base's
        pretrained = {path: self.model.get_submodule(path) for head in own for path in head}
        self._heads = [{**pretrained, **head} for head in own]

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Tokens:
        """Return the tokens of rows, each cut to the largest length."""
        names = {"input_ids", "token_type_ids"} & set(self._tokenizer.model_input_names)
        given = (list(texts),) if pairs is None else (list(texts), list(pairs))
        found = self._tokenizer(*given, truncation=True, max_length=self._max_length)
        return [{name: list(found[name][row]) for name in names} for row in range(len(texts))]

    def load(self, name: str, body: Body) -> None:
        """Put an adapter in the place of the last one, at scale 1.

        Raises
        ------
        BadInput
            It does not fit the base model.
        """
        with _one_line(name):
            import peft

        layers = find_layers(body.state, name)
        factors = {key: body.state[key] for layer in layers.values() if layer.is_adapter for key in layer.keys.values()}
        modules = [layer.name.removeprefix(PREFIX) for layer in layers.values() if layer.is_adapter]
        there = {path.replace(".base_layer", "") for path, _ in self.model.named_modules()}
        if strange := [module for module in modules if module not in there]:
            raise BadInput(
                f"{name}: expected modules of base model {self.base!r}, found {strange[0]!r}, which it lacks: give the "
                "model that the adapters were trained on as --base"
            )
        # every module in full: what a pattern or "all-linear" means does not depend on the model then
        own: dict[str, Any] = {"target_modules": modules, "task_type": None, "modules_to_save": None, "bias": "none"}
        own |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None, "init_lora_weights": True}
        known = {each.name for each in fields(peft.LoraConfig) if each.init}
        given = {key: value for key, value in {**body.config, **own}.items() if key in known}
        last, self._name = self._name, f"adapter{1 + int(self._name.removeprefix('adapter') or 0)}"
        with _quiet(), _one_line(name):
            config = peft.LoraConfig(**given)
            if self._peft is None:
                self._peft = peft.PeftModel(self.model, config, adapter_name=self._name)
            else:
                self._peft.add_adapter(self._name, config)
                self._peft.set_adapter(self._name)
                self._peft.delete_adapter(last)
            peft.set_peft_model_state_dict(self._peft, factors, adapter_name=self._name)
        self._peft.to(self.device).eval()
        self._scalings = [
            (module.scaling, module.scaling[self._name])
            for module in self._peft.modules()
            if isinstance(getattr(module, "scaling", None), dict) and self._name in module.scaling
        ]
        self._body = body
        self.at(1.0)

    def at(self, scale: float) -> None:
        """Multiply the loaded adapter's updates by a scale."""
        assert self._body is not None
        for scalings, own in self._scalings:
            scalings[self._name] = own * scale
        with torch.no_grad():
            for key, start in self._moved.items():
                self._parameters[key].copy_(start)
            for key in self._body.state:
                if ".lora_" in key:
                    continue
                name, tensor = key.removeprefix(PREFIX), self._body.state[key]
                parameter = self._parameters.get(name)
                if parameter is None or parameter.shape != tensor.shape:
                    there = "none" if parameter is None else str(tuple(parameter.shape))
                    raise BadInput(
                        f"{key!r}, saved whole: expected one of shape {tuple(tensor.shape)} in base model "
                        f"{self.base!r}, found {there}: give the model that "
                        "the adapters were trained on, resized as it was, as --base"
                    )
                self._moved.setdefault(name, parameter.detach().clone())
                parameter.copy_(_scaled(tensor, self._body.references.get(key), scale))

    def add_merged_head(self, scale: float) -> int:
        """Return the place of the loaded merge's own head, at a scale."""
        assert self._body is not None
        moved = self._body.head_references
        head = {name: _scaled(tensor, moved.get(name), scale) for name, tensor in self._body.head.items()}
        self._heads.append(self._modules("the merged head", head))
        return len(self._heads) - 1

    def answer(self, tokens: Tokens, head: int, heard: Callable[[int], None]) -> NDArray[np.floating]:
        """Return the outputs on rows: (n, classes) logits under one input's head, or (n, 2) losses and tokens.

        Parameters
        ----------
        tokens : Tokens
            The rows.
        head : int
            The input's place.
        heard : Callable[[int], None]
            Called after each batch with its number of rows.
        """
        for path, module in self._heads[head].items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, module)
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]["input_ids"]))
        found: list[NDArray[np.floating]] = []
        start = 0
        while start < len(order):
            rows = order[start : start + _BATCH]
            if self._task == CAUSAL:
                longest = len(tokens[rows[-1]]["input_ids"])
                rows = rows[: max(1, _LOGITS // max(1, longest * self.model.config.get_text_config().vocab_size))]
            found.append(self._batch([tokens[row] for row in rows]))
            heard(len(rows))
            start += len(rows)
        outputs = np.concatenate(found)
        return outputs[np.argsort(order)]

    def _batch(self, rows: Tokens) -> NDArray[np.floating]:
        longest = max(len(row["input_ids"]) for row in rows)
        padded = {
            name: torch.tensor(
                [row[name] + [self._pad if name == "input_ids" else 0] * (longest - len(row[name])) for row in rows]
            ).to(self.device)
            for name in rows[0]
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = self.model(**padded, attention_mask=mask).logits
            if self._task == CLASSIFIER:
                return logits.float().cpu().numpy()
            predicted, right = logits[:, :-1].float(), padded["input_ids"][:, 1:]
            losses = nn.functional.cross_entropy(predicted.transpose(1, 2), right, reduction="none") * mask[:, 1:]
            return torch.stack([losses.double().sum(1), mask[:, 1:].sum(1).double()], 1).cpu().numpy()

    def _modules(self, name: str, head: Head) -> dict[str, nn.Module]:
        """Return modules of the model's kind with a head's weights, by path."""
        if not head:
            return {}
        import transformers

        config = copy.deepcopy(self.config)
        config.num_labels = classes(head, self.config.num_labels)
        with _quiet(), torch.device("meta"):
            empty = transformers.AutoModelForSequenceClassification.from_config(config)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in head.items():
            path, _, leaf = key.rpartition(".")
            parts.setdefault(path, {})[leaf] = tensor
        found: dict[str, nn.Module] = {}
        for path, own in parts.items():
            try:
                module = empty.get_submodule(path).to_empty(device=self.device)
                module.load_state_dict(own)
            except (AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise BadInput(
                    f"{name}, {path!r}: expected a head of {type(self.model).__name__}, found another ({reason}): "
                    "--tune scores what transformers' AutoModelForSequenceClassification loads"
                ) from None
            found[path] = module.to(self.model.dtype).eval()
        return found


def classes(head: Head, otherwise: int) -> int:
    """Return the number of outputs of a head: the least of its matrices' numbers of rows; of no head the other."""
    return min((tensor.shape[0] for tensor in head.values() if tensor.ndim == 2), default=otherwise)


def _scaled(tensor: Tensor, W: Tensor | None, scale: float) -> Tensor:
    """Return W + scale (tensor - W); the tensor itself where it has no reference W."""
    return tensor if W is None else (W.double() + scale * (tensor.double() - W.double())).to(tensor.dtype)


def _tokenizer_of(first: Model, base: str) -> str:
    """Return where the tokenizer is: in the first adapter's folder, or else with the base."""
    return str(first.folder) if os.path.isfile(first.folder / "tokenizer_config.json") else base


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Raise what transformers and PEFT say, many types and lines, as BadInput."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(f"--tune needs transformers and PEFT ({error}): pip install 'fedfrom[tune]'") from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"{what}: expected what transformers and PEFT load, found {type(error).__name__}: {reason}; give the model "
            "that the adapters were trained on as --base"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' reports and bars of loading, and PEFT's warnings, from the terminal."""
    import warnings

    try:
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise BadInput(f"--tune needs transformers and PEFT ({error}): pip install 'fedfrom[tune]'") from None
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
