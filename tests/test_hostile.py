"""Hostile input: a clear error or a correct merge, whatever records, states, files, configs and arguments hold.

A few hundred cases run with all other tests. Fresh ones by the thousand:

    python -m pytest tests/test_hostile.py --hypothesis-profile=hostile
"""

import ast
import contextlib
import dataclasses
import io
import json
import math
import pickle
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors import SafetensorError

import simulations.__main__
from fedfrom import FedFroM, FedMerge, merge, methods
from fedfrom.merging.peft.configs import check_config, rank_and_scaling
from fedfrom.wire.records import ADAPTER_KEY, STATISTICS_KEY, to_state
from simulations import environment, strategies
from simulations.errors import BadInput
from simulations.options import Options
from simulations.results import Folder, load_model
from tests import hostile
from tests.conftest import ROOT
from tests.hostile import CONFIG, cases, harmless
from tests.inprocess import InProcessGrid
from tests.merging.test_memory import LargestResult
from tests.models import FEDFROM, Arrays, Scaling, arrays_of, record_of

pytestmark = pytest.mark.timeout(6 * 3600)  # thousands of cases, on a machine that has other work

# --- Replies ---------------------------------------------------------------------------------------------------------


def score(state: dict[str, torch.Tensor]) -> float:
    return -float(state[hostile.HEAD].double().norm())


# The strategy, and the settings that the oracle needs; None where it does not know the method.
STRATEGIES: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "from": (lambda: FedFroM(), FEDFROM),
    "from, with configs": (lambda: FedFroM(lora_config=CONFIG), FEDFROM),
    "the paper's": (lambda: FedFroM(lora_config=CONFIG, k=1.0, examples_power=0.0), {**FEDFROM, "k": 1.0, "p": 0.0}),
    "the largest": (lambda: FedFroM(lora_config=CONFIG, clip=None, k=math.inf), {"k": math.inf, "p": 0.5}),
    "whole updates": (lambda: FedFroM(lora_config=CONFIG, scope="model"), {**FEDFROM, "scope": "model"}),
    "half a step": (lambda: FedFroM(server_lr=0.5), {**FEDFROM, "server_lr": 0.5}),
    "average": (lambda: FedMerge("average", examples_power=1.0), {"k": 0.0, "p": 1.0}),
    "alternating": (lambda: FedFroM(lora_config=CONFIG, solver="alternating"), None),
    "k=auto": (lambda: FedFroM(k="auto", validate=score), None),
    "clipped and safe": (lambda: FedFroM(lora_config=CONFIG, clip=2.0, server_lr="safe"), None),
    "factor-average": (lambda: FedMerge("factor-average"), None),
    "task-arithmetic": (lambda: FedMerge("task-arithmetic", lora_config=CONFIG), None),
    "ties": (lambda: FedMerge("ties"), None),
    "dare-ties": (lambda: FedMerge("dare-ties"), None),
    "dare-from": (lambda: FedMerge("dare-from"), None),
    "knots-ties": (lambda: FedMerge("knots-ties", lora_config=CONFIG), None),
    "greedy-soup": (lambda: FedMerge("greedy-soup", validate=score), None),
    "regmean": (lambda: FedMerge("regmean", lora_config=CONFIG), None),
    "lorm": (lambda: FedMerge("lorm", lora_config=CONFIG), None),
    "fisher": (lambda: FedMerge("fisher"), None),
}
STATES = {dtype: hostile.mixed_state(dtype=dtype) for dtype in (np.float16, np.float32, np.float64)}
STATISTICS = {"gram": hostile.grams(0), "fisher": hostile.fishers(STATES[np.float32], 0)}


def sent_and_replies(strategy: FedMerge, state: Arrays, honest: int = 2) -> tuple[list[Message], Message]:
    """Let a strategy send a state; return honest clients' replies, and one that is honest yet."""

    def client(message: Message, context: Any) -> Message:
        partition = int(context.node_config["partition-id"])
        content = RecordDict({"arrays": record_of(hostile.moved(state, partition))})
        content["metrics"] = MetricRecord({"num-examples": 10 * (partition + 1), "loss": 1.0 / (partition + 3)})
        if ADAPTER_KEY in message.content:
            content[ADAPTER_KEY] = message.content[ADAPTER_KEY]
        if strategy.method.needs == "gram":
            content[STATISTICS_KEY] = record_of(hostile.grams(partition))
        elif strategy.method.needs == "fisher":
            content[STATISTICS_KEY] = record_of(hostile.fishers(state, partition))
        return Message(content, reply_to=message)

    grid = InProcessGrid(client, honest + 1)
    *replies, last = grid.send_and_receive(strategy.configure_train(1, record_of(state), ConfigRecord(), grid))
    return replies, last


