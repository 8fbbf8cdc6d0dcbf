"""Eq. 5 on plain tensors."""

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfrom import merge
from fedfrom.merging.linalg.threads import each_block, one_thread_each
from tests.merging import oracle
from tests.merging.samples import DTYPES, POWERS, TENSOR, normal, tensor_case, tensor_cases

POWER = st.sampled_from(POWERS)
# what the output's own rounding allows, relative to the largest number that enters it
EPS = {dtype: 2 * torch.finfo(dtype).eps for dtype in DTYPES}


def closed_form(case, k, p=0.0):
    """T = W + alpha theta* by the oracle."""
    w = case.layer.weights(k, case.examples, p)
    return case.layer.target(w, case.server_lr)


def merged_tensor(case, **options):
    merged, report = merge(**case.arguments(), **options)
    return merged[TENSOR], report.layers[0]


@given(tensor_cases(dtype=torch.float32), POWER, st.sampled_from([0.0, 0.5, 1.0]))
def test_closed_form_float32(case, k, p):
    found, _ = merged_tensor(case, k=k, examples_power=p)
    assert oracle.relative_error(found, closed_form(case, k, p)) <= 1e-6


@given(tensor_cases(dtype=torch.float64), POWER)
def test_closed_form_float64(case, k):
    found, _ = merged_tensor(case, k=k)
    assert oracle.relative_error(found, closed_form(case, k)) <= 1e-14


@pytest.mark.parametrize("k", POWERS)
def test_closed_form_across_blocks(k):
    case = tensor_case(1, shape=(300, 701), n=4, dtype=torch.float32)  # three blocks and a rest
    found, report = merged_tensor(case, k=k)
    assert oracle.relative_error(found, closed_form(case, k)) <= 1e-6
    assert report.norms == pytest.approx(case.layer.norms, rel=1e-6)


@given(tensor_cases(dtype=torch.float32, server_lr=1.0), POWER)
def test_the_update_itself_is_right(case, k):
    """Not only the sum with a W that is larger: the merged delta, within the rounding of W."""
    found, _ = merged_tensor(case, k=k)
    expected = case.layer.update(case.layer.weights(k))
    size = float(case.layer.W.norm()) + float(expected.norm())
    assert oracle.relative_error(found.double() - case.layer.W.double(), expected, size) <= 3e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0.0, 1.0, math.inf])
