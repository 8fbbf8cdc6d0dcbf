"""The client's side: load the global arrays at the client's rank, and reply with its rank, scaling and statistics.

A client whose adapter has the global adapter's rank and alpha does not need this module: PEFT's
`set_peft_model_state_dict` and `get_peft_model_state_dict` are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedfrom.client_statistics import collecting_gram, fisher, gram
from fedfrom.merging.linalg.rounding import rescaled
from fedfrom.merging.peft import layers as L
from fedfrom.merging.peft.configs import rank_and_scaling
from fedfrom.wire.adapter_configs import ADAPTER_KEY, adapter_record, record_to_config
from fedfrom.wire.contents import STATISTICS_KEY, model_record, records_of
from fedfrom.wire.frozen import leave_out, statistics_names, told_frozen
from fedfrom.wire.records import delta_array, to_record, to_state

__all__ = ["adapter_state", "collecting_gram", "fisher", "gram", "load", "reply"]


def load(model: Any, message: Message, *, arrayrecord_key: str = "arrays", adapter_name: str = "default") -> None:
    """Load the global arrays that a message carries into a model.

    A PEFT adapter of a smaller rank than the global adapter takes the leading rows of A and columns of B, the best
    approximation of that rank. An adapter of a larger rank keeps its own A in the further rows, with zero columns in B.
    B is rescaled where the client's scaling differs from the server's, which the message says if the strategy has a
    lora_config. Once this client has said its rank, a message may carry only the leading rows and columns: the result
    is the same.

    Parameters
    ----------
    model : torch.nn.Module
        A PeftModel, or any module whose state dict has the keys of the arrays.
    message : Message
        The server's train or evaluate message.
    arrayrecord_key : str (default: "arrays")
        Name of the record with the arrays.
    adapter_name : str (default: "default")
        Which adapter of a PeftModel.

    Raises
    ------
    ValueError
        The arrays do not fit the model. The model is unchanged.
    """
    state = to_state(model_record(message.content, arrayrecord_key), "global arrays")
    if not hasattr(model, "peft_config"):
        _check_fits(state, model.state_dict(), ranks_may_differ=False)
        model.load_state_dict(state)
        return
    from peft import set_peft_model_state_dict

    own, config = adapter_state(model, adapter_name), model.peft_config[adapter_name].to_dict()
    _check_fits(state, own, ranks_may_differ=True)
    sent = records_of(message.content, ConfigRecord).get(ADAPTER_KEY)
    fitted = _fit(state, own, config, None if sent is None else record_to_config(sent))
    set_peft_model_state_dict(model, fitted, adapter_name)


def _check_fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], ranks_may_differ: bool) -> None:
    """Raise ValueError where keys or shapes of the global arrays differ from this model's; dtypes may differ."""
    if own.keys() != state.keys():
        raise ValueError(f"global arrays: expected the keys of this model, found {L.difference(state, own)}")
    for layer in L.find_layers(state, "global arrays", pair_factors=ranks_may_differ).values():
        for part, key in layer.keys.items():
            free = L.RANK_DIMENSION.get(part) if ranks_may_differ else None
            L.check_same(state[key], own[key].to(state[key].dtype), "global arrays", key, free)