def assert_reason(reason: str) -> None:
    """One line of bearable length that says what was expected and what was found."""
    assert "expected" in reason and "found" in reason and reason.isprintable() and len(reason) < 1000, reason


@st.composite
def rounds(draw: st.DrawFn) -> tuple[str, type, list[Any]]:
    """Draw a strategy, a dtype, and what is wrong with one client's reply."""
    name = draw(st.sampled_from(list(STRATEGIES)))
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float32, np.float64, np.float16]))
    statistics = STATISTICS.get(STRATEGIES[name][0]().method.needs, {})
    faults = draw(st.lists(hostile.reply_faults(STATES[dtype], statistics), min_size=1, max_size=2))
    return name, dtype, faults


@cases(200)
@given(given_round=rounds())
def test_a_reply_is_rejected_with_a_reason_or_merged(given_round: Any) -> None:
    name, dtype, faults = given_round
    make, oracle = STRATEGIES[name]
    strategy, state = make(), STATES[dtype]
    honest, bad = sent_and_replies(strategy, state)
    for fault in faults:
        # Flower itself refuses some records, and one fault may need what another took away.
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
            fault(bad.content)
    with harmless():
        arrays, metrics = strategy.aggregate_train(1, [*honest, bad])

    report = strategy.reports[1]
    event("rejected" if report.rejected else "merged")
    assert arrays is not None, report.rejected
    merged = arrays_of(arrays)
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert all(np.isfinite(value).all() for value in merged.values())
    assert metrics["replies-valid"] + metrics["replies-rejected"] == 3
    json.dumps(report.to_dict())
    honest_nodes = {message.metadata.src_node_id for message in honest}
    assert set(report.rejected) <= {bad.metadata.src_node_id}
    for reason in report.rejected.values():
        assert_reason(reason)
    if name != "greedy-soup":
        assert honest_nodes <= set(report.nodes)
    if oracle is not None:
        accepted = honest if report.rejected else [*honest, bad]
        assert_round(merged, state, accepted, oracle, strategy.lora_config, strategy.examples_cap)


def assert_round(
    merged: Arrays, state: Arrays, accepted: list[Message], oracle: dict[str, Any], lora_config: Any, cap: float | None
) -> None:
    """Assert that a round's result is the merge of these replies, read anew."""

    def scaling(message: Message) -> Scaling:
        if lora_config is None:
            return lambda module: 1.0
        record = message.content.config_records.get(ADAPTER_KEY)
        return hostile.scaling_of(lora_config if record is None else hostile.config_of(record))

    replies = [arrays_of(model_of(message.content)) for message in accepted]
    said = [next(iter(message.content.metric_records.values()))["num-examples"] for message in accepted]
    most = math.inf if cap is None else cap * statistics.median(said)
    examples = [min(count, most) for count in said]
    own = [scaling(message) for message in accepted]
    base = hostile.scaling_of(lora_config) if lora_config else lambda module: 1.0
    hostile.assert_is_the_merge(merged, state, replies, examples, scaling=base, scalings=own, **oracle)


def model_of(content: RecordDict) -> ArrayRecord:
    records = {name: record for name, record in content.array_records.items() if name != STATISTICS_KEY}
    return records["arrays"] if "arrays" in records else next(iter(records.values()))


@cases(40)
@given(
    value=st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.lists(st.floats(), max_size=2)),
    key=st.sampled_from(["num-examples", "loss"]),
)
def test_metrics_of_evaluate_replies_are_averaged_or_left_out(value: Any, key: str) -> None:
    strategy = FedFroM()
    honest, bad = sent_and_replies(strategy, STATES[np.float32])
    with contextlib.suppress(TypeError):  # Flower's own
        bad.content["metrics"][key] = value
    with harmless():
        metrics = strategy.aggregate_evaluate(1, [*honest, bad])
    assert metrics is not None
    MetricRecord(dict(metrics))


