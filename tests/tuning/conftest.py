"""Tiny base models, adapters that learnt something on them, and files of rows."""

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import write_bert

WORDS = ("good", "great", "fine", "bad", "poor", "dull", "film", "plot", "song", "the", "a", "is", "was")
ROWS = 60


@dataclass(frozen=True)
class Trained:
    """Adapters of one base model and rows for each."""

    base: Path
    adapters: tuple[Path, ...]
    rows: tuple[Path, ...]
    classes: tuple[int, ...]

    @property
    def inputs(self) -> list[str]:
        return [str(path) for path in self.adapters]

    @property
    def tune(self) -> list[str]:
        return [word for path in self.rows for word in ("--tune", str(path))]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def words_of(generator: random.Random) -> list[str]:
    return generator.choices(WORDS, k=generator.randint(4, 7))


def _sentiment(words: list[str]) -> int:
    return int(sum(w in WORDS[:3] for w in words) > sum(w in WORDS[3:6] for w in words))


def _topic(words: list[str]) -> int:
    return max(range(3), key=lambda i: (words.count(WORDS[6 + i]), -i))


def _length(words: list[str]) -> int:
    return int(len(words) > 5)


def train(model: Any, batch: Callable[[], dict[str, torch.Tensor]], lr: float) -> None:
    """Train what is not frozen for sixty steps."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(60):
        model(**batch()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three adapters of two, three and two classes on one BERT, trained a little, each under a head of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("classifiers")
    base = root / "base"
    tokenizer = write_bert(base, WORDS, layers=2, initializer_range=0.2)
    adapters, files = [], []
    tasks = (("sentiment", _sentiment, 2), ("topic", _topic, 3), ("length", _length, 2))
    for name, right, classes in tasks:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
        lora = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
        model = get_peft_model(model, lora)
        generator = random.Random(name)

        def batch(right: Any = right, generator: random.Random = generator) -> dict[str, torch.Tensor]:
            words = [words_of(generator) for _ in range(32)]
            tokens = tokenizer([" ".join(each) for each in words], padding=True, return_tensors="pt")
            return {**tokens, "labels": torch.tensor([right(each) for each in words])}

        train(model, batch, lr=3e-2)
        model.save_pretrained(root / name)
        adapters.append(root / name)
        words = [words_of(generator) for _ in range(ROWS)]
        rows = [[" ".join(each), right(each)] for each in words]
        files.append(write_csv(root / f"{name}.csv", ["text", "label"], rows))
    return Trained(base, tuple(adapters), tuple(files), tuple(classes for _, _, classes in tasks))


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two adapters of a GPT-2 with random weights, each trained for a few steps on texts of its own kind."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("language-models")
    words = ["<end>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    base = root / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters, files = [], []
    for name, ring in (("praise", WORDS[:3]), ("things", WORDS[6:9])):
        torch.manual_seed(1)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        )
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), lora)
        generator = random.Random(name)

        def text(ring: Sequence[str] = ring, generator: random.Random = generator) -> str:
            start = generator.randrange(3)
            return " ".join(ring[(start + i) % 3] for i in range(generator.randint(5, 9)))

        def batch(text: Any = text) -> dict[str, torch.Tensor]:
            rows = [tokenizer(text())["input_ids"] for _ in range(16)]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

        train(model, batch, lr=5e-2)
        model.save_pretrained(root / name)
        adapters.append(root / name)
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text()}) + "\n" for _ in range(ROWS)))
        files.append(path)
    return Trained(base, tuple(adapters), tuple(files), (0, 0))
