"""Bad input: a ValueError that names the client, the key, what was expected and what was found."""

import json
import re

import numpy as np
import pytest
import torch

from fedfrom import Average, FactorAverage, FroM, merge, methods
from tests.merging.samples import A_KEY, B_KEY, MODULE, TENSOR, adapter_case, tensor_case

NAN, INF = float("nan"), float("inf")


def refused(*words, call=merge, **arguments):
    """Assert that the call raises ValueError whose message has all of these words."""
    with pytest.raises(ValueError) as caught:
        call(**arguments)
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    return message


def adapters(n=3, **changes):
    """n clients' states; changes: client index -> {key: tensor or None for a missing one}."""
    states = [dict(state) for state in adapter_case(0, n=n).states]
    for i, values in changes.items():
        for key, value in values.items():
            if value is None:
                del states[int(i[1:])][key]
            else:
                states[int(i[1:])][key] = value
    return states


def test_keys():
    refused("bob", "other", states=[{"w": torch.ones(2)}, {"other": torch.ones(2)}], names=["ann", "bob"])
    refused("reference", "w", "other", states=[{"w": torch.ones(2)}], reference={"other": torch.ones(2)})


def test_shapes_and_dtypes():
    wrong = torch.ones(4, 9, dtype=torch.float64)
    message = refused(
        "client 1",
        "rank",
        "expected",
        3,
        "found",
        4,
        states=adapters(_1={A_KEY: wrong, B_KEY: torch.ones(12, 4, dtype=torch.float64)}),
    )
    assert "configs" in message
    refused("client 1", MODULE, "(4, 9)", states=adapters(_1={A_KEY: wrong}))
    refused("client 0", "'w'", "float16", states=[{"w": torch.ones(2)}], reference={"w": torch.ones(2).half()})
    refused("client 0", "'w'", "(1,)", states=[{"w": torch.ones(1)}], reference={"w": torch.ones(3)})  # no broadcast
    refused("client 0", MODULE, "int", states=[{A_KEY: torch.ones(2, 3).long(), B_KEY: torch.ones(4, 2).long()}])
    refused("client 0", MODULE, states=[{A_KEY: torch.ones(3), B_KEY: torch.ones(4, 3)}])
    refused("client 0", MODULE, states=[{A_KEY: torch.ones(0, 3), B_KEY: torch.ones(4, 0)}])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("key", [A_KEY, B_KEY])
def test_numbers_that_are_none(bad, key):
    states = adapters()
    states[1][key] = states[1][key].clone()
    states[1][key][0, 0] = bad
    refused("client 1", MODULE, "finite", states=states, scope="model")
    refused("client 1", key, "finite", states=states, method="factor-average")
    both = [dict(state) for state in states]
    both[1] = {name: torch.full_like(value, bad) for name, value in both[1].items()}
    refused("client 1", MODULE, "finite", states=both)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_numbers_that_are_none_beside_a_product(bad):
    for key in (f"{MODULE}.lora_B.bias", f"{MODULE}.lora_magnitude_vector"):
        states = adapters()
        for i, state in enumerate(states):
            state[key] = torch.full((12,), bad if i == 2 else 1.0, dtype=torch.float64)
        refused("client 2", key, "finite", states=states, dora=True)


def test_a_reference_that_is_not_finite_is_not_the_clients_fault():
    message = refused("reference", "'w'", "finite", states=[{"w": torch.ones(1)}], reference={"w": torch.tensor([NAN])})
    assert "client 0" not in message
    case = adapter_case(0, start="trained")
    reference = {**case.reference, B_KEY: case.reference[B_KEY] * NAN}
    message = refused("reference", MODULE, "finite", states=case.states, reference=reference)
    assert "client 0" not in message


