"""Captions for evaluation: from data sets, tables, texts and shards."""

import io

import datasets
import numpy as np
import pytest

from zipar_train.evaluation.captions import captions_of


def test_captions_of_data_sets_are_one_a_row(tmp_path, monkeypatch):
    """Of a list of captions the first; a row without one is left out."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, split, rows in (
        ("lists", "train", {"captions": [["a cat", "the cat"], [], None, [None, " ", "a dog"]]}),
        ("none", "train", {"text": ["a cat", None, " ", "a dog"]}),
        ("held", "validation", {"id": [1, 2], "prompt": ["a cat", "a dog"]}),
    ):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / name / f"{split}.parquet")
        at = str(tmp_path / name) + (":val" if split != "train" else "")
        assert captions_of(at)[0] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="it has no split 'train', but validation"):
        captions_of(str(tmp_path / "held"))
    datasets.Dataset.from_dict({"label": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="its columns are label"):
        captions_of(str(tmp_path / "numbers.parquet"))


def test_captions_are_read_from_tables_texts_and_shards(tmp_path):
    (tmp_path / "a.csv").write_text('Prompt\n"a car,\nblue"\n\nhouse\n')
    (tmp_path / "b.tsv").write_text('Category\tCaption\nx\ta   "car\ny\thouse\n')
    (tmp_path / "c.txt").write_text('a "car\nhouse\n')
    assert captions_of(str(tmp_path / "a.csv"))[0] == ["a car, blue", "house"]
    found, words = captions_of(str(tmp_path / "b.tsv"))
    assert found == captions_of(str(tmp_path / "c.txt"))[0] == ['a "car', "house"]
    assert words.startswith("2 captions of b.tsv, ")
    (tmp_path / "d.csv").write_text("x,y\n1,2\n")
    (tmp_path / "e.txt").write_text("\n\n")
    for name, message in {
        "d.csv": "its columns are x, y",
        "e.txt": "no captions there",
        "f.csv": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=message):
            captions_of(str(tmp_path / name))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "g.txt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        captions_of(str(tmp_path / "g.txt"))
