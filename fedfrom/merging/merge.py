"""The driver: walks the layers of n clients' states, one layer at a time, whatever the states are read from."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedfrom.merging.adapters import merge_adapter
from fedfrom.merging.clients import Client, Round, clients_of
from fedfrom.merging.inputs import check_clip, check_inputs, check_numbers, check_server_lr
from fedfrom.merging.linalg import blocks
from fedfrom.merging.linalg.threads import begin, one_thread_each
from fedfrom.merging.methods.base import Method, ProductMethod, Survey
from fedfrom.merging.methods.registry import check_method, make_method
from fedfrom.merging.peft.configs import output_config
from fedfrom.merging.peft.layers import State
from fedfrom.merging.report import LayerReport, MergeReport
from fedfrom.merging.sources import Inputs, check_result
from fedfrom.merging.survey import survey
from fedfrom.merging.tensors import keep, merge_tensors
from fedfrom.merging.weighing import SAFE

# entries of what is held of the tensors that are merged before the first of them is handed on, in float32: their
# results, of small ones all clients' updates in float64, and the cosines of their pairs
_BATCH = 1 << 23


def merge(
    states: Sequence[State],
    reference: State | None = None,
    method: str | Method = "from",
    *,
    received: Sequence[State | None] | None = None,
    configs: Sequence[Any] | None = None,
    reference_config: Any = None,
    examples: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    server_lr: float | str = 1.0,
    clip: float | None = None,
    as_reference: bool = False,
    names: Sequence[str] | None = None,
    statistics: Sequence[State | None] | None = None,
    dora: bool = False,
    same_base: bool = False,
    **options: Any,
) -> tuple[dict[str, Tensor], MergeReport]:
    """Merge the states of n clients into one: W + alpha theta*, layer by layer (Eq. 5; adapters by Eq. 6).

    Parameters
    ----------
    states : Sequence[Mapping[str, Tensor]]
        W_i: what each client sends, at least one: adapters' state dicts, full state dicts, or both mixed. A mapping may
        read its tensors when asked for them: one layer is held at a time. One that has a method `reader` (key ->
        `blocks.Reader`) has its plain tensors read a block at a time. Never changed.
    reference : Mapping[str, Tensor] | None (default: None)
        W, the global state; None is zero, which is right for fresh adapters. Layers that it lacks have none; those that
        the clients lack are not in the result.
    method : str | Method (default: "from")
        A name of `methods()`, with its options as further keywords, or a method object.
    received : Sequence[Mapping | None] | None (default: None)
        ref_i for each client that was sent something else than W (a smaller rank); None, there or in all, is W.
    configs : Sequence | None (default: None)
        An adapter config a client (adapter_config.json as a mapping, or a LoraConfig): gives each module's scaling.
        Without them all ranks must be equal and one scaling is assumed, which cancels (but not between adapters and
        plain tensors: scope="model" needs them for states that hold both). Norms in the report are then without it.
    reference_config : optional
        The adapter config of `reference` and `received`; needed with `configs` where the reference has adapters.
    examples : Sequence[float] | None (default: None)
        n_i > 0; None takes all for equal, whatever the method's examples_power.
    weights : Sequence[float] | None (default: None)
        u_i, one finite number a client, >= 0 and at least one above 0: multiplies what the method gives the client.
        None is 1 each. Most methods divide by the sum over clients, as FroM does: w_i = u_i n_i^p ||theta_i||^k /
        sum_j u_j n_j^p ||theta_j||^k. Task Arithmetic, TIES, DARE (but "dare-from") and KnOTS do not, unless in the
        form "mean": u_i multiplies theta_i as it is, and weights of 2 double the update. This is PEFT's convention.
        Buffers, and tensors without a reference, are always a mean. A client of weight 0 adds nothing to the result,
        but it has a say in three things: the median of `clip`; the signs that TIES elects, and the counts that it
        divides by; and which entries DARE draws for the others.
    server_lr : float | str (default: 1.0)
        alpha >= 0. "safe" takes in each layer the most, up to 1, that keeps rounds from swinging:
        alpha (1 + k lambda_max) is at most 1.8. That is a bound for FroM and averages: a method's own coefficient is
        not in it.
    clip : float | None (default: None)
        In each layer no update counts for more than `clip` times the median of the clients' norms there: longer ones
        are shortened to it before they are weighed. The median leaves out norms of zero and negligible ones: see
        `weighing.clip_factors`. None: no bound. With k = infinity those that are shortened share the weight, half of
        the clients with clip=1.0; the largest update has it alone with None.
    as_reference : bool (default: False)
        Give adapters the reference's factor shapes and scaling, so that running clients can load them: `rank` then
        caps the rank of the product. False: factors of the merged rank, B carrying the scaling, and a `report.config`
        to match.
    names : Sequence[str] | None (default: None)
        What errors and the report call the clients; None: client 0, client 1, ...
    statistics : Sequence[Mapping[str, Tensor]] | None (default: None)
        What each client sends beside its state, for the methods that need it: Gram matrices by module name
        (`fedfrom.client.gram`) or Fisher diagonals by key (`fedfrom.client.fisher`).
    dora, same_base : bool (default: False)
        Accept DoRA, and initialisations that alter the base: see `configs.check_config`.
    **options
        The method's, where it is given by name.

    Returns
    -------
    tuple[dict[str, Tensor], MergeReport]
        The merged state, new tensors in the inputs' dtype and device (float64 or float32 inside), under the reference's
        keys (else the first client's); and what was done.

    Raises
    ------
    ValueError
        Names the client, the key, what was expected and what was found.

    Notes
    -----
    The order of clients changes nothing, to the bit: sums run in an order that comes from what each client sent (its
    delta's norm, or a cheap number of its factors; ties: examples, weight, then a digest of the content).
    """
    if isinstance(method, str):
        check_method(method, options, inspect.signature(merge).parameters)
    chosen = make_method(method, **options)
    clients = clients_of(
        states,
        received=received,
        configs=configs,
        examples=examples,
        weights=weights,
        names=names,
        statistics=statistics,
    )
    shared = Round(reference, reference_config, server_lr, clip, as_reference, dora, same_base)
    return merge_clients(clients, shared, chosen)


def merge_clients(clients: Sequence[Client], shared: Round, method: Method) -> tuple[dict[str, Tensor], MergeReport]:
    """Return what `merge` does, of clients as values."""

    def merged_of(places: list[int], chosen: Method) -> State:
        return merge_clients([clients[i] for i in places], replace(shared, empty=torch.empty), chosen)[0]

    _, weights = check_numbers(clients)
    selected = method.select(weights or [1.0] * len(clients), merged_of)
    if selected is not None:
        places, method = selected
        clients = [clients[i] for i in places]
    layers = layer_by_layer(clients, shared, method)
    merged: list[dict[str, Tensor]] = [{} for _ in layers.candidates]
    reports: list[list[LayerReport]] = [[] for _ in layers.candidates]
    for found in layers:
        for i, (part, report) in enumerate(found):
            merged[i].update(part)
            reports[i].append(report)
    best, validation = method.best(merged)
    return merged[best], layers.report(reports[best], best, validation)


@dataclass(frozen=True)
class LayerByLayer:
    """A merge whose inputs are checked, one layer after the other: what `merge` gathers, and others write as it comes.

    Attributes
    ----------
    inputs : Inputs
        What the clients sent; its `sent[0].layers` are the layers, in order.
    candidates : Sequence[Method]
        The method, or those that it chooses from.
    shared : Round
        What the clients share.
    """

    inputs: Inputs
    candidates: Sequence[Method]
    shared: Round

    def __iter__(self) -> Iterator[list[tuple[dict[str, Tensor], LayerReport]]]:
        """Yield each layer's merge by each candidate: new tensors by key, and what was done. Nothing is kept."""
        with one_thread_each():
            whole = survey(self.inputs, self.candidates[0], self.shared.clip)
        for batch in self._batches():
            with one_thread_each():  # not across the yield: it is the caller's thread
                found = _merge_batch(self, batch, whole)
            for part in batch:
                yield found.pop(part.name)  # whoever has it is the only one that does

    def _batches(self) -> Iterator[list[_Part]]:
        """Yield the layers: plain tensors as many at once as are small, all else one by one."""
        inputs, clients = self.inputs, len(self.inputs.sent)
        lazy = any(source.state.is_lazy for source in inputs.sent)
        is_read = any(source.state.is_read for source in inputs.sent)
        others = [source for source in (inputs.reference, *inputs.received) if source is not None]
        in_memory = not any(source.state.is_lazy or source.state.is_read for source in others)
        batch: list[_Part] = []
        taken = 0
        for name, layer in inputs.sent[0].layers.items():
            part, own = _Part(name), _BATCH
            if not layer.is_adapter:
                values = inputs.sent[0].values(name)
                size = values.numel()
                # what is read when it is asked for is held for one layer alone
                held = inputs.sent[0].state.is_read and isinstance(values, Tensor)
                part = _Part(name, values.dtype.is_floating_point, in_memory and not held, size if is_read else 0)
                if not lazy:
                    rows = 2 * clients * size if blocks.is_small(values) and part.is_light else 0
                    own = size + rows + (2 * clients**2 if part.is_light else 0)
            if batch and taken + own > _BATCH:
                yield batch
                batch, taken = [], 0
            batch.append(part)
            taken += own
        if batch:
            yield batch

    def report(
        self, layers: list[LayerReport], candidate: int = 0, validation: Sequence[tuple[float, float]] = ()
    ) -> MergeReport:
        """Return the report of the whole merge from one candidate's reports of all layers."""
        chosen = self.candidates[candidate]
        settings = {**chosen.settings(), "server_lr": self.shared.server_lr, "clip": self.shared.clip}
        if self.inputs.weights is not None:
            settings["weights"] = self.inputs.weights
        config = _config(self.inputs, layers, keep=self.shared.as_reference or chosen.on_factors)
        clients = [source.who for source in self.inputs.sent]
        return MergeReport(settings, clients, layers, config, list(validation))


def layer_by_layer(clients: Sequence[Client], shared: Round, method: Method) -> LayerByLayer:
    """Return the merge that `merge` does, to be run a layer at a time; raises as `merge` does.

    A method that selects clients first merges many times, and can't be run so. Of one with several candidates, such as
    FroM's with k="auto", each layer comes once for each.
    """
    check_server_lr(shared.server_lr)
    check_clip(shared.clip)
    inputs = check_inputs(clients, shared, method.needs, pair=not method.on_factors)
    reference, first = inputs.reference, inputs.sent[0]
    if shared.as_reference and (reference is None or reference.layers.keys() != first.layers.keys()):
        raise ValueError("as_reference: expected a reference with the clients' layers, found none or others")
    candidates = method.candidates()
    if shared.server_lr == SAFE and math.isinf(candidates[-1].k):
        raise ValueError(
            "server_lr: expected a number with k = infinity, found 'safe': no step above 0 is within its bound"
        )
    return LayerByLayer(inputs, candidates, shared)


class _Part(NamedTuple):
    """A layer of a batch; plain tensors are floating or kept, and light where no client's values are held for them."""

    name: str
    is_floating: bool = False
    is_light: bool = False
    entries_to_read: int = 0


def _merge_batch(
    asked: LayerByLayer, batch: list[_Part], whole: Survey
) -> dict[str, list[tuple[dict[str, Tensor], LayerReport]]]:
    """Return each of these layers merged by each method, by key, and what was done."""
    inputs, methods, shared = asked.inputs, asked.candidates, asked.shared

    def merged(parts: list[_Part]) -> list[list[tuple[dict[str, Tensor], LayerReport]]]:
        names, sizes = [part.name for part in parts], [part.entries_to_read for part in parts]
        return merge_tensors(inputs, names, methods, shared, whole, sizes)

    light = [part for part in batch if part.is_floating and part.is_light]
    apart = [part for part in batch if part.is_floating and not part.is_light]
    waiting = [begin(part.entries_to_read, partial(merged, [part])) for part in apart]
    found = dict(zip([part.name for part in light], merged(light), strict=True))
    found |= {part.name: wait()[0] for part, wait in zip(apart, waiting, strict=True)}
    for name in [part.name for part in batch if not part.is_floating]:
        if inputs.sent[0].layers[name].is_adapter:
            # methods on factors see no adapters
            products = [method for method in methods if isinstance(method, ProductMethod)]
            found[name] = merge_adapter(inputs, name, products, shared, whole)
            for part, _ in found[name]:
                for key, tensor in part.items():
                    check_result(key, tensor, not tensor.is_floating_point() or blocks.is_finite(tensor))
        else:
            found[name] = [keep(inputs, name)] * len(methods)
    return found


def _config(inputs: Inputs, reports: list[LayerReport], keep: bool) -> dict[str, Any] | None:
    """Return the adapter config that goes with the result, None where none was given or there is no adapter."""
    given = inputs.sent[0].config
    if keep and inputs.reference is not None and inputs.reference.config is not None:
        given = inputs.reference.config
    ranks = {report.name: report.rank_out for report in reports if report.kind == "adapter"}
    if given is None or keep or not ranks:
        return given
    return output_config(given, ranks)