def test_ranks_and_configs():
    unequal = adapter_case(3, start="configs", n=4, r=4)
    assert len({state[A_KEY].shape[0] for state in unequal.states}) > 1
    refused("rank", MODULE, "configs", states=unequal.states)
    states = adapters(2)
    right = {"r": 3, "lora_alpha": 6}
    refused("client 1", MODULE, "rank 4", "found 3", states=states, configs=[right, {"r": 4, "lora_alpha": 6}])
    refused("client 1", "config", states=states, configs=[right, None])
    refused("configs", 2, 1, states=states, configs=[right])
    refused("client 1", "lora_alpha", states=states, configs=[right, {"r": 3, "lora_alpha": None}])
    case = adapter_case(0, start="trained")
    refused("reference_config", states=case.states, reference=case.reference, configs=[right] * 3)
    refused("reference_config", states=case.states, reference=case.reference, reference_config=right)


def test_what_clients_received():
    case = adapter_case(0, start="cut", n=3, r=4)
    arguments = case.arguments()
    refused("received", 3, 2, **{**arguments, "received": case.received[:2]})
    refused("received", "reference", states=case.states, received=case.received)
    for received in ({}, {A_KEY: case.reference[A_KEY]}, {"other": torch.ones(1)}):
        refused("client 1 received", **{**arguments, "received": [None, received, None]})
    narrow = {A_KEY: case.reference[A_KEY][:, :5], B_KEY: case.reference[B_KEY]}
    refused("client 1 received", A_KEY, "(4, 5)", "(4, 9)", **{**arguments, "received": [None, narrow, None]})
    case = tensor_case(0)
    for wrong in (torch.ones(1, dtype=torch.float64), torch.ones(5, 7, dtype=torch.float64), torch.ones(7, 5).half()):
        refused(
            "client 2 received",
            TENSOR,
            states=case.states,
            reference=case.reference,
            received=[None, None, {TENSOR: wrong}],
        )


def test_without_configs_each_client_has_the_rank_it_was_sent():
    case = adapter_case(0, start="trained", n=2, r=4)
    cut = {A_KEY: case.reference[A_KEY][:2], B_KEY: case.reference[B_KEY][:, :2]}
    small = {A_KEY: case.states[1][A_KEY][:2], B_KEY: case.states[1][B_KEY][:, :2]}
    merge([case.states[0], small], case.reference, received=[None, cut])
    refused("client 1", MODULE, "rank", 4, 2, states=[case.states[0], small], reference=case.reference)
    refused("client 0", MODULE, "rank", 4, 2, states=[small, small], reference=case.reference, received=[None, cut])
    refused("client 1", "rank", 4, 2, states=case.states, reference=case.reference, received=[None, cut])


def test_adapters_that_are_not_whole_or_not_one():
    refused("client 1", MODULE, "lora_A", "lora_B", states=adapters(_1={B_KEY: None}))
    refused("client 1", MODULE, "lora_A", "lora_B", states=adapters(_1={B_KEY: None}), method="factor-average")
    two = {}
    for name in ("default", "other"):
        two[f"{MODULE}.lora_A.{name}.weight"] = torch.ones(2, 3)
        two[f"{MODULE}.lora_B.{name}.weight"] = torch.ones(4, 2)
    refused("client 0", "one adapter", MODULE, states=[two])
    elsewhere = {key.replace("query", "value") if "other" in key else key: value for key, value in two.items()}
    refused("client 0", "one adapter", "default", "other", states=[elsewhere])
    saved = {f"base_model.model.head.modules_to_save.{name}.weight": torch.ones(2) for name in ("a", "b")}
    refused("client 0", "one adapter", states=[saved])


def test_parts_that_only_some_clients_have():
    for part, key in {"bias": f"{MODULE}.lora_B.bias", "magnitude": f"{MODULE}.lora_magnitude_vector"}.items():
        for i in ("_0", "_1"):
            states = adapters(2, **{i: {key: torch.ones(12, dtype=torch.float64)}})
            refused("client 1", MODULE, part, states=states, dora=True)
    linear, embedding = adapters(1)[0], {}
    embedding[f"{MODULE}.lora_embedding_A"] = torch.ones(3, 12, dtype=torch.float64)
    embedding[f"{MODULE}.lora_embedding_B"] = torch.ones(9, 3, dtype=torch.float64)
    refused("client 1", MODULE, states=[linear, embedding])
    refused("client 0", MODULE, states=[linear], reference=embedding)
    mixed = {**linear, **embedding}
    refused("client 0", MODULE, states=[mixed])


