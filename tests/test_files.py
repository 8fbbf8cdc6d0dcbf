"""Tensors and folders on disk: what the writer writes safetensors reads, and what lies is refused by name."""

import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedfrom.errors import BadInput
from fedfrom.files import folders as F
from fedfrom.files.inspection import stable_rank
from fedfrom.files.tensors import DTYPES, Spec, Tensors, Writer
from fedfrom.merging.linalg.lowrank import LowRank
from fedfrom.merging.linalg.samples import sampled
from tests import folders


@st.composite
def states(draw):
    """States of any dtypes, shapes (scalars and empty ones too) and keys."""
    keys = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), unique=True, max_size=8))
    state = {}
    for i, key in enumerate(key for key in keys if key != "__metadata__"):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        numbers = 40 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
        state[key] = numbers.to(draw(st.sampled_from(list(DTYPES.values()))))
    return state


@given(states(), st.randoms())
def test_safetensors_reads_what_the_writer_wrote_in_any_order(tmp_path_factory, state, random):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    writer = Writer(path, {key: Spec(t.dtype, tuple(t.shape)) for key, t in state.items()})
    keys = list(state)
    random.shuffle(keys)
    for key in keys:
        writer.write(key, state[key])
    writer.close()
    found = load_file(path)
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert bytes(found[key].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))
        start = json.loads(path.read_bytes()[8:][: struct.unpack("<Q", path.read_bytes()[:8])[0]])[key]["data_offsets"]
        assert start[0] % tensor.element_size() == 0, "aligned, as readers that map the file need it"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours = Tensors({path: None})
    assert list(ours) == list(ours.specs) and all(ours.spec(key).shape == state[key].shape for key in ours)


def test_a_view_of_a_larger_tensor_is_written_as_itself(tmp_path):
    view = folders.normal(6, 8, seed=0)[1:4, ::2].T
    writer = Writer(tmp_path / "a.safetensors", {"a": Spec(view.dtype, tuple(view.shape))})
    writer.write("a", view)
    writer.close()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], view)


def test_the_writer_takes_what_was_announced_and_all_of_it(tmp_path):
    writer = Writer(tmp_path / "a.safetensors", {"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (2,))})
    with pytest.raises(ValueError, match=r"'a': expected \(2,\) float32, found \(3,\) float32"):
        writer.write("a", torch.zeros(3))
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="'b'"):
        writer.close()
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "a.safetensors", {})


def test_a_tensor_that_is_held_is_read_once(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "a.safetensors")
    tensors = Tensors({tmp_path / "a.safetensors": None})
    held = tensors["a"]
    assert tensors["b"] is not held and tensors["a"] is held
    where = held.data_ptr()
    assert where == tensors["a"].data_ptr()


def test_threads_read_one_after_the_other(tmp_path, monkeypatch):
    inside, most = [], []

    class Slow:
        """A file that notes how many read from it at once."""

        def __init__(self, *arguments, **options):
            self._file = safe_open(*arguments, **options)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def get_tensor(self, key):
            inside.append(key)
            most.append(len(inside))
            time.sleep(0.002)
            inside.remove(key)
            return self._file.get_tensor(key)

    monkeypatch.setattr("fedfrom.files.tensors.safe_open", Slow)
    state = {f"{i}": folders.normal(3, seed=i) for i in range(20)}
    tensors = F.open_model(folders.write_checkpoint(tmp_path / "model", state, 5)).tensors
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: tensors[key].clone(), state))
    assert all(torch.equal(value, state[key]) for key, value in zip(state, found, strict=True)) and max(most) == 1


