"""The packages that carry the default model and data: found by path, checked, missed by name."""

import pytest

from fedfrom.errors import BadInput
from simulations import assets


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(BadInput, match=r"no-such-package==1.0 is not installed; .*pip install --no-deps"):
        assets.locate(("no-such-package", "1.0"), "file")


def test_another_version_is_refused() -> None:
    with pytest.raises(BadInput, match=r"pytest==0.0.1 is needed, found version"):
        assets.locate(("pytest", "0.0.1"), "file")


def test_other_weights_are_refused(tmp_path, monkeypatch) -> None:
    fake = tmp_path / "model.safetensors"
    fake.write_bytes(b"other weights")
    monkeypatch.setattr(assets, "locate", lambda package, name: fake)
    with pytest.raises(BadInput, match="expected sha256 53aa5117"):
        assets.model_folder.__wrapped__()


def test_reviews_are_distinct_and_without_plots() -> None:
    try:
        rows = assets.reviews()
    except BadInput as missing:
        pytest.skip(str(missing))
    texts = [text for text, _, _ in rows]
    assert len(rows) == len(set(texts)) == 12_752
    assert sum(fresh for _, fresh, _ in rows) / len(rows) == pytest.approx(0.578, abs=5e-4)
    assert all(text == text.strip() and text for text in texts)