def _fit(
    state: dict[str, Tensor], own: Mapping[str, Tensor], config: dict[str, Any], sent: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Return the global state in the ranks and scalings of this client's adapter."""
    for layer in L.find_layers(state, "global arrays").values():
        if not layer.is_adapter:
            continue
        (rank,) = L.adapter_rank(layer, own)
        (global_rank,) = L.adapter_rank(layer, state)
        if rank != global_rank and sent is None:
            raise ValueError(
                f"global arrays, {layer.name!r}: expected rank {rank}, found {global_rank}: unequal ranks need the "
                "server's strategy to have lora_config"
            )
        ratio = 1.0
        if sent is not None:
            ratio = rank_and_scaling(sent, layer.name)[1] / rank_and_scaling(config, layer.name)[1]
        trained_last = "embedding_A" if layer.is_embedding else "B"  # the factor that PEFT starts at zero
        for part, key in layer.keys.items():
            if part in L.RANK_DIMENSION:
                fitted = own[key].detach().clone() if part != trained_last else torch.zeros_like(own[key])
                common = min(rank, global_rank)
                dimension = L.RANK_DIMENSION[part]
                value = state[key].narrow(dimension, 0, common).to(fitted)
                fitted.narrow(dimension, 0, common).copy_(rescaled(value, ratio) if part == trained_last else value)
                state[key] = fitted
            elif part == "bias":
                state[key] = rescaled(state[key], ratio)
    return state


def reply(
    model: Any,
    message: Message,
    metrics: Mapping[str, Any],
    *,
    statistics: Mapping[str, Tensor] | None = None,
    as_delta: bool | torch.dtype = False,
    arrayrecord_key: str = "arrays",
    adapter_name: str = "default",
) -> Message:
    """Return the reply to a train message: the model's arrays, the metrics, and an adapter's config.

    Tensors that the strategy declares frozen are left out.

    Parameters
    ----------
    model : torch.nn.Module
        A PeftModel, whose adapter is sent, or any other module, whose state dict is sent.
    message : Message
        The train message.
    metrics : Mapping[str, float]
        The client's metrics, with "num-examples" among them.
    statistics : Mapping[str, Tensor] | None (default: None)
        The result of `gram` or `fisher`, for strategies whose method needs it. It is sent as a second ArrayRecord,
        which Flower's FedAvg refuses.
    as_delta : bool | torch.dtype (default: False)
        Send the delta of each plain floating-point tensor, its value minus the message's, computed in float32 and sent
        in this dtype: bfloat16 (True), float16 or float32. A delta keeps digits that the value would lose: at
        |theta| / |W| = 1e-3, bfloat16 rounds W_i by more than theta_i, and so falsifies the norms. Adapters, running
        statistics and integers are sent as they are. Only fedfrom's strategies read deltas; others fail on them.
    arrayrecord_key : str (default: "arrays")
        Name of the record with the arrays.
    adapter_name : str (default: "default")
        Which adapter of a PeftModel.

    Raises
    ------
    ValueError
        A frozen tensor differs from the message's: the client has trained it, and the training would be lost.
    """
    content, frozen = RecordDict({"metrics": MetricRecord(dict(metrics))}), told_frozen(message.content)
    is_adapter = hasattr(model, "peft_config")
    state = adapter_state(model, adapter_name) if is_adapter else model.state_dict()
    if is_adapter:
        content[ADAPTER_KEY] = adapter_record(model.peft_config[adapter_name].to_dict(), state, "this model")
    if frozen:
        state = leave_out(state, frozen, to_state(model_record(message.content, arrayrecord_key), "global arrays"))
    content[arrayrecord_key] = to_record(state)
    if as_delta:
        _to_deltas(content, message, torch.bfloat16 if as_delta is True else as_delta, arrayrecord_key)
    if statistics is not None:
        untrained = statistics_names(frozen)
        content[STATISTICS_KEY] = to_record({k: value for k, value in statistics.items() if k not in untrained})
    return Message(content=content, reply_to=message)


def _to_deltas(content: RecordDict, message: Message, dtype: torch.dtype, arrayrecord_key: str) -> None:
    """Replace the plain floating-point tensors of a reply by their deltas."""
    record = model_record(content, arrayrecord_key)
    sent, own = to_state(model_record(message.content, arrayrecord_key), "global arrays"), to_state(record)
    for layer in L.find_layers(own, "this model").values():
        if layer.is_adapter or layer.is_running_statistic:
            continue
        key = layer.keys["tensor"]
        if not own[key].is_floating_point():
            continue
        if key not in sent or sent[key].shape != own[key].shape:
            raise ValueError(
                f"this model, {key!r}: expected the message to have a tensor of this key and shape, to take the delta "
                "from, found none"
            )
        start = sent[key].to(own[key].dtype)  # the model started from rounded values where its dtype is narrower
        record[key] = delta_array((own[key].to(torch.float32) - start.to(torch.float32)).to(dtype))


def adapter_state(model: Any, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return a PeftModel's adapter as its state dict, without asking the Hub about embeddings.

    Parameters
    ----------
    model : peft.PeftModel
        Holds the adapter.
    adapter_name : str (default: "default")
        Which of its adapters.
    """
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
