"""MultiKrum on whole updates: who is selected is Krum's by the definition, whatever factors a product is sent as."""

import pytest
import torch

from fedfrom.merging.clients import Round, clients_of
from fedfrom.merging.linalg import samples
from fedfrom.merging.selection import gram_of_updates, multikrum

A, B, HEAD, MEAN = "m.q.lora_A.weight", "m.q.lora_B.weight", "m.head.weight", "m.norm.running_mean"
STATE = dict[str, torch.Tensor]


def states(n: int, seed: int) -> tuple[STATE, list[STATE]]:
    """A reference and n clients' states near it: an adapter, a plain tensor, a buffer and an integer, float64."""
    g = torch.Generator().manual_seed(seed)
    reference = {
        A: torch.randn(3, 8, generator=g, dtype=torch.float64),
        B: torch.randn(7, 3, generator=g, dtype=torch.float64),
        HEAD: torch.randn(4, 7, generator=g, dtype=torch.float64),
        MEAN: torch.randn(7, generator=g, dtype=torch.float64),
        "m.norm.num_batches_tracked": torch.tensor(3),
    }
    moved = [
        {
            key: value + 0.3 * torch.randn(value.shape, generator=g, dtype=torch.float64)
            if value.is_floating_point()
            else value
            for key, value in reference.items()
        }
        for _ in range(n)
    ]
    return reference, moved


def updates(reference: STATE, clients: list[STATE]) -> torch.Tensor:
    """(n, d) whole updates, adapters as products, straight from the definition."""

    def flat(state: STATE) -> torch.Tensor:
        return torch.cat([(state[B] @ state[A]).flatten(), state[HEAD].flatten()])

    return torch.stack([flat(state) - flat(reference) for state in clients])


def krum_by_definition(thetas: torch.Tensor, f: int) -> list[int]:
    """Blanchard et al. (2017), word for word: n - f - 2 closest others, squared distances, the n - f best."""
    n, scores = len(thetas), []
    for i in range(n):
        others = sorted(float((thetas[i] - thetas[j]).square().sum()) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    return sorted(sorted(range(n), key=lambda i: scores[i])[: n - f])


@pytest.mark.parametrize("f", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_it_selects_by_the_papers_definition(f: int, seed: int) -> None:
    reference, clients = states(8, seed)
    thetas = updates(reference, clients)
    inner = gram_of_updates(clients_of(clients), Round(reference))
    torch.testing.assert_close(inner, thetas @ thetas.T, rtol=1e-9, atol=1e-9)
    assert multikrum(inner, f) == krum_by_definition(thetas, f)
    assert len(multikrum(inner, f)) == 8 - f


@pytest.mark.parametrize("seed", range(5))
def test_the_selection_is_gauge_invariant_and_krum_on_factors_is_not(seed: int) -> None:
    """B G and G^-1 A are the same client: its neighbours stay its neighbours."""
    reference, clients = states(8, seed)
    g = torch.Generator().manual_seed(100 + seed)
    turned = []
    for state in clients:
        G = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64)).Q * 3.0
        turned.append({**state, A: torch.linalg.solve(G, state[A]), B: state[B] @ G})
    before, after = (
        gram_of_updates(clients_of(clients), Round(reference)),
        gram_of_updates(clients_of(turned), Round(reference)),
    )
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert multikrum(after, 2) == multikrum(before, 2)

    def factors(given: list[STATE]) -> torch.Tensor:
        flat = [torch.cat([(s[key] - reference[key]).flatten() for key in (A, B)]) for s in given]
        return torch.stack(flat) @ torch.stack(flat).T

    assert not torch.allclose(factors(turned), factors(clients), rtol=0.1)


@pytest.mark.parametrize("scale", [10.0, 1e6, 1e60])
def test_one_that_is_far_from_all_others_is_left_out(scale: float) -> None:
    reference, clients = states(7, 0)
    loud = {**clients[3], HEAD: reference[HEAD] - scale * (clients[3][HEAD] - reference[HEAD])}
    assert 3 not in multikrum(gram_of_updates(clients_of([*clients[:3], loud, *clients[4:]]), Round(reference)), 1)


def test_too_few_clients_are_refused() -> None:
    assert multikrum(torch.eye(5, dtype=torch.float64), 1) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"select: expected at least 2 \* 1 \+ 3 valid replies.*found 4"):
        multikrum(torch.eye(4, dtype=torch.float64), 1)


def test_the_gram_matrix_of_tensors_larger_than_a_block_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 50_000, generator=g) for _ in range(3)]
    references = [torch.randn(3, 50_000, generator=g), None, values[0]]
    flat = torch.stack(
        [
            (v.double() if r is None else v.double() - r.double()).flatten()
            for v, r in zip(values, references, strict=True)
        ]
    )
    torch.testing.assert_close(samples.gram(values, references), flat @ flat.T, rtol=1e-12, atol=1e-6)
