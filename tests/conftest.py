"""What every test stands on: a quiet environment, one thread, seeds, and where the data are."""

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports Flower, Ray, torch or a BLAS: they read these once. Ray's workers inherit them.
for name, value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    # The last bits of a product depend on the number of threads, and on a shared machine several are slower than one.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}.items():
    # Beside other workers a process has a core to itself, whatever the user's shell says.
    if name.endswith("_THREADS") and "PYTEST_XDIST_WORKER" in os.environ:
        os.environ[name] = value
    os.environ.setdefault(name, value)

# Not the user's: Flower writes its configuration, apps and SuperLink state here.
FLWR_HOME = tempfile.mkdtemp(prefix="fedfrom-flwr-")
os.environ["FLWR_HOME"] = FLWR_HOME

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis.internal.conjecture import providers  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# The same cases in every run, no limit on time: machines are noisy. `--hypothesis-profile=explore` draws new ones, and
# `--hypothesis-profile=hostile` 10,140 for tests/hostile.
settings.register_profile(
    "fedfrom",
    derandomize=True,
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("fedfrom"), derandomize=False, max_examples=1000)
settings.register_profile("hostile", settings.get_profile("explore"), max_examples=650)
settings.load_profile("fedfrom")
# Hypothesis also draws numbers that it finds in the loaded modules of this project: then the cases would depend on
# which tests ran before in the same process.
providers._get_local_constants = lambda: providers._local_constants


def pytest_sessionfinish() -> None:
    shutil.rmtree(FLWR_HOME, ignore_errors=True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker a core: more than 8 spend longer on their imports than on their tests."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say which tests one worker takes together: by their ids, as xdist 3.8's groups do nothing in pytest 9.2.

    Simulations, as Ray takes every core; what shares runs that take seconds to make: the report pages, and each file
    about the simulations. The rest go one by one, in their order, to whichever worker is free.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.startswith("tests/pages/"):
                return "pages"
            if "simulation" in test:
                return "Ray"
            return "docs" if "test_python_blocks_run" in test else file if "/simulations/" in file else nodeid

    config.option.loadscopereorder = False  # the scopes of most tests first: they are not the longest
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put simulations first, so that no worker ends with them alone."""
    simulations = [item for item in items if item.get_closest_marker("simulation")]
    assert all("simulation" in item.name for item in simulations), "Ray's tests are kept together by their names"
    items[:] = simulations + [item for item in items if item not in simulations]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """The seed a test starts from. Also sets the global generators, for the code of others that draws from them."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return 0


@pytest.fixture
def task_identity() -> Iterator[None]:
    """Let a test build Flower messages itself; what was set before is put back."""
    from flwr.supercore.task_identity import TaskIdentity

    from simulations.engines.jobs import set_task_identity

    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    set_task_identity()
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    """The folder of GLUE's TSV files, FEDFROM_GLUE_DIR. Skips without it."""
    named = os.environ.get("FEDFROM_GLUE_DIR")
    if not named:
        pytest.skip("needs GLUE: set FEDFROM_GLUE_DIR to a folder in GLUE's TSV layout")
    if not Path(named).is_dir():
        pytest.fail(f"FEDFROM_GLUE_DIR={named}: no such folder")
    return Path(named)


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the strategies log, from INFO on."""
    with caplog.at_level(logging.INFO, logger="flwr"):
        yield caplog