# --- merge() ---------------------------------------------------------------------------------------------------------

NAMES = [name for name in methods() if name not in ("regmean", "lorm", "fisher", "greedy-soup")]
SUBJECT = re.compile(
    r"(what )?(client \d|ann)|reference|configs|examples|received|rank|scope|method|server_lr|clip|as_reference|'\w"
)
"""What every error starts with: whose input, or which argument."""


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}


def numpy_of(state: dict[str, torch.Tensor]) -> Arrays:
    """Return a state in the widest dtypes that numpy has: factors as matrices, under names without an adapter's."""
    found = {}
    for key, value in state.items():
        wide = value.detach().to(torch.float64 if value.is_floating_point() else torch.int64)
        is_factor = re.search(r"lora_[AB]\.(default\.)?weight$", key)
        found[key.replace(".default", "")] = (wide.flatten(1) if is_factor else wide).numpy()
    return found


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the arguments of a merge, some of them hostile."""
    n, dtype = draw(st.integers(1, 3)), draw(st.sampled_from([np.float32, np.float32, np.float64, np.float16]))
    state = hostile.mixed_state(dtype=dtype)
    states: list[Any] = [tensors(hostile.moved(state, i)) for i in range(n)]
    arguments: dict[str, Any] = {"states": states, "method": draw(st.sampled_from(["from", "from", "from", *NAMES]))}
    if draw(st.booleans()):
        arguments["reference"] = tensors(state)
    if draw(st.booleans()):
        arguments["configs"] = [dict(CONFIG) for _ in range(n)]
        if "reference" in arguments:
            arguments["reference_config"] = dict(CONFIG)
    if draw(st.booleans()):
        arguments["examples"] = [10 * (i + 1) for i in range(n)]
    i = draw(st.integers(0, n - 1))
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["state", "state", "reference", "config", "config", "examples", "option"]))
        if kind == "state":
            states[i] = draw(hostile.odd_states(tensors(hostile.moved(state, i))))
        elif kind == "reference" and "reference" in arguments:
            arguments["reference"] = draw(hostile.odd_states(tensors(state)))
        elif kind == "config":
            configs = arguments.setdefault("configs", [dict(CONFIG) for _ in range(n)])
            configs[i] = draw(hostile.odd_configs)
        elif kind == "examples":
            arguments["examples"] = [draw(st.one_of(hostile.numbers, hostile.texts, st.none())) for _ in range(n)]
        elif kind == "option":
            name = draw(st.sampled_from(["rank", "server_lr", "clip", "as_reference", "received", "names"]))
            ranges = {"as_reference": st.booleans(), "names": st.just(["ann"] * n), "received": st.just([{}] * n)}
            arguments[name] = draw(ranges.get(name, st.one_of(hostile.numbers, hostile.texts)))
    return arguments


def assert_refused_or_merged(arguments: dict[str, Any]) -> None:
    """Assert that a merge is right, or is refused by a ValueError of one line that says whose fault it is."""
    try:
        with hostile.soon(20):
            merged, report = merge(**arguments)
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError and message.isprintable(), repr(error)
        assert SUBJECT.match(message) and "expected" in message and "found" in message, message
        event("refused")
        return
    event("merged")
    json.dumps(report.to_dict())
    template = {**arguments["states"][0], **(arguments.get("reference") or {})}
    for key, value in merged.items():
        assert value.is_floating_point() is template[key].is_floating_point()
        assert not value.is_floating_point() or bool(value.isfinite().all())
    plain = {"server_lr", "clip", "as_reference", "received", "rank"}.isdisjoint(arguments)
    if plain and arguments["method"] in ("from", "average", "soup"):
        assert_is_right(arguments, merged, report)


def assert_is_right(arguments: dict[str, Any], merged: dict[str, torch.Tensor], report: Any) -> None:
    """Assert that what `merge` made of these arguments is what the oracle makes of them."""
    states, reference, configs = (arguments.get(name) for name in ("states", "reference", "configs"))
    if configs is not None and configs[0] is None:  # then no client has any
        configs = None
    if reference is not None and reference.keys() != states[0].keys():
        return  # layers without a reference among others: not the oracle's
    kinds = [torch.finfo(value.dtype) for value in merged.values() if value.is_floating_point()]
    precision = (
        (max(kind.eps for kind in kinds), max(kind.smallest_normal * kind.eps for kind in kinds)) if kinds else None
    )
    one: Scaling = lambda module: 1.0  # noqa: E731
    # without configs one scaling is assumed, whatever it is
    scalings = None if configs is None else [hostile.scaling_of(config) for config in configs]
    hostile.assert_is_the_merge(
        numpy_of(merged),
        None if reference is None else numpy_of(reference),
        [numpy_of(state) for state in states],
        arguments.get("examples") or [1] * len(states),
        k=1.0 if arguments["method"] == "from" else 0.0,
        scaling=one if configs is None else hostile.scaling_of(arguments.get("reference_config") or CONFIG),
        scalings=scalings,
        merged_scaling=one if configs is None else hostile.scaling_of(report.config),
        precision=precision,
    )


@cases(150)
@given(arguments=merges())
def test_states_and_configs_are_merged_or_refused(arguments: dict[str, Any]) -> None:
    with harmless():
        assert_refused_or_merged(arguments)


# --- Files -----------------------------------------------------------------------------------------------------------

FILE_STATE = {key: value for key, value in tensors(STATES[np.float32]).items() if "words" not in key}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@cases(120)
@given(data=hostile.odd_files(FILE_STATE), lazily=st.booleans(), reference=st.booleans())
def test_files_are_merged_or_refused(folder: Path, data: bytes, lazily: bool, reference: bool) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data)
    with harmless(str(path)):
        try:
            state = hostile.Lazy(path) if lazily else safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            assert isinstance(error, SafetensorError), repr(error)
            event("refused by safetensors")
            return
        arguments = {"states": [FILE_STATE, state], "method": "from"}
        if reference:
            arguments["reference"] = FILE_STATE
        assert_refused_or_merged(arguments)


# --- The command line ------------------------------------------------------------------------------------------------

OPTION_NAMES = [field.name for field in dataclasses.fields(Options)]
typed = st.one_of(
    hostile.numbers.map(str),
    hostile.texts.filter(lambda text: "\0" not in text and len(text) < 1000),
    st.sampled_from(
        ["reviews", "rte,wnli", "from:k=1", "4,8", "tasks", "true", "--", "-", "--k", "from,from", ",", "~"]
    ),
)


def assert_one_line(message: str) -> None:
    assert message.strip() and len(message.strip().splitlines()) == 1, message


@cases(100)
@given(
    values=st.dictionaries(
        st.one_of(st.sampled_from(OPTION_NAMES), st.sampled_from(OPTION_NAMES), hostile.texts),
        st.one_of(typed, hostile.json_values),
        max_size=3,
    )
)
def test_options_are_valid_or_refused_in_one_line(values: dict[str, Any]) -> None:
    with harmless():
        try:
            options = Options.from_mapping(values).validated()
        except BadInput as error:
            assert_one_line(str(error))
            return
        assert isinstance(options.needs_hub, bool)
    assert Options.from_mapping(json.loads(json.dumps(options.to_dict()))).validated() == options


flags = st.sampled_from([*OPTION_NAMES, "no_full", "quick", "colour"]).map(lambda name: "--" + name.replace("_", "-"))


@cases(60)
@given(arguments=st.lists(st.one_of(flags, typed), max_size=4))
def test_arguments_are_parsed_or_refused_in_one_line(arguments: list[str]) -> None:
    started: list[Options] = []
    said = io.StringIO()
    streams = contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO())
    with streams[0], streams[1], pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["simulations", *arguments])
        patch.setattr(environment, "prepare", lambda online: None)
        patch.setattr("simulations.running.run", started.append)
        simulations.__main__.main()
    assert ended.value.code in (0, 2)
    if ended.value.code == 2:
        assert not started
        assert_one_line(said.getvalue())
        assert said.getvalue().startswith("error: ")
    else:
        assert said.getvalue() == ""


settings_names = ["k", "rank", "seed", "density", "validate", "lora_config", "fraction_train", "method", "colour"]
settings_of_strategies = st.one_of(st.builds("{}={}".format, st.sampled_from(settings_names), typed), typed)


@cases(60)
@given(name=st.sampled_from(["from", "fedavg", *methods(), ""]), pairs=st.lists(settings_of_strategies, max_size=2))
def test_strategies_are_built_or_refused_in_one_line(name: str, pairs: list[str]) -> None:
    with harmless():
        try:
            strategies.build(":".join([name, *pairs]), Options(), CONFIG)
        except BadInput as error:
            assert_one_line(" ".join(str(error).split()))


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["--k", "a\nb"], ["--clients", "9" * 5000], ["stray"]])
def test_the_command_itself_refuses_in_one_line(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulations", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr)


# --- Code and memory -------------------------------------------------------------------------------------------------

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
    np.save(data, np.array([hostile.Exploit()], dtype=object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", data.getvalue())
    with harmless(), pytest.raises(ValueError, match="'w': expected a readable array"):
        to_state(ArrayRecord({"w": array}))
    with pytest.raises(AssertionError, match="a pickle was loaded"):
        np.load(io.BytesIO(data.getvalue()), allow_pickle=True)


def test_the_watch_sees_what_it_watches_for(tmp_path: Path) -> None:
    acts = [
        lambda: pickle.loads(pickle.dumps(hostile.Lazy)),
        lambda: (tmp_path / "new").write_text("x"),
        lambda: open("/etc/passwd").close(),
        lambda: subprocess.run(["true"]),
    ]
    for act in acts:
        with pytest.raises(AssertionError), harmless():
            act()


@pytest.mark.parametrize("path", hostile.PATHS)
def test_paths_in_adapter_configs_are_never_followed(path: str) -> None:
    fields = ("base_model_name_or_path", "path_initial_model_for_weight_conversion", "parent_library", "revision")
    config = {**CONFIG, **dict.fromkeys(fields, path), "auto_mapping": {"base_model_class": path}}
    with harmless():
        _, report = merge([FILE_STATE, FILE_STATE], configs=[config, config])
    assert report.config is not None and report.config["base_model_name_or_path"] == path  # text, as it came


# In a process of its own, which may not take half a GiB more than it has when everything is loaded.
BOUNDED = """
import json, re, resource, sys
import torch
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
import safetensors.torch
from fedfrom import merge
from fedfrom.wire.records import to_state
from tests import hostile

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

