"""The strategies' arguments as editors and type checkers see them, and as FedAvg has them."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from flwr.serverapp.strategy import FedAvg

from fedfrom import FedFroM, FedMerge, methods
from fedfrom.keywords import FedAvgArguments, FroMArguments, MergeArguments, MethodOptions
from fedfrom.merging.methods.registry import method_options

FEDAVG = [name for name in inspect.signature(FedAvg.__init__).parameters if name != "self"]
OWN = {name for name, of in inspect.signature(FedMerge).parameters.items() if of.kind is of.KEYWORD_ONLY}


def test_every_option_of_every_method_has_a_type() -> None:
    assert {"seed", *get_type_hints(MethodOptions)} == {name for method in methods() for name in method_options(method)}


def test_fedmerge_takes_its_own_settings_the_methods_and_fedavgs() -> None:
    assert set(get_type_hints(FedAvgArguments)) == set(FEDAVG)
    assert set(get_type_hints(MergeArguments)) == set(FEDAVG) | set(get_type_hints(MethodOptions))


def test_fedfrom_takes_fedmerges_settings_and_froms_options_once_each() -> None:
    spelled = set(inspect.signature(FedFroM).parameters) - {"others"}
    further = set(get_type_hints(FroMArguments))
    assert not spelled & further
    assert spelled | further == set(FEDAVG) | OWN | method_options("from")


def test_fedavgs_arguments_come_first_in_its_order_with_its_defaults() -> None:
    ours, theirs = (inspect.signature(kind).parameters for kind in (FedFroM, FedAvg))
    assert list(ours)[: len(FEDAVG)] == FEDAVG
    assert {name: ours[name].default for name in FEDAVG} == {name: theirs[name].default for name in FEDAVG}
    values = (0.5, 0.25, 3, 4, 5, "n", "a", "c")
    one, other = FedFroM(*values), FedAvg(*values)
    assert {name: getattr(one, name) for name in FEDAVG} == {name: getattr(other, name) for name in FEDAVG}


PROGRAM = """
from fedfrom import FedFroM, FedMerge

FedFroM(0.5, 1.0, min_train_nodes=3, k="auto", lora_config={"r": 8}, checkpoint="run", search={"k": (0, 1)})
FedMerge("ties", density=0.2, fraction_train=0.5, select="multikrum", attackers=1)
FedFroM(fraction_trian=0.5)
FedFroM(k=[1])
FedFroM(method="ties")
FedMerge("ties", denstiy=0.2)
FedMerge("ties", clip="1")
"""


@pytest.mark.slow
def test_a_type_checker_refuses_what_a_strategy_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(PROGRAM)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--no-error-summary"]
    found = subprocess.run([*command, str(tmp_path / "app.py")], cwd=root, capture_output=True, text=True).stdout
    refused = {int(line.split(":")[1]) for line in found.splitlines() if ": error:" in line}
    assert refused == {6, 7, 8, 9, 10}, found