def test_dtype_is_kept_and_sums_are_wider(dtype, k):
    case = tensor_case(2, shape=(40, 50), n=5, dtype=dtype)
    found, _ = merged_tensor(case, k=k)
    assert found.dtype == dtype
    expected = closed_form(case, k)
    # one rounding to the dtype, not one a client
    assert torch.allclose(found.double(), expected, rtol=0.51 * torch.finfo(dtype).eps + 2e-7, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
@pytest.mark.parametrize("k", [0.5, 1.0, math.inf])
def test_norms_beyond_float32s_squares(size, k):
    case = tensor_case(3, dtype=torch.float32, size=size)
    found, report = merged_tensor(case, k=k)
    assert report.norms == pytest.approx(case.layer.norms, rel=1e-6)
    assert oracle.relative_error(found, closed_form(case, k)) <= 1e-6
    assert report.lambda_max == pytest.approx(case.layer.lambda_max(report.weights), rel=1e-6)


@pytest.mark.parametrize("size", [1e-200, 1e200])
@pytest.mark.parametrize("k", [0.5, 1.0, math.inf])
def test_norms_beyond_float64s_squares(size, k):
    case, small = tensor_case(3, size=size), tensor_case(3)
    found, report = merged_tensor(case, k=k)
    expected, expected_report = merged_tensor(small, k=k)
    assert oracle.relative_error(found / size, expected) <= 1e-12
    assert report.weights == pytest.approx(expected_report.weights, rel=1e-12)
    assert report.norms == pytest.approx([size * norm for norm in expected_report.norms], rel=1e-12)
    assert report.lambda_max == pytest.approx(expected_report.lambda_max, rel=1e-9)


@given(tensor_cases(dtype=torch.float64, server_lr=1.0), st.sampled_from([0.5, 1.0, 2.0, math.inf]))
def test_scaling_all_deltas_scales_the_update(case, k):
    W = case.reference[TENSOR]
    larger = replace(case, states=[{TENSOR: W + 4 * (state[TENSOR] - W)} for state in case.states])
    found, _ = merged_tensor(larger, k=k)
    update, _ = merged_tensor(case, k=k)
    size = float(W.norm()) + float((found - W).norm())
    assert oracle.relative_error(found - W, 4 * (update - W), size) <= 1e-13


def test_without_reference_the_plain_mean_and_the_report_says_so():
    case = tensor_case(4, with_reference=False, examples=True)
    for server_lr in (1.0, 0.5):  # there is no update for the server's learning rate to scale
        found, report = merged_tensor(replace(case, server_lr=server_lr), k=2.0)
        assert oracle.relative_error(found, torch.stack(case.layer.sent).mean(0)) <= 1e-14
        assert report.has_reference is False and report.weights == pytest.approx([1 / 3] * 3)
    found, report = merged_tensor(case, k=2.0, examples_power=1.0)
    share = torch.tensor(case.examples, dtype=torch.float64)
    expected = (torch.stack(case.layer.sent) * (share / share.sum())[:, None, None]).sum(0)
    assert oracle.relative_error(found, expected) <= 1e-14


def test_each_client_against_what_it_was_sent():
    case = tensor_case(5, n=2)
    g = torch.Generator().manual_seed(9)
    other = {TENSOR: normal(7, 5, g=g)}
    layer = replace(case.layer, received=[other[TENSOR], case.reference[TENSOR]])
    found, _ = merged_tensor(replace(case, received=[other, None], layer=layer), k=1.0)
    assert oracle.relative_error(found, layer.target(layer.weights(1.0))) <= 1e-14


def test_running_statistics_are_averaged_plainly_and_kept_out_of_all_norms():
    g = torch.Generator().manual_seed(0)
    states = [
        {"bn.running_mean": 100 * normal(3, g=g), "w": normal(3, g=g), "bn.running_var": normal(3, g=g).abs()}
        for _ in range(3)
    ]
    reference = {"bn.running_mean": normal(3, g=g), "w": normal(3, g=g), "bn.running_var": normal(3, g=g).abs()}
    for scope in ("layer", "model"):
        merged, report = merge(states, reference, k=2.0, scope=scope, server_lr=0.5)
        for key in ("bn.running_mean", "bn.running_var"):
            assert torch.allclose(merged[key], torch.stack([state[key] for state in states]).mean(0), atol=1e-13)
        layer = oracle.Layer([state["w"] for state in states], [reference["w"]] * 3, reference["w"])
        by_name = {each.name: each for each in report.layers}
        assert by_name["w"].weights == pytest.approx(layer.weights(2.0), rel=1e-9)
        assert by_name["bn.running_mean"].kind == "buffer"


def test_integers_and_booleans_are_kept():
    kept = {"bn.num_batches_tracked": torch.tensor(7), "ids": torch.arange(3), "mask": torch.tensor([True, False])}
    states = [{**kept, "bn.num_batches_tracked": torch.tensor(9 + i), "w": torch.ones(2)} for i in range(2)]
    merged, report = merge(states, {**kept, "w": torch.zeros(2)})
    for key, value in kept.items():
        assert torch.equal(merged[key], value) and merged[key].dtype == value.dtype
        assert merged[key].data_ptr() != value.data_ptr()
    assert {layer.kind for layer in report.layers} == {"kept", "tensor"}
    merged, _ = merge(states)
    assert merged["bn.num_batches_tracked"] == 10 and torch.equal(merged["mask"], kept["mask"])


def test_model_scope_has_one_weight_a_client():
    g = torch.Generator().manual_seed(1)
    states = [{"a": normal(3, 2, g=g), "b": 5 * normal(4, g=g)} for _ in range(3)]
    reference = {"a": normal(3, 2, g=g), "b": normal(4, g=g)}
    _, report = merge(states, reference, k=1.5, scope="model")
    norms = [math.hypot(*(float((state[key] - reference[key]).norm()) for key in ("a", "b"))) for state in states]
    for layer in report.layers:
        assert layer.weights == pytest.approx(oracle.weights(norms, 1.5), rel=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3, 4, 5)])
