"""d = 4096, r = 16, 3 clients: no d x d matrix is formed, in less than 64 MiB."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedfrom import merge
from tests.merging.samples import A_KEY, B_KEY
from tests.peaks import printed_last, reads_peaks

BY_FACTORS = ["from", "task-arithmetic", "knots-ta", "knots-ties", "knots-dare-ties"]
BY_FACTORS += ["tsv", "iso", "iso-cts", "core-ties", "core-dare-ties", "ctm"]


class LargestResult(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("solver", ["svd", "alternating"])
@pytest.mark.parametrize("with_reference", [False, True])
def test_no_matrix_of_the_layers_size_is_formed(solver, with_reference):
    d, r, n = 512, 4, 3
    g = torch.Generator().manual_seed(0)
    *states, reference = [
        {A_KEY: torch.randn(r, d, generator=g), B_KEY: torch.randn(d, r, generator=g)} for _ in range(n + 1)
    ]
    with LargestResult() as largest:
        merge(states, reference if with_reference else None, solver=solver)
    assert largest.numel <= d * (n + 1) * r  # the stack of all factors


MEASURE = """
import sys
import torch
from fedfrom import merge
torch.set_num_threads(1)

def states(d, seed):
    g = torch.Generator().manual_seed(seed)
    return [{"l.lora_A.weight": torch.randn(16, d, generator=g), "l.lora_B.weight": torch.randn(d, 16, generator=g)}
            for _ in range(4)]

*small, reference = states(128, 0)
merge(small, reference, solver=sys.argv[1])  # loads LAPACK and all else that is loaded once
*clients, reference = states(4096, 1)
before = peak()
merged, report = merge(clients, reference, solver=sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@reads_peaks
@pytest.mark.parametrize("solver", ["svd", "alternating"])
def test_extra_memory(solver):
    assert 0 < printed_last(MEASURE, solver) < 64


def largest_result(states, reference, **options):
    with LargestResult() as largest:
        merge(states, reference, **options)
    return largest.numel


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("method", [*BY_FACTORS, "average", "soup"])
def test_methods_form_no_matrix_of_the_layers_size(method, with_reference):
    d, r, n = 512, 4, 3
    g = torch.Generator().manual_seed(0)
    *states, reference = [
        {A_KEY: torch.randn(r, d, generator=g), B_KEY: torch.randn(d, r, generator=g)} for _ in range(n + 1)
    ]
    # KnOTS' [V_1 ... V_n]: (n + 1) r rows, n d columns
    assert largest_result(states, reference if with_reference else None, method=method) <= n * d * (n + 1) * r


@pytest.mark.parametrize("method", ["regmean", "lorm"])
def test_statistics_need_no_more_than_their_own_size(method):
    """A Gram matrix is d_in x d_in; nothing is d_out x d_in, nor n Gram matrices at once."""
    d_out, d_in, r, n = 2048, 128, 2, 4
    g = torch.Generator().manual_seed(0)
    *states, reference = [
        {A_KEY: torch.randn(r, d_in, generator=g), B_KEY: torch.randn(d_out, r, generator=g)} for _ in range(n + 1)
    ]
    inputs = [torch.randn(300, d_in, generator=g) for _ in range(n)]
    statistics = [{A_KEY.removesuffix(".lora_A.weight"): x.T @ x / 300} for x in inputs]
    # the factors of all deltas, and of the change: three terms a client
    columns = (n + 1) * r + 3 * n * r
    assert largest_result(states, reference, method=method, statistics=statistics) <= d_out * columns


MEASURE_METHODS = MEASURE.replace("range(4)", "range(9)").replace("solver=sys.argv[1]", "method=sys.argv[1]")


@pytest.mark.slow
@reads_peaks
@pytest.mark.parametrize("method", BY_FACTORS)
def test_extra_memory_of_methods(method):
    """8 clients at d = 4096, r = 16, each delta against a reference."""
    mib = printed_last(MEASURE_METHODS, method)
    print(f"{method}: {mib:.1f} MiB")
    assert 0 < mib < 256