def test_kinds_that_cannot_be_merged():
    refused("client 0", "lora_E", states=[{f"{MODULE}.lora_E": torch.ones(2)}])
    grouped = {A_KEY: torch.ones(4, 2, 3, 3), B_KEY: torch.ones(8, 2, 1, 1)}
    refused("client 0", MODULE, "grouped", states=[grouped])
    states, right = adapters(2), {"r": 3, "lora_alpha": 6}
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PiSSA"):
        configs = [right, {**right, "init_lora_weights": init}]
        refused("client 1", "init_lora_weights", init.lower(), states=states, configs=configs)
        merge(states, configs=configs, same_base=True)
    for init in (True, False, "gaussian", "eva", "orthogonal"):
        merge(states, configs=[{**right, "init_lora_weights": init}] * 2)
    refused("client 1", "target_parameters", states=states, configs=[right, {**right, "target_parameters": ["w"]}])
    refused("client 1", "ADALORA", states=states, configs=[right, {**right, "peft_type": "ADALORA"}])
    refused("client 1", "DoRA", states=states, configs=[right, {**right, "use_dora": True}])
    key = f"{MODULE}.lora_magnitude_vector"
    with_magnitudes = [{**state, key: torch.ones(12, dtype=torch.float64)} for state in states]
    refused("client 0", key, "DoRA", states=with_magnitudes)
    refused("client 0", key, "DoRA", states=with_magnitudes, method="factor-average")