def test_tensors_of_any_dimension(shape):
    case = tensor_case(6, shape=shape)
    found, _ = merged_tensor(case, k=1.0)
    assert found.shape == shape
    assert oracle.relative_error(found, closed_form(case, 1.0)) <= 1e-14


def test_strided_inputs_and_parameters_that_require_gradients():
    g = torch.Generator().manual_seed(2)
    W = normal(5, 7, g=g)
    states = [{TENSOR: torch.nn.Parameter(normal(7, 5, g=g)).T} for _ in range(2)]
    merged, _ = merge(states, {TENSOR: W}, k=1.0)
    layer = oracle.Layer([state[TENSOR].detach() for state in states], [W] * 2, W)
    assert oracle.relative_error(merged[TENSOR], layer.target(layer.weights(1.0))) <= 1e-14
    assert not merged[TENSOR].requires_grad


def test_blocks_inside_of_blocks_leave_the_threads_as_they_were() -> None:
    before, counts = torch.get_num_threads(), []

    def work(start: int, stop: int) -> None:
        counts.append(torch.get_num_threads())
        each_block(1 << 20, 1 << 19, lambda start, stop: None)

    torch.set_num_threads(3)
    try:
        with one_thread_each():
            assert torch.get_num_threads() == 1
            each_block(1 << 20, 1 << 18, work)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3 and counts == [3] * 4
    finally:
        torch.set_num_threads(before)


def test_tensors_that_are_read_whole_are_held_for_one_layer_at_a_time() -> None:
    alive: list[str] = []
    most = 0

    class Files(dict[str, torch.Tensor]):
        def reader(self, key: str) -> torch.Tensor:
            nonlocal most
            found = self[key].clone()
            alive.append(key)
            weakref.finalize(found, alive.remove, key)
            most = max(most, len(set(alive)))
            return found

    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(300, 300, generator=generator) for i in range(6)}
    states = [Files({key: W + torch.randn(W.shape, generator=generator) for key, W in base.items()}) for _ in range(3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        merge(states, base)
    finally:
        torch.set_num_threads(threads)
    assert most <= 2, most


@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_a_server_lr_beyond_the_dtype_is_an_error_that_names_the_tensor(moved: float) -> None:
    base = {"w": torch.zeros(1 << 17)}
    with pytest.raises(ValueError, match=r"'w': expected a result in float32's range"):
        merge([{"w": base["w"] + moved}] * 2, base, server_lr=1e50)


def test_cosines_of_whole_updates_of_very_different_sizes() -> None:
    update = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, report = merge([{"w": update * size} for size in (1.0, 1e-155, 1e-156)], {"w": torch.zeros_like(update)})
    assert torch.tensor(report.cosines()).allclose(torch.ones(3, 3))


def test_tensors_that_are_read_when_asked_for_are_asked_for_once() -> None:
    """But for the first client's, whose shapes and dtypes are what the others' are compared with."""

    class Lazy(Mapping[str, torch.Tensor]):
        def __init__(self, state: dict[str, torch.Tensor]) -> None:
            self.state, self.asked = state, Counter[str]()

        def __getitem__(self, key: str) -> torch.Tensor:
            self.asked[key] += 1
            return self.state[key].clone()

        def __iter__(self) -> Iterator[str]:
            return iter(self.state)

        def __len__(self) -> int:
            return len(self.state)

    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(300, 300, generator=generator) for i in range(3)}
    states = [{key: W + torch.randn(W.shape, generator=generator) for key, W in base.items()} for _ in range(3)]
    lazy = [Lazy(state) for state in states]
    found, expected = merge(lazy, base)[0], merge(states, base)[0]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [state.asked for state in lazy] == [Counter(dict.fromkeys(base, 2 if i == 0 else 1)) for i in range(3)]
