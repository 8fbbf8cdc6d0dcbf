"""A method and a scale for a merge, chosen by what each input keeps of its own adapter on a user's rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedfrom.errors import BadInput
from fedfrom.files.chosen import Chosen, Prepared
from fedfrom.files.folders import CONFIG, Model, open_model, read_json
from fedfrom.files.heads import Head, head_keys
from fedfrom.tuning.answers import ACCURACY, LOSS, SPEARMAN, Answers
from fedfrom.tuning.candidates import SCALES, Candidate, body_of, candidates
from fedfrom.tuning.choice import Input, difference, mean_share
from fedfrom.tuning.halving import halved, highest, scales
from fedfrom.tuning.network import CAUSAL, CLASSIFIER, Body, Network, classes
from fedfrom.tuning.outcome import Outcome, Tried
from fedfrom.tuning.refit import check_biases, with_biases
from fedfrom.tuning.rows import Rows, class_numbers, read_rows, real_numbers
from fedfrom.tuning.scoring import Data, Scoring

_SEED = 0  # of the order of rows: a file may be sorted by class


@dataclass(kw_only=True)
class Tuner:
    """Chooses method and scale for `merge_folders`; the fields are the options of the command line.

    Attributes
    ----------
    files : Sequence[str]
        One file of rows an input, or one for all.
    base : str | None
        The base model; None is what the adapters name.
    asked : Candidate | None
        The method, where it is not to be chosen.
    scale : float | None
        The scale, where it is not to be chosen.
    common : Mapping[str, Any]
        Options of every method: rank, solver, examples_power.
    refit_bias : bool
        Fit each head's bias to the rows.
    max_length : int
        Tokens of a row, at most.
    device : str | None
        Where the model runs; None is a GPU where there is one.
    progress : Callable[[int, int], None] | None
        Called with the numbers of rows that were scored, and that are to be.
    say : Callable[[str], None] | None
        Called with a line after each method.
    outcome : Outcome | None
        What was found, once called.
    """

    files: Sequence[str]
    base: str | None = None
    asked: Candidate | None = None
    scale: float | None = None
    common: Mapping[str, Any] = field(default_factory=dict)
    refit_bias: bool = False
    max_length: int = 256
    device: str | None = None
    progress: Callable[[int, int], None] | None = None
    say: Callable[[str], None] | None = None
    outcome: Outcome | None = None

    def __call__(self, models: Sequence[Model], heads: Sequence[Head], prepared: Prepared) -> Chosen:
        """Return what scores best.

        Parameters
        ----------
        models : Sequence[Model]
            The inputs: adapters of classifiers, or of causal language models.
        heads : Sequence[Head]
            Each input's head.
        prepared : Prepared
            Returns the inputs' merge by a method.

        Raises
        ------
        BadInput
            Names the input or the file, what was expected, what was found and what to do.
        """
        task = self._task(models)
        tried = candidates(self.common, self.asked)
        # what can't be merged is refused before minutes of scoring; nothing is merged yet
        merges = [prepared(each.method) for each in tried]
        files = {name: read_rows(name) for name in self.files}
        every = [files[name] for name in (self.files if len(self.files) > 1 else list(self.files) * len(models))]
        base = self._base(models)
        outputs = [0 if task == CAUSAL else _outputs(head, base) for head in heads]
        if self.refit_bias:
            check_biases(models, heads, outputs)
        checked = [_labels(*each, base) for each in zip(models, every, outputs, strict=True)]
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = Network(base.name, str(base.folder), task, models, heads, device, self.max_length)
        data = [_tokenised(network, rows, *known) for rows, known in zip(every, checked, strict=True)]
        run = Scoring(network, data, task == CAUSAL, self.progress)
        grid = [self.scale] if self.scale is not None else scales(SCALES)
        run.expect(len(grid), len(tried))
        inputs = self._inputs(models, heads, run)
        results = []
        for number, (candidate, layers) in enumerate(zip(tried, merges, strict=True), 1):
            network.load(str(candidate), body_of(layers, head_keys(models[0])))
            results.append(self._searched(candidate, inputs, run, grid))
            if self.say is not None:
                found = results[-1]
                self.say(f"{number} of {len(tried)}: {candidate} keeps {found.share:.3f} at scale {found.scale:g}")
        best = max(results, key=lambda each: each.share) if self.asked is None else results[-1]
        if not np.isfinite(best.share):
            raise BadInput(f"--tune: expected finite outputs of a merged model, found none with {best.candidate}")
        gain = difference(inputs, best.answers, results[0].answers, self.refit_bias)
        own = with_biases(heads, best.answers) if self.refit_bias else heads
        written = own if any(heads) else []
        whole = None
        if head_keys(models[0]) and len(self.files) == 1:
            network.load("the merge", body_of(merges[results.index(best)], head_keys(models[0])))
            network.at(best.scale)
            whole = run.answer(0, head=network.add_merged_head(best.scale)).score()
        agree = bool(head_keys(models[0]))
        self.outcome = Outcome(inputs, results, best, gain, self.refit_bias, any(map(bool, heads)), agree, whole)
        return Chosen(best.candidate.method, best.scale, written, self.outcome.card(), self.outcome.record())

    def _task(self, models: Sequence[Model]) -> str:
        if not models[0].is_adapter:
            raise BadInput(
                f"--tune: expected adapters, found a checkpoint, {models[0].name}: give --method and --server-lr "
                "instead"
            )
        task = models[0].config.get("task_type")
        if task not in (CLASSIFIER, CAUSAL):
            raise BadInput(
                f"{models[0].name}: expected task_type {CLASSIFIER} or {CAUSAL} in adapter_config.json with --tune, "
                f"found {task!r}: only sequence classifiers and causal language models can be scored"
            )
        if len(self.files) not in (1, len(models)):
            raise BadInput(
                f"--tune: expected one file for all inputs, or one an input, {len(models)}, found {len(self.files)}"
            )
        return task

    def _base(self, models: Sequence[Model]) -> Model:
        named = [model.config for model in models if model.config.get("base_model_name_or_path")]
        name = self.base or (str(named[0]["base_model_name_or_path"]) if named else None)
        if name is None:
            raise BadInput(
                "--base: expected the model that the adapters were trained on, which adapter_config.json does not "
                "name, found none: pass --base MODEL"
            )
        if self.base is None and named[0].get("revision"):
            name = f"{name}@{named[0]['revision']}"
        try:
            return open_model(name)
        except BadInput as error:
            raise BadInput(f"base model {error}; another folder or name can be given as --base") from None

    def _inputs(self, models: Sequence[Model], heads: Sequence[Head], run: Scoring) -> list[Input]:
        """Return what each input's own adapter and the constant answer, or the base model, score."""
        bases = run.answers() if run.causal else None
        found = []
        for place, model in enumerate(models):
            keys = set(head_keys(model).values())
            state = {key: model.tensors[key] for key in model.tensors if key not in keys}
            run.network.load(model.name, Body(state, model.config))
            own, of = run.answer(place), run.data[place]
            start = None if bases is None else bases[place]
            constant = own.constant() if start is None else start.score()
            found.append(Input(model.name, of.rows, len(of.tokens), of.metric, own.score(), constant))
        if not any(known.is_counted for known in found):
            than = "the base model" if run.causal else "a constant answer"
            raise BadInput(
                f"--tune: expected an input whose own adapter is better than {than} on its rows, found none "
                f"({found[0].name}: {found[0].shown(found[0].own)} against {found[0].shown(found[0].constant)}): are "
                "they the right rows and the right labels?"
            )
        return found

    def _searched(self, candidate: Candidate, inputs: Sequence[Input], run: Scoring, grid: Sequence[float]) -> Tried:
        """Return a method's best scale; its merge is loaded."""
        known: dict[tuple[float, str], list[Answers | None]] = {}

        def part(name: str, scale: float) -> list[Answers | None]:
            if (scale, name) not in known:
                run.network.at(scale)
                known[scale, name] = run.answers(name)
            return known[scale, name]

        def first(scale: float) -> list[Answers]:
            return [answers for answers in part("first", scale) if answers is not None]  # no input is without

        def every(scale: float) -> list[Answers]:
            parts = zip(first(scale), part("rest", scale), strict=True)
            return [few if rest is None else few.followed_by(rest) for few, rest in parts]

        def few_share(scale: float) -> float:
            return mean_share(inputs, first(scale), self.refit_bias)

        def share(scale: float) -> float:
            return mean_share(inputs, every(scale), self.refit_bias)

        best, trials = halved(grid, few_share, share) if run.is_parted else highest(grid, share)
        return Tried(candidate, best, share(best), every(best), trials)