state = {"w": torch.ones(2, 3)}
merge([state, state], state)
before, limit = status("VmHWM"), status("VmSize") * 1024 + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
refused = 0
for shape in ["(1000000000000,)", "(1000000,1000000)", "(4294967296,4294967296)", "(1000000000,)", "(1000000000000,0)"]:
    for descr in ["'<f4'", "'<f8'", "'|u1'", "'|O'", "'(1000000000,)f4'", "'|S1000000000'"]:
        data = hostile.npy(descr, shape, b"0" * 1000)
        try:
            to_state(ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", data)}))
        except ValueError:
            refused += 1
for shape in [[10**12], [10**6, 10**6], [2**32, 2**32], [2**62, 4], [10**12, 0], [2**63]]:
    for end in [0, 24, 10**12, 4 * 10**12, 2**63]:
        header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        with open(sys.argv[1], "wb") as file:
            file.write(hostile.with_header(header, b"0" * 24))
        for load in (hostile.Lazy, safetensors.torch.load_file):
            try:
                merge([state, load(sys.argv[1])])
            except (SafetensorError, ValueError):
                refused += 1
with open(sys.argv[1], "wb") as file:
    file.write((10**12).to_bytes(8, "little") + b"{}")
try:
    hostile.Lazy(sys.argv[1])
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


# --- One by one ------------------------------------------------------------------------------------------------------


def refused(*words: str, **arguments: Any) -> str:
    with hostile.soon(20), pytest.raises(ValueError) as caught:
        merge(**arguments)
    assert type(caught.value) is ValueError
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


NO_EXPRESSIONS = ["(", "a{99999999999}", "(" * 3000 + ")" * 3000, "*", "(?i)V"]
BOMBS = [hostile.BOMB, "(a+)+$", "(.*)*X", "(a|a)" * 40 + "X", ".*" * 30 + "X", "a?" * 40 + "a" * 40, "(?:.|.)+X"]
BOMBS += [r"(?:\w|\.){5,}X", r"[\]]*[a-z]*.*.+\w+X", "(a|b|(c|d)){2}"]


@pytest.mark.parametrize("pattern", [*BOMBS, *NO_EXPRESSIONS])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_expressions_that_may_never_end_are_refused(pattern: str, field: str) -> None:
    configs = [CONFIG, {**CONFIG, field: {pattern: 4}}]
    refused("client 1", field, "regular expressions", states=[FILE_STATE] * 2, configs=configs)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj",
        r"model\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\.(q|k|v|o)_proj",
        r"^encoder\.layer\.[0-9]+\.attention\.self\.(query|value)$",
        r"(.*\.)?v",
        "a)?(.*v",
        r"layers\.\d{1,2}\.v",
    ],
)
def test_expressions_that_people_write_are_taken(pattern: str) -> None:
    config = {**CONFIG, "alpha_pattern": {pattern: 2}}
    found = rank_and_scaling(check_config(config, "client 0"), hostile.V)
    assert found == (4, hostile.scaling_of(config)(hostile.V))


