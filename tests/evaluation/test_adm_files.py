"""ADM's files: the statistics of their pictures; what is no such file is refused; images for ADM are read back."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scored_pictures import COUNT, pictures, pixels

from zipar_train.evaluation.scores.adm_npz import read_reference, write_images
from zipar_train.evaluation.scores.reference import open_reference
from zipar_train.evaluation.scores.scores import fidelity
from zipar_train.models.tokenizers.base import Palette

pytestmark = pytest.mark.usefixtures("few_groups")


def adm_file(path: Path, folder: Path, network=None, **changes) -> Path:
    """A file as ADM's evaluator reads it, of a folder of pictures."""
    arrays = {"arr_0": pixels(folder).permute(0, 2, 3, 1).numpy()}
    if network is not None:
        features = network(pictures(folder), spatial=True)
        pooled = features.layers["2048"].double().numpy()
        spatial = features.spatial.statistics()
        arrays |= {
            "mu": pooled.mean(0),
            "sigma": np.cov(pooled, rowvar=False),
            "mu_s": spatial["mu"],
            "sigma_s": spatial["sigma"],
        }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.slow(seconds=25)
def test_adms_file_gives_the_statistics_of_its_pictures(folders, extractor, tmp_path):
    a, b = folders
    file = adm_file(tmp_path / "VIRTUAL_imagenet256_labeled.npz", b, extractor)
    by_folder = open_reference(str(b), extractor, tokenizer=Palette.grey(2), size=(40, 40))
    by_file = open_reference(str(file), extractor, tokenizer=Palette.grey(2), size=(40, 40))
    alone = open_reference(
        str(adm_file(tmp_path / "val_imagenet.npz", b)), extractor, tokenizer=Palette.grey(2), size=(40, 40)
    )
    for other in (by_file, alone):
        assert np.allclose(other.statistics["sigma"], by_folder.statistics["sigma"], rtol=1e-9, atol=1e-12)
        assert np.allclose(other.statistics["mu"], by_folder.statistics["mu"], rtol=1e-9)
        assert np.allclose(other.spatial["sigma"], by_folder.spatial["sigma"], rtol=1e-9, atol=1e-12)
        assert torch.equal(other.features.layers["2048"], by_folder.features.layers["2048"])
    assert (by_file.images, by_file.validation, by_folder.images) == (None, False, COUNT)
    assert alone.validation
    found = fidelity(extractor(pictures(a), spatial=True), by_file, extractor)
    assert found.keys() == {"fid", "sfid", "kid", "isc", "precision", "recall"}
    assert found["sfid"].mean > 0
    statistics = adm_file(tmp_path / "statistics.npz", b, extractor, arr_0=None, mu_s=None, sigma_s=None)
    assert open_reference(str(statistics), extractor, tokenizer=Palette.grey(2), size=(40, 40)).features is None


@pytest.mark.slow
def test_files_that_are_not_adms_are_refused(folders, extractor, tmp_path):
    ones = np.ones((12, 40, 40, 3), dtype=np.uint8)
    cases = {
        "float": ({"arr_0": ones.astype(np.float32)}, "arr_0 is float32"),
        "flat": ({"arr_0": ones[:, :, :, 0]}, r"arr_0 is uint8 \(12, 40, 40\)"),
        "colours": ({"arr_0": ones[..., :2]}, r"not uint8 \(N, height, width, 3\)"),
        "other": ({"arr_0": ones, "labels": np.ones(3)}, "holds 'labels', which is not of ADM's format"),
        "half": ({"arr_0": ones, "mu": np.ones(2048)}, "one of mu and sigma without the other"),
        "none": ({"mu_s": np.ones(2023), "sigma_s": np.ones((2023, 2023))}, "neither arr_0 nor mu"),
        "small": ({"arr_0": ones, "mu": np.ones(64), "sigma": np.ones((64, 64))}, r"mu is float64 \(64,\)|sigma is"),
        "pickled": ({"arr_0": np.array([{}], dtype=object)}, "arr_0 is object"),
        "nan": ({"mu": np.full(2048, np.nan), "sigma": np.ones((2048, 2048))}, "mu holds numbers that are not finite"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_reference(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="its images have 40 x 40 pixels, the generated ones 256 x 256"):
        open_reference(
            str(adm_file(tmp_path / "a.npz", folders[0])), extractor, tokenizer=Palette.grey(2), size=(256, 256)
        )
    whole = (tmp_path / "a.npz").read_bytes()
    for length in (100, len(whole) // 2):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npz is not a readable \.npz file"):
            read_reference(tmp_path / "cut.npz")
    (tmp_path / "flipped.npz").write_bytes(whole[:5000] + b"\xff\x00\xff" + whole[5003:])
    with pytest.raises(ValueError, match=r"flipped\.npz is damaged"):
        list(read_reference(tmp_path / "flipped.npz").blocks(5))
    with np.load(tmp_path / "a.npz") as file:
        np.savez_compressed(tmp_path / "small.npz", arr_0=file["arr_0"])
        np.savez(tmp_path / "few.npz", arr_0=file["arr_0"][:9])
    small = bytearray((tmp_path / "small.npz").read_bytes())
    small[3000:3030] = bytes(30)
    (tmp_path / "small.npz").write_bytes(small)
    with pytest.raises(ValueError, match=r"small\.npz is damaged: arr_0 is unreadable"):
        list(read_reference(tmp_path / "small.npz").blocks(5))
    with pytest.raises(ValueError, match=r"few\.npz: 9 pictures; at least 10 are needed"):
        open_reference(str(tmp_path / "few.npz"), extractor, tokenizer=Palette.grey(2), size=(40, 40))
    for source in ("gone.npz", "gone", "gone.json"):
        with pytest.raises(ValueError, match="gone"):
            open_reference(str(tmp_path / source), extractor, tokenizer=Palette.grey(2), size=(40, 40))
    with pytest.raises(ValueError, match=r"000\.png has 40 x 40 pixels, the generated images 64"):
        open_reference(str(folders[0]), extractor, tokenizer=Palette.grey(2), size=(64, 64))


def test_images_for_adm_are_read_back(tmp_path):
    """By numpy, and the way ADM's own reader streams them: the member's header, then bytes in order."""
    images = torch.randint(256, (11, 3, 8, 8), dtype=torch.uint8)
    write_images(tmp_path / "x.npz", images.split(4), count=11, size=(8, 8))
    expected = images.permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        assert np.array_equal(file["arr_0"], expected) and file["arr_0"].dtype == np.uint8
    with zipfile.ZipFile(tmp_path / "x.npz") as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == ((11, 8, 8, 3), False, np.dtype("uint8"))
        assert member.read() == expected.tobytes()
    assert torch.equal(torch.cat(list(read_reference(tmp_path / "x.npz").blocks(3))), images)

    def broken():
        yield images[:4]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*y\.npz: No space left"):
        write_images(tmp_path / "y.npz", broken(), count=11, size=(8, 8))
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