def _outputs(head: Head, base: Model) -> int:
    """Return the number of a head's outputs, without one that of the base's."""
    labels = base.config.get("id2label")
    return classes(head, len(labels) if isinstance(labels, Mapping) else int(base.config.get("num_labels") or 2))


def _labels(model: Model, rows: Rows, outputs: int, base: Model) -> tuple[str, NDArray[Any]]:
    """Return the metric of an input, by its head's number of outputs (0: a language model), and its rows' labels."""
    if outputs == 0:
        if rows.pairs is not None:
            raise BadInput(f"--tune {rows.path}: expected one column of texts for a language model, found pairs")
        return LOSS, np.zeros(len(rows))
    if outputs == 1:
        return SPEARMAN, np.array(real_numbers(rows))
    own = model.folder / CONFIG
    config = read_json(own) if own.is_file() else base.config
    names = config.get("label2id")
    known = names if isinstance(names, Mapping) and len(names) == outputs else {}
    return ACCURACY, np.array(class_numbers(rows, outputs, {str(name): int(known[name]) for name in known}))


def _tokenised(network: Network, rows: Rows, metric: str, labels: NDArray[Any]) -> Data:
    """Return an input's rows in the order in which they are used; of a language model those with a token to predict."""
    tokens = network.tokens(rows.texts, rows.pairs)
    order = random.Random(_SEED).sample(range(len(rows)), len(rows))
    if metric == LOSS:
        order = [row for row in order if len(tokens[row]["input_ids"]) > 1]
        if len(order) < 2:
            raise BadInput(f"--tune {rows.path}: expected at least two rows of two tokens or more, found {len(order)}")
    return Data(rows.path, [tokens[row] for row in order], labels[order], metric)
