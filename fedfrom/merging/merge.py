"""The driver: walks the layers of n clients' states, one layer at a time, whatever the states are read from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedfrom.merging.batches import Layers, Results, batches, merge_batch
from fedfrom.merging.clients import Client, Round, clients_of
from fedfrom.merging.inputs import check_clip, check_inputs, check_numbers, check_safe, check_server_lr
from fedfrom.merging.linalg.threads import one_thread_each
from fedfrom.merging.methods.base import Method
from fedfrom.merging.methods.registry import check_method, make_method
from fedfrom.merging.oversize import warn_of_size
from fedfrom.merging.peft.configs import output_config
from fedfrom.merging.peft.layers import State
from fedfrom.merging.report import LayerReport, MergeReport
from fedfrom.merging.sources import Inputs
from fedfrom.numeric import plain


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
        sum_j u_j n_j^p ||theta_j||^k. Task Arithmetic, TIES, DARE (but "dare-from"), KnOTS, TSV-M, Iso and Core Space
        do not, unless in the form "mean": u_i multiplies theta_i as it is, and weights of 2 double the update. This is
        PEFT's convention. Buffers, and tensors without a reference, are always a mean. A client of weight 0 adds
        nothing to the result, but it has a say in three things: the median of `clip`; the signs that TIES elects, and
        the counts that it divides by; and which entries DARE draws for the others.
    server_lr : float | str (default: 1.0)
        alpha >= 0. "safe" takes in each layer the most, up to 1, that keeps rounds from swinging:
        alpha (1 + k lambda_max) is at most 1.8 (with FroM's coefficient c: alpha |c| (1 + k lambda_max)). That is a
        bound for FroM and averages: other methods' coefficients are not in it.
    clip : float | None (default: None)
        In each layer no update counts for more than `clip` times the median of the clients' norms there: longer ones
        are shortened to it before they are weighed. The median leaves out norms of zero and negligible ones: see
        `clipping.clip_factors`. None: no bound. With k = infinity those that are shortened share the weight, half of
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
    shared = Round(reference, reference_config, plain(server_lr), plain(clip), as_reference, dora, same_base)
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
    return merged[best], layers.report(reports[best], best, validation, list(method.search or ()))


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

    def __iter__(self) -> Iterator[Results]:
        """Yield each layer's merge by each candidate: new tensors by key, and what was done. Nothing is kept."""
        with one_thread_each():
            known = self.candidates[0].survey(Layers(self.inputs, self.shared))
            methods = [method.knowing(known) for method in self.candidates]
        for batch in batches(self.inputs):
            with one_thread_each():  # not across the yield: it is the caller's thread
                found = merge_batch(batch, self.inputs, methods, self.shared)
            for part in batch:
                yield found.pop(part.name)  # popped, so that the caller holds the only reference

    def report(
        self,
        layers: list[LayerReport],
        candidate: int = 0,
        validation: Sequence[tuple[float, ...]] = (),
        searched: Sequence[str] = (),
    ) -> MergeReport:
        """Return the report of the whole merge from one candidate's reports of all layers."""
        chosen = self.candidates[candidate]
        settings = {**chosen.settings(), "server_lr": self.shared.server_lr, "clip": self.shared.clip}
        if self.inputs.weights is not None:
            settings["weights"] = self.inputs.weights
        config = _config(self.inputs, layers, keep=self.shared.as_reference or chosen.on_factors)
        clients = [source.who for source in self.inputs.sent]
        report = MergeReport(settings, clients, layers, config, list(validation), list(searched))
        warn_of_size(report)
        return report


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
    check_safe(shared.server_lr, candidates)
    return LayerByLayer(inputs, candidates, shared)


def _config(inputs: Inputs, reports: list[LayerReport], keep: bool) -> dict[str, Any] | None:
    """Return the adapter config that goes with the result, None where none was given or there is no adapter."""
    given = inputs.sent[0].config
    if keep and inputs.reference is not None and inputs.reference.config is not None:
        given = inputs.reference.config
    ranks = {report.name: report.rank_out for report in reports if report.kind == "adapter"}
    if given is None or keep or not ranks:
        return given
    return output_config(given, ranks)