@cases(50)
@given(
    pattern=st.text("ab.-é_", min_size=1, max_size=5),
    module=st.lists(st.text("abé-_", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join),
)
def test_names_match_as_the_expressions_that_they_are(pattern: str, module: str) -> None:
    config = {**CONFIG, "alpha_pattern": {pattern: 3}}
    expected = 3 if re.match(rf"(.*\.)?({pattern})$", module) else CONFIG["lora_alpha"]
    assert rank_and_scaling(config, module)[1] * 4 == expected


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r": 0.5}, "whole"),
        ({"r": 4.5}, "whole"),
        ({"r": 10**400}, " r "),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": "v"}, "alpha_pattern"),
        ({"rank_pattern": {"v": 0.5}}, "whole"),
        ({"rank_pattern": {3: 4}}, "rank_pattern"),
        ({"peft_type": "LO\nRA"}, "peft_type"),
    ],
)
def test_configs_that_are_none(changes: dict[str, Any], word: str) -> None:
    message = refused("client 1", word, states=[FILE_STATE] * 2, configs=[CONFIG, {**CONFIG, **changes}])
    assert message.isprintable()


@pytest.mark.parametrize(
    "value", [None, 3, "w", np.ones(2), torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()]
)
def test_values_that_are_no_tensors_of_real_numbers(value: Any) -> None:
    refused("client 1, 'w'", "expected a", states=[{"w": torch.ones(2)}, {"w": value}])
    refused("reference, 'w'", "expected a", states=[{"w": torch.ones(2)}], reference={"w": value})