@pytest.mark.parametrize("wide", [None, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(1 << 16,), ((1 << 16) + 1,), (517, 300, 2), (), (0, 3)])
def test_a_tensor_is_read_a_block_at_a_time(tmp_path, monkeypatch, shape, dtype, wide):
    monkeypatch.setattr("fedfrom.files.tensors._LARGE", 0)
    tensor = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    save_file({"before": torch.ones(3), "a": tensor}, tmp_path / "a.safetensors")
    tensors = Tensors({tmp_path / "a.safetensors": None})
    tensors.wide = wide
    reader, whole = tensors.reader("a"), tensors["a"].reshape(-1)
    assert not isinstance(reader, torch.Tensor) and tensors._last is not None and reader.shape == shape
    assert reader.dtype == whole.dtype == (wide if wide is not None and dtype.is_floating_point else dtype)
    for start, stop in [(0, len(whole)), (len(whole) // 3, len(whole) // 2)]:
        for out in (None, torch.empty(stop - start, dtype=reader.dtype)):
            found = reader.read(start, stop, out)
            assert torch.equal(found, whole[start:stop]) and (out is None or found is out)
    assert torch.equal(reader.sample(), sampled(whole))


def test_small_tensors_are_read_as_a_whole(tmp_path):
    save_file({"small": torch.ones(1000), "large": torch.zeros(1 << 10, 1 << 10)}, tmp_path / "a.safetensors")
    tensors = Tensors({tmp_path / "a.safetensors": None})
    assert torch.equal(tensors.reader("small"), torch.ones(1000))
    assert not isinstance(tensors.reader("large"), torch.Tensor)


@pytest.mark.parametrize("change", ["cut", "gone", "other"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, change):
    monkeypatch.setattr("fedfrom.files.tensors._LARGE", 0)
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensors = Tensors({path: None})
    if change == "cut":
        reader = tensors.reader("a")
        os.truncate(path, 200)
        with pytest.raises(BadInput, match="a.safetensors, 'a': expected a readable tensor"):
            reader.read(0, 1000)
        return
    path.unlink() if change == "gone" else save_file({"b": torch.ones(1000)}, path)
    with pytest.raises(BadInput, match=r"a.safetensors: expected .* changed meanwhile"):
        tensors.reader("a")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_a_checkpoint_of_many_shards_holds_one_file_open(tmp_path, monkeypatch):
    state = {f"{i}": folders.normal(3, seed=i) for i in range(60)}
    name = folders.write_checkpoint(tmp_path / "model", state, 30)
    before = len(list(Path("/proc/self/fd").iterdir()))
    model = F.open_model(name)
    assert all(torch.equal(model.tensors[key], value) for key, value in state.items())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    monkeypatch.setattr("fedfrom.files.tensors._LARGE", 0)
    assert all(torch.equal(model.tensors.reader(key).read(0, 3), value) for key, value in state.items())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2, "and one that blocks are read of"


HEADERS = {
    "a tensor beyond the file": {"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}},
    "a shape that is not its bytes": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}},
    "two tensors in one place": {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"},
    "a size beyond any machine": {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
    "a dtype of its own": {"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}},
    "complex numbers": {"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}},
    "a gap": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    "a negative place": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
    "no object": [1, 2],
}


def file_of(header, data=b"\0" * 16):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        *(pytest.param(file_of(header), id=name) for name, header in HEADERS.items()),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x80\x04K\x01.", id="a pickle"),
        pytest.param(struct.pack("<Q", 2**60) + b"{}", id="a header beyond any machine"),
        pytest.param(b"\xff" * 40, id="noise"),
    ],
)
def test_a_lying_safetensors_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="a.safetensors") as refused:
        Tensors({path: None})
    assert len(str(refused.value)) < 1000


@given(st.integers(0, 400))
def test_a_file_cut_off_anywhere_is_refused(tmp_path_factory, length):
    folder = tmp_path_factory.mktemp("cut")
    save_file({"a": torch.ones(40), "b": torch.zeros(9)}, folder / "a.safetensors")
    whole = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(whole[: min(length, len(whole) - 1)])
    with pytest.raises(BadInput, match="damaged or cut off"):
        Tensors({folder / "a.safetensors": None})


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3, None])
def test_an_index_that_leads_outside_is_refused(tmp_path, file):
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / F.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(BadInput, match="of the same folder"):
        F.open_model(str(folder))


def test_a_link_out_of_the_folder_is_not_carried_over(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    folder = Path(folders.adapters(tmp_path, 1)[0])
    (folder / "LICENSE").symlink_to(secret)
    with pytest.raises(BadInput, match="LICENSE: a link that leads out"):
        F.carried_files(F.open_model(str(folder)))


def test_the_links_of_the_hubs_cache_are_carried_over(tmp_path):
    cache = tmp_path / "models--owner--name"
    folder = cache / "snapshots" / "abc"
    folders.write_adapter(folder, folders.adapter_state(0), folders.adapter_config())
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/123")
    files = F.carried_files(F.open_model(str(folder)))
    assert [path.name for path in files] == ["tokenizer.json"]
    target = tmp_path / "target"
    target.mkdir()
    F.copy_files(files, target)
    assert (target / "tokenizer.json").read_text() == "{}" and not (target / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": NaN', "[" * 100_000, "\xff\xfe"])
def test_json_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match="config.json: expected"):
        F.read_json(path)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(9, 30), (40, 25), (6, 5, 3)])
def test_the_stable_rank_is_that_of_the_singular_values(seed, shape):
    matrix = folders.normal(*shape, seed=seed)
    S = torch.linalg.svdvals(matrix.flatten(1).double())
    expected = float(S.square().sum() / S[0] ** 2)
    # the power iteration stops when a step gains less than 1e-5
    assert stable_rank(1e-3 * matrix) == pytest.approx(expected, rel=2e-3)
    assert stable_rank(LowRank.from_dense(matrix.flatten(1).double())) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("r", [1, 3, 7])
def test_the_stable_rank_of_equally_strong_directions_is_their_number(r):
    U, V = (torch.linalg.qr(folders.normal(20, r, seed=s)).Q for s in (0, 1))
    assert stable_rank(LowRank(U, V.T, 5.0)) == pytest.approx(r, rel=1e-5)
    assert stable_rank(U @ V.T) == pytest.approx(r, rel=1e-5)
    assert stable_rank(torch.zeros(4, 4)) == 0.0 and stable_rank(LowRank(U, 0 * V.T)) == 0.0
    assert stable_rank(torch.ones(5)) == 1.0