def test_factor_average_with_unequal_ranks_or_scalings():
    states = adapters(2)
    right = {"r": 3, "lora_alpha": 6}
    merge(states, method="factor-average", configs=[right] * 2)
    # the same scaling, said otherwise
    merge(states, method="factor-average", configs=[right, {"r": 3, "lora_alpha": 2 * 3**0.5, "use_rslora": True}])
    for other in ({"r": 3, "lora_alpha": 12}, {**right, "use_rslora": True}, {**right, "alpha_pattern": {"query": 1}}):
        refused("client 1", MODULE, "scaling", 2, states=states, method="factor-average", configs=[right, other])
    refused(
        "reference",
        "scaling",
        states=states,
        reference=states[0],
        method="factor-average",
        configs=[right] * 2,
        reference_config={"r": 3, "lora_alpha": 3},
    )
    smaller = {A_KEY: states[1][A_KEY][:2], B_KEY: states[1][B_KEY][:, :2]}
    refused("client 1", A_KEY, "(3, 9)", "(2, 9)", states=[states[0], smaller], method="factor-average")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": float("-inf")}, "k"),
        ({"k": NAN}, "k"),
        ({"rank": 0}, "rank"),
        ({"rank": -3}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 0.0}, "rank"),
        ({"rank": 1.0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": NAN}, "rank"),
        ({"rank": "4"}, "rank"),
        ({"solver": "qr"}, "svd, alternating"),
        ({"scope": "block"}, "layer, model"),
        ({"examples_power": -1.0}, "examples_power"),
        ({"examples_power": INF}, "examples_power"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": NAN}, "tolerance"),
        ({"k": True}, "k"),
        ({"examples_power": True}, "examples_power"),
        ({"iterations": 2.5}, "iterations"),
        ({"iterations": True}, "iterations"),
        ({"tolerance": "1e-9"}, "tolerance"),
    ],
)
def test_options_out_of_range(options, word):
    refused(word, "expected", "found", states=adapters(), **options)
    refused(word, "expected", "found", call=FroM, **options)


def test_methods_and_options_that_are_unknown():
    refused("from, average", "fro", states=adapters(), method="fro")
    refused("'from'", "density", "k", states=adapters(), method="from", density=0.2)
    refused("'average'", "k", states=adapters(), method="average", k=1.0)
    refused("k", states=adapters(), method=FroM(), k=1.0)
    refused("examples_power", call=Average, examples_power=-1.0)
    refused("examples_power", call=FactorAverage, examples_power=-1.0)
    assert methods()[:3] == ["from", "average", "factor-average"]
    for name in set(methods()) - {"regmean", "lorm", "fisher", "greedy-soup"}:  # which need more than states
        merge(adapters(), method=name, **({"rho": 1.0} if name == "actmat" else {}))  # rho = 0 refuses these


def test_methods_of_another_type_and_states_that_are_none():
    refused("method", "FroM", states=adapters(), method=FroM)
    refused("method", 0.5, states=adapters(), method=0.5)
    refused("k", "'1'", call=FroM, k="1")
    refused("states", "sequence", states=adapters()[0])
    refused("client 1", "state dict", "str", states=[adapters()[0], "adapter-b"])
    refused("server_lr", "'a'", states=adapters(), server_lr="a")
    refused("client 0", "adapter config", 3, states=adapters(), configs=[3, 3, 3])


def test_a_result_beyond_its_dtype():
    big = [{key: (150 * value).half() for key, value in state.items()} for state in adapters()]
    assert all(bool(value.isfinite().all()) for state in big for value in state.values())
    refused("lora_B", "float16", "infinity", states=[{k: v * 20 for k, v in state.items()} for state in big])


def test_rank_above_the_matrix():
    refused("rank", MODULE, 9, 10, states=adapters(), rank=10)
    refused("rank", MODULE, states=adapters(), rank=10, solver="alternating")


def test_numbers_of_examples_learning_rate_and_names():
    for bad in (0, -1, NAN, INF):
        refused("client 1", "examples", bad, states=adapters(), examples=[1, bad, 1])
    refused("examples", 3, 2, states=adapters(), examples=[1, 2])
    refused("names", 3, 1, states=adapters(), names=["ann"])
    for bad in (NAN, INF, -1, -0.5, -INF, True):
        refused("server_lr", "finite number >= 0", bad, states=adapters(), server_lr=bad)


def test_nothing_to_merge():
    refused("states", states=[])
    refused("client 0", states=[{}])
    refused("client 0", states=[{}, {}], reference={"w": torch.ones(1)})
    refused("client 1", states=[{"w": torch.ones(1)}, {}])


def test_messages_read_well():
    message = refused("client 1", states=adapters(_1={A_KEY: torch.ones(3, 8, dtype=torch.float64)}))
    assert re.fullmatch(r"client 1, '.+': expected .+, found .+", message)


def test_a_refused_merge_changes_nothing():
    states = adapters(_2={A_KEY: torch.ones(3, 8, dtype=torch.float64)})
    before = [{key: value.clone() for key, value in state.items()} for state in states]
    refused("client 2", states=states)
    assert all(torch.equal(state[key], was[key]) for state, was in zip(states, before, strict=True) for key in was)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        refused("client 2", states=states)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", ["a", True, None, NAN])
@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("ties", "density"),
        ("dare", "density"),
        ("ties", "coefficient"),
        ("task-arithmetic", "coefficient"),
        ("fisher", "floor"),
        ("regmean", "off_diagonal"),
    ],
)
def test_options_that_are_no_numbers(method, option, value):
    refused(option, "expected", repr(value), states=adapters(), method=method, **{option: value})


def test_numbers_of_numpys_are_taken_as_pythons_own():
    given = merge(
        adapters(),
        method=FroM(k=np.float32(0.25), examples_power=np.int64(1), rank=np.int64(3)),
        examples=[np.int64(3), np.float32(0.3), 2],
        server_lr=np.float32(0.5),
        clip=np.int64(1),
    )
    own = float(np.float32(0.3))
    meant = merge(adapters(), k=0.25, examples_power=1, rank=3, examples=[3, own, 2], server_lr=0.5, clip=1)
    assert all(torch.equal(given[0][key], value) for key, value in meant[0].items())
    assert json.loads(json.dumps(given[1].to_dict())) == meant[1].to_dict()
    refused("client 0", "examples", "True", states=adapters(), examples=[np.bool_(True), 1, 1])


@pytest.mark.parametrize("value", ["a", True, NAN, -1.0])
@pytest.mark.parametrize("name", ["clip", "server_lr"])
def test_settings_that_are_no_numbers(name, value):
    refused(name, "expected", repr(value), states=adapters(), **{name: value})
