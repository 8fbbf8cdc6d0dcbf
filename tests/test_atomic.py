"""A file or folder is there as a whole or not at all, with the rights of any new one, and nothing beside it."""

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedfrom.atomic import publish, staging_folder, whole_file, write_whole
from fedfrom.errors import BadInput
from fedfrom.files.output import Output, write_card
from tests.killed import fork, was_killed


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and what is renamed, in order; a hidden name, part of which is random, as "hidden"."""
    done: list[str] = []
    flush, move = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def short(path: str | Path) -> str:
        name = Path(path).name
        return "hidden" if name.startswith(".") else name

    def flushed(descriptor: int) -> None:
        done.append(short(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def moved(name: str) -> Callable[[Path, Path], None]:
        def move_noted(old: Path, new: Path) -> None:
            done.append(f"{short(old)} -> {short(new)}")
            move[name](old, new)

        return move_noted

    monkeypatch.setattr(os, "fsync", flushed)
    for name in move:
        monkeypatch.setattr(os, name, moved(name))
    return done


def fill(folder: Path, text: str) -> None:
    """Put a folder in place with a file and a folder within."""
    staging = staging_folder(folder)
    (staging / "file").write_text(text)
    (staging / "within").mkdir()
    save_file({"w": torch.ones(2)}, staging / "within" / "w.safetensors")
    publish(staging, folder)


# --- What is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_its_content_and_the_rights_of_a_new_one(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        write_whole(tmp_path / "a.txt", "é")
        write_whole(str(tmp_path / "b"), b"\0")
        with whole_file(tmp_path / "w.safetensors") as hidden:
            assert hidden.parent == tmp_path and hidden.name.startswith(".") and hidden.suffix == ".safetensors"
            save_file({"w": torch.ones(2)}, hidden)  # safetensors lets a file's owner alone read it
    assert (tmp_path / "a.txt").read_bytes() == "é".encode() and (tmp_path / "b").read_bytes() == b"\0"
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b", "w.safetensors"]
    assert {rights(path) for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_folder_and_all_in_it_have_the_rights_of_new_ones(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        for text in ("old", "new"):
            fill(tmp_path / "out", text)
    assert (tmp_path / "out" / "file").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "out"]
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert rights(path) == (0o777 if path.is_dir() else 0o666) & ~mask


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path: Path, steps: list[str]) -> None:
    write_whole(tmp_path / "a", "x")
    assert steps == ["hidden", "hidden -> a", tmp_path.name]
    steps.clear()
    fill(tmp_path / "out", "x")
    at = steps.index("hidden -> out")
    assert steps[at - 1] == "hidden" and set(steps[: at - 1]) == {"file", "within", "w.safetensors"}
    assert steps.index("w.safetensors") < steps.index("within") and steps[at + 1 :] == [tmp_path.name]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "a").symlink_to("mine")
    (tmp_path / "out").symlink_to("folder")
    write_whole(tmp_path / "a", "new")
    fill(tmp_path / "out", "new")
    assert (tmp_path / "mine").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"
    assert (tmp_path / "a").read_text() == (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder", "mine", "out"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a." + "x" * 250, "x" * 243 + ".safetensors"])
def test_a_name_as_long_as_the_file_system_takes_it(tmp_path: Path, name: str) -> None:
    write_whole(tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    fill(tmp_path / name, "x")
    fill(tmp_path / name, "y")
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- Where it fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()])
def test_after_an_error_the_earlier_file_is_there_and_no_other(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    for earlier in (None, "old"):
        if earlier:
            path.write_text(earlier)
        with pytest.raises(type(error)), whole_file(path) as hidden:
            hidden.write_text("half")
            raise error
        assert [entry.read_text() for entry in tmp_path.iterdir()] == ([earlier] if earlier else [])


@pytest.mark.parametrize("name", ["x" * 256, "folder", "gone/a", "file/a", "a\0b"])
def test_a_place_that_is_none_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OSError, ValueError)), whole_file(tmp_path / name):
        pytest.fail("the block ran")
    with pytest.raises((OSError, ValueError)):
        staging_folder(tmp_path / ("file" if name == "folder" else name))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_can_not_replace_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    write_card(out, "a card")
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if Path(old).name.startswith(".out-") and not Path(old).name.endswith("-previous"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BadInput, match="No space left"), Output(out, [], force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_a_kill_leaves_the_earlier_file(tmp_path: Path) -> None:
    def killed_within() -> None:
        with whole_file(tmp_path / "a") as hidden:
            hidden.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "a").write_text("old")
    assert was_killed(fork(killed_within))
    assert (tmp_path / "a").read_text() == "old"
    write_whole(tmp_path / "a", "new")  # the hidden file that was left is in nobody's way
    assert (tmp_path / "a").read_text() == "new"