def test_states_that_can_not_be_read() -> None:
    class Broken(dict):
        def __getitem__(self, key: str) -> Any:
            raise OSError("the disk\nis gone")

    refused("client 1, 'w'", "readable", "OSError", states=[{"w": torch.ones(2)}, Broken(w=None)])
    refused("reference", "list", states=[{"w": torch.ones(2)}], reference=[1])
    refused("client 1", "text", states=[{"w": torch.ones(2)}, {3: torch.ones(2)}])
    refused("client 1", "characters", states=[{"w": torch.ones(2)}, {".lora_a" * 10**5 + "\nx": torch.ones(2)}])
    for bad in (10**400, "3", None):
        refused("client 1", "examples", states=[{"w": torch.ones(2)}] * 2, examples=[1, bad])


def test_factors_are_never_taken_for_tensors() -> None:
    """A name that PEFT does not give is refused, or read all the same: A and B are not averaged one by one."""
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    for prefix in ("", "."):
        refused("client 0", "lora_A", states=[{f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B}])
    _, report = merge([{"a\nb.lora_A.weight": A, "a\nb.lora_B.weight": B}] * 2)
    assert [layer.kind for layer in report.layers] == ["adapter"]


def test_factors_wider_than_their_matrix_take_no_more_than_their_own_memory() -> None:
    rank = 5000
    states = [{"l.lora_A.weight": torch.randn(rank, 5), "l.lora_B.weight": torch.randn(4, rank)} for _ in range(3)]
    with LargestResult() as largest:
        merged, report = merge(states[:2], states[2], rank=4)
    assert largest.numel <= 3 * rank * 5
    expected = hostile.dense({key: value.numpy() for key, value in states[2].items()}, lambda module: 1.0)["l"]
    deltas = [
        hostile.dense({key: value.numpy() for key, value in state.items()}, lambda module: 1.0)["l"] - expected
        for state in states[:2]
    ]
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    assert report.layers[0].norms == pytest.approx(norms, rel=1e-9)
    assert report.layers[0].cosines[0][1] == pytest.approx(float((deltas[0] * deltas[1]).sum()) / math.prod(norms))
    assert merged["l.lora_A.weight"].shape == (4, 5)
    same, report = merge([states[2], states[2]], states[2], rank=4)
    assert report.layers[0].norms == [0.0, 0.0]  # who changes nothing has no norm


