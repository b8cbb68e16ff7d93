"""scripts/gpu: wheels for a bare machine, of the pinned versions; only what is lacking is installed."""

import re
import shutil
import sys

import pytest
from gpu_scripts import HERE, SCRIPTS, script

PIP = """#!{python}
import pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--dest" if "download" in words else "--wheel-dir") + 1])
if "download" in words:
    assert "--no-deps" in words and words[words.index("--python-version") + 1] == "3.12", words
    for word in words:
        if "==" in word:
            (folder / (word.replace("==", "-") + "-py3-none-any.whl")).write_bytes(b"x" * 1000)
else:
    (folder / "zipar_train-0.1.0-py3-none-any.whl").write_bytes(b"x")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what `prepare` reads, and a Python whose pip makes wheels of nothing."""
    root = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, root / "scripts" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "constraints.txt", root)
    fake = tmp_path / "python"
    fake.write_text(PIP.format(python=sys.executable))
    fake.chmod(0o755)
    return root, {"PYTHON": str(fake), "GIT_CEILING_DIRECTORIES": str(tmp_path)}


def test_prepare_collects_wheels_of_the_pinned_versions_and_files(checkout, tmp_path):
    root, env = checkout
    (tmp_path / "codes.npz").write_bytes(b"y" * 2**20)
    (root / ".gpu" / "wheels").mkdir(parents=True)
    (root / ".gpu" / "wheels" / "old-1.0-py3-none-any.whl").touch()
    done = script("prepare", "--with", tmp_path / "codes.npz", root=root, **env)
    assert done.returncode == 0, done.stderr
    wheels = {path.name for path in (root / ".gpu" / "wheels").iterdir()}
    pins = dict(line.split("==") for line in (HERE / "constraints.txt").read_text().split())
    assert f"pydantic_core-{pins['pydantic_core']}-py3-none-any.whl" in wheels
    assert f"webdataset-{pins['webdataset']}-py3-none-any.whl" in wheels
    assert "zipar_train-0.1.0-py3-none-any.whl" in wheels and not any(name.startswith("old") for name in wheels)
    assert (root / ".gpu" / "files" / "codes.npz").read_bytes() == b"y" * 2**20
    assert (root / ".gpu" / "revision").read_text() == "none\n"  # the copy is no git checkout
    assert re.search(r"1\.00 MiB  \.gpu/files/codes\.npz", done.stdout) and "1.01 MiB  in all" in done.stdout
    assert ".gpu/" in (HERE / ".gitignore").read_text().split()


def test_prepare_refuses_what_it_cannot_carry(checkout, tmp_path):
    root, env = checkout
    done = script("prepare", "--with", tmp_path / "none.npz", root=root, **env)
    assert done.returncode == 1 and "none.npz: there is no such file" in done.stderr
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.npz").touch()
    done = script("prepare", "--with", tmp_path / "a" / "one.npz", tmp_path / "b" / "one.npz", root=root, **env)
    assert done.returncode == 1 and "the same name" in done.stderr
    with (tmp_path / "large.npz").open("wb") as file:
        file.truncate(41 * 2**20)
    done = script("prepare", "--with", tmp_path / "large.npz", root=root, **env)
    assert done.returncode == 1 and "more than 40 MiB" in done.stderr and "Traceback" not in done.stderr
    (root / "constraints.txt").write_text("numpy==2.4.6\n")
    done = script("prepare", root=root, **env)
    assert done.returncode == 1 and "constraints.txt does not pin pydantic" in done.stderr


def test_only_what_is_lacking_or_too_old_is_installed(gpu, tmp_path):
    from importlib.metadata import version

    module = gpu("packages")
    have = version("numpy")
    first, *rest = have.split(".", 1)
    names = [f"numpy-{have}", f"numpy-{int(first) + 1}.{rest[0]}", f"numpy-{int(first) - 1}.9", "no_such_package-1.0"]
    for name in names:
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    assert {path.name.removesuffix("-py3-none-any.whl") for path in module.lacking(tmp_path)} == {names[1], names[3]}
