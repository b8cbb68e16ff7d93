"""What a command is to write is looked at before the work whose result it takes."""

import os

import pytest

from zipar_train.decoding import generator

CHECKPOINT, RECIPE = ("--checkpoint", "nothing.ckpt"), ("--recipe", "digits")
FILES = {  # a command whose work would end with another message, and the option that takes a file
    "draw": ("generate", *CHECKPOINT, "--labels", "3", "--out"),
    "plan picture": ("plan", *RECIPE, "--png"),
    "plan": ("plan", *RECIPE, "--json"),
    "evaluate": ("evaluate", *RECIPE, *CHECKPOINT, "--json"),
    "advise": ("advise", *RECIPE, *CHECKPOINT, "--json"),
    "advise picture": ("advise", *RECIPE, *CHECKPOINT, "--png"),
    "bench": ("bench", *RECIPE, "--json"),
    "bench picture": ("bench", *RECIPE, "--png"),
    "doctor": ("doctor", "--json"),
    "shards check": ("shards", "check", "nothing.json", "--json"),
    "sweep": ("sweep", *RECIPE, "--file", "nothing.yaml", "--json"),
}
PICTURES = ("draw", "plan picture", "advise picture", "bench picture")
FOLDERS = {
    "tokenize": ("tokenize", *RECIPE, "--images", "nothing", "--out"),
    "shards import": ("shards", "import", *RECIPE, "--codes", "nothing", "--out"),
    "evaluate": ("evaluate", *RECIPE, *CHECKPOINT, "--out"),
    "sweep": ("sweep", *RECIPE, "--file", "nothing.yaml", "--out"),
    "export": ("export", *CHECKPOINT, "--out"),
}


@pytest.fixture
def refused(run):
    def call(*args):
        status, out, err = run(*args)
        assert status == 2 and not out, err
        return err

    return call


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_written_are_refused_first(refused, tmp_path, name):
    *command, option = FILES[name]
    (tmp_path / "a file").touch()
    (tmp_path / "folder.png").mkdir()
    for path, words in (
        (tmp_path / "no folder" / "x.png", f"the folder {tmp_path}/no folder is not there. Make it"),
        ("~/no folder/x.png", "no folder is not there. Make it"),
        (tmp_path / "folder.png", "is a folder: give the name of a file"),
        (tmp_path / "a file" / "x.png", "is not there"),
    ):
        err = refused(*command, option, path)
        assert err.startswith(f"zipar-train: {option} ") and words in err


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_need_an_ending_that_is_one(refused, tmp_path, name):
    *command, option = FILES[name]
    for file in ("x.xyz", "x.png.gz"):
        err = refused(*command, option, tmp_path / file)
        assert err.startswith(f"zipar-train: {option} ") and "format ends in" in err and "Use .png" in err


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_made_are_refused_first(refused, tmp_path, name):
    *command, option = FOLDERS[name]
    (tmp_path / "a file").touch()
    err = refused(*command, option, tmp_path / "a file" / "x" / "y")
    assert err.startswith(f"zipar-train: {option} ") and f"{tmp_path}/a file is not a folder" in err
    if name != "export":
        assert "is a file, not a folder" in refused(*command, option, tmp_path / "a file")
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="others see it from the file's mode")
@pytest.mark.parametrize(
    "command", [*FILES.values(), *FOLDERS.values()], ids=[*FILES, *(f"{n} folder" for n in FOLDERS)]
)
def test_folders_without_permission_are_refused_first(refused, tmp_path, monkeypatch, command):
    """To root everything is allowed, so the system's answer is replaced."""
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path) or not mode & os.W_OK)
    assert f"the folder {tmp_path} cannot be written" in refused(*command, tmp_path / "x.png")


@pytest.mark.parametrize("file", ["x.png", "x.JPG", "x.pdf", "x.webp"])
def test_a_drawing_is_made_only_for_a_file_that_can_be_written(run, tmp_path, monkeypatch, file):
    class Drawn(Exception):
        pass

    def load(*_, **__):
        raise Drawn

    monkeypatch.setattr(generator, "load", load)
    with pytest.raises(Drawn):
        run("generate", *CHECKPOINT, "--labels", "3", "--out", tmp_path / file)


def test_an_export_looks_at_its_place_before_it_reads_weights(run, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    (tmp_path / "x.md").touch()
    for out, to, words in (
        (taken, "hf", "already exists and is not an empty folder"),
        (taken, "adapter", "already exists and is not an empty folder"),
        (tmp_path / "x", "llamagen", "must end in .pt"),
        (tmp_path / "x.pt", "llamagen", "x.md already exists"),
    ):
        status, _, err = run("export", "--checkpoint", "nothing.ckpt", "--out", out, "--to", to)
        assert status == 2 and words in err
