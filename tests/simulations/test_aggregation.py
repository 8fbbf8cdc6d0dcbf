"""The distance from the mean of products is the dense one."""

import pytest
import torch

from simulations.aggregation import distance_from_mean


def state(seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for module, (d_out, d_in) in {"base_model.model.q": (8, 6), "base_model.model.v": (5, 9)}.items():
        found[f"{module}.lora_A.weight"] = torch.randn(rank, d_in, generator=g)
        found[f"{module}.lora_B.weight"] = torch.randn(d_out, rank, generator=g)
    return {**found, "base_model.model.classifier.weight": torch.randn(2, 6, generator=g)}


def dense(adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """All products of a state, one after the other."""
    modules = ("base_model.model.q", "base_model.model.v")
    each = [adapter[f"{m}.lora_B.weight"].double() @ adapter[f"{m}.lora_A.weight"].double() for m in modules]
    return torch.cat([product.flatten() for product in each])


@pytest.mark.parametrize("ranks", [(3, 3), (1, 3)])
def test_against_dense_products(ranks: tuple[int, int]) -> None:
    before, merged = state(0), state(9)
    states, examples = [state(1, ranks[0]), state(2, ranks[1])], [30, 10]
    mean = 0.75 * dense(states[0]) + 0.25 * dense(states[1])
    expected = float((dense(merged) - mean).norm() / (mean - dense(before)).norm())
    assert distance_from_mean(before, states, examples, merged) == pytest.approx(expected)


def test_nothing_to_compare() -> None:
    plain = {"classifier.weight": torch.ones(2, 6)}
    assert distance_from_mean(plain, [plain], [1], plain) is None
    assert distance_from_mean(state(0), [state(0)], [1], state(0)) is None
