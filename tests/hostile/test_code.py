"""No pickle is loaded, no text run, and no memory taken for what a header claims."""

import ast
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedfrom.wire.records import to_state
from tests.conftest import ROOT
from tests.hostile.states import Exploit, Lazy
from tests.hostile.watch import harmless

SOURCES = sorted(path for folder in ("fedfrom", "simulations") for path in (ROOT / folder).rglob("*.py"))


LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_loads_a_pickle_or_runs_text(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not LOADERS & {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in LOADERS
        elif isinstance(node, ast.keyword):
            assert node.arg not in ("allow_pickle", "weights_only", "trust_remote_code")
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "np.load", "numpy.load", "eval", "exec", "yaml.load")


def test_no_array_that_flower_reads_is_unpickled() -> None:
    data = io.BytesIO()
    np.save(data, np.array([Exploit()], dtype=object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", data.getvalue())
    with harmless(), pytest.raises(ValueError, match="'w': expected a readable array"):
        to_state(ArrayRecord({"w": array}))
    with pytest.raises(AssertionError, match="a pickle was loaded"):
        np.load(io.BytesIO(data.getvalue()), allow_pickle=True)


def test_the_watch_sees_what_it_watches_for(tmp_path: Path) -> None:
    acts = [
        lambda: pickle.loads(pickle.dumps(Lazy)),
        lambda: (tmp_path / "new").write_text("x"),
        lambda: open("/etc/passwd").close(),
        lambda: subprocess.run(["true"]),
    ]
    for act in acts:
        with pytest.raises(AssertionError), harmless():
            act()


# In a process of its own, which may not take half a GiB more than it has when everything is loaded.
BOUNDED = """
import json, re, resource, sys
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
import safetensors.torch
from fedfrom import merge
from fedfrom.wire.records import to_state
from tests.hostile.replies import npy
from tests.hostile.states import Lazy, with_header

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

state = {"w": torch.ones(2, 3)}
merge([state, state], state)
before, limit = status("VmHWM"), status("VmSize") * 1024 + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
refused = 0
for shape in ["(1000000000000,)", "(1000000,1000000)", "(4294967296,4294967296)", "(1000000000,)", "(1000000000000,0)"]:
    for descr in ["'<f4'", "'<f8'", "'|u1'", "'|O'", "'(1000000000,)f4'", "'|S1000000000'"]:
        data = npy(descr, shape, b"0" * 1000)
        try:
            to_state(ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", data)}))
        except ValueError:
            refused += 1
for shape in [[10**12], [10**6, 10**6], [2**32, 2**32], [2**62, 4], [10**12, 0], [2**63]]:
    for end in [0, 24, 10**12, 4 * 10**12, 2**63]:
        header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        with open(sys.argv[1], "wb") as file:
            file.write(with_header(header, b"0" * 24))
        for load in (Lazy, safetensors.torch.load_file):
            try:
                merge([state, load(sys.argv[1])])
            except (SafetensorError, ValueError):
                refused += 1
with open(sys.argv[1], "wb") as file:
    file.write((10**12).to_bytes(8, "little") + b"{}")
try:
    Lazy(sys.argv[1])
except SafetensorError:
    refused += 1
print(refused, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lying_headers_take_no_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    refused, kib = map(int, done.stdout.split())
    assert refused >= 5 * 6 - 5 + 2 * 6 * 5 + 1
    assert kib < 64 * 1024, f"{kib / 1024:.1f} MiB"