def test_a_reply_may_not_name_more_modules_than_there_are() -> None:
    strategy = FedFroM(lora_config=CONFIG)
    honest, bad = sent_and_replies(strategy, STATES[np.float32])
    names = json.dumps({f"m{i}": 4 for i in range(100_000)})
    bad.content[ADAPTER_KEY] = ConfigRecord({**CONFIG, "rank_pattern": names, "alpha_pattern": "{}"})
    with hostile.soon(20):
        strategy.aggregate_train(1, [*honest, bad])
    (reason,) = strategy.reports[1].rejected.values()
    assert "rank_pattern" in reason and "100000" in reason


def test_a_reason_is_one_line_of_bearable_length() -> None:
    strategy = FedFroM()
    honest, bad = sent_and_replies(strategy, STATES[np.float32])
    bad.content["m\x1b[2J" + "x" * 10**6] = MetricRecord({"num-examples": 1})
    strategy.aggregate_train(1, [*honest, bad])
    (reason,) = strategy.reports[1].rejected.values()
    assert_reason(reason)


def test_numbers_that_no_option_holds() -> None:
    for name in ("clients", "seed", "rank"):
        for value in (math.inf, -math.inf, math.nan, -(10**400)):
            with pytest.raises(BadInput, match=f"--{name}"):
                Options.from_mapping({name: value}).validated()
    for name in ("k", "seed", "alpha"):
        with pytest.raises(BadInput, match=f"--{name}"):
            Options.from_mapping({name: 10**400}).validated()


def test_updates_whose_squares_leave_every_range() -> None:
    W = {"w": torch.full((3,), 1.0, dtype=torch.float64)}
    states = [{"w": torch.tensor([s, 2 * s, -s], dtype=torch.float64)} for s in (1e200, 3e200)]
    _, report = merge(states, W)
    assert report.interference == pytest.approx(report.layers[0].interference)
    assert report.cosines()[0][1] == pytest.approx(1.0)
    refused("server_lr", states=states, reference=W, server_lr=1e200)


def test_a_scaling_beyond_sense_is_no_update_to_square() -> None:
    strategy = FedFroM(lora_config=CONFIG)
    honest, bad = sent_and_replies(strategy, STATES[np.float64])
    bad.content[ADAPTER_KEY] = ConfigRecord(
        {**CONFIG, "lora_alpha": 1e200, "rank_pattern": "{}", "alpha_pattern": "{}"}
    )
    strategy.aggregate_train(1, [*honest, bad])
    (reason,) = strategy.reports[1].rejected.values()
    assert "product of norm up to" in reason


def test_names_that_are_no_files() -> None:
    for model in ("x" * 5000, "~nobody-has-this-name/model", "\0"):
        assert Options(model=model).validated().needs_hub
    for out in ("x" * 5000, "\0"):
        with pytest.raises(BadInput, match="--out"), Folder(out):
            pass


def test_results_never_lead_outside_their_folder(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "results"
    for path in (elsewhere, folder, folder / "from"):
        path.mkdir()
    (elsewhere / "adapter_model.safetensors").write_bytes(safetensors.torch.save(FILE_STATE))
    (folder / "from" / "adapter_model.bin").write_bytes(hostile.pickled()[0])
    found = {"options": {}, "tasks": [{"labels": []}], "strategies": {"from": {"folder": "../elsewhere"}}}
    (folder / "results.json").write_text(json.dumps(found))
    with pytest.raises(BadInput, match=r"from: expected adapter_model\.safetensors"):
        load_model(folder, "from")
    for text in ("[]", "3", '{"strategies": 3}', "[" * 10**5):
        (folder / "results.json").write_text(text)
        with pytest.raises(BadInput, match="no results of strategy"):
            load_model(folder, "from")
