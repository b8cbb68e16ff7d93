"""Pictures that scores are measured against: decoded like other sources, known by a checksum."""

import os

import numpy as np
import pytest
from commands import picture
from PIL import Image

from zipar_train.data.crops import centre_crop
from zipar_train.data.image_files import named, picture_files
from zipar_train.evaluation.scores.reference import open_reference


class Seen:
    """An extractor that keeps the pictures it is shown."""

    inception, name = False, "seen"

    def __call__(self, pictures, *, spatial):
        self.pictures = [block for block in pictures.blocks()]
        raise StopAsyncIteration


def test_a_reference_decodes_like_other_sources_and_leaves_out_what_is_no_picture(tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    for i in range(10):
        picture(i, size=(40, 32)).save(tmp_path / f"{i}.jpg", exif=exif)
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    os.mkfifo(tmp_path / "y.png")
    (tmp_path / "loop").symlink_to(".")
    extractor = Seen()
    with pytest.raises(StopAsyncIteration):
        open_reference(str(tmp_path), extractor, tokenizer=None, size=(32, 32))
    assert "4 of its files are not compared with" in capsys.readouterr().err
    wanted = Image.open(tmp_path / "0.jpg").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(extractor.pictures[0][0].numpy(), np.asarray(centre_crop(wanted, 32, 32)).transpose(2, 0, 1))
    (tmp_path / "z.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="z.png is not a readable picture"):
        open_reference(str(tmp_path), extractor, tokenizer=None, size=(32, 32))


def test_a_references_checksum_is_of_names_and_sizes(tmp_path):
    """As in earlier versions: results against the same folder stay comparable."""
    for name in ("0.png", "1.png", "z/é.png"):
        (tmp_path / "z").mkdir(exist_ok=True)
        picture(1).save(tmp_path / name)
    files = sorted(tmp_path.rglob("*.png"))
    found = sorted(picture_files(tmp_path, root=tmp_path).files)
    assert found == files
    assert [named(file, tmp_path) for file in found] == [str(file.relative_to(tmp_path)) for file in files]
