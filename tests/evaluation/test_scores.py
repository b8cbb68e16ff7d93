"""Scores against torch-fidelity's own command, against definitions in float64, against transformers; ADM's files."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from zipar_train.evaluation.captions import captions_of
from zipar_train.evaluation.scores import scores
from zipar_train.evaluation.scores.adm_npz import read_reference, write_images
from zipar_train.evaluation.scores.clip import Clip
from zipar_train.evaluation.scores.features import Pictures, inception
from zipar_train.evaluation.scores.reference import open_reference
from zipar_train.evaluation.scores.scores import Moments, fidelity
from zipar_train.models.tokenizers.base import Palette

CPU, COUNT = torch.device("cpu"), 12


@pytest.fixture(autouse=True)
def _few_groups(monkeypatch):
    """Error bars of 2048 features take half a minute with all ten groups; they have a test of their own."""
    monkeypatch.setattr(scores, "GROUPS", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two folders of pictures, the second smoother."""
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"pictures{number}")
        rng = np.random.default_rng(number)
        for i in range(COUNT):
            small = Image.fromarray(rng.integers(0, 256, (9 - 3 * number, 9 - 3 * number, 3)).astype(np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        found.append(folder)
    return found


def pixels(folder: Path) -> torch.Tensor:
    images = [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def pictures(folder: Path, block: int = 7) -> Pictures:
    return Pictures(lambda: iter(pixels(folder).split(block)), COUNT)


@pytest.fixture(scope="module")
def extractor(inception_weights):
    return inception(str(inception_weights), device=CPU)


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


@pytest.mark.slow
def test_scores_are_those_of_torch_fidelitys_own_command(inception_weights, folders, extractor):
    """FID, KID, IS, precision and recall, the whole of both programs, from the same PNG files."""
    a, b = folders
    size = (COUNT + 1) // 2
    command = [
        "--input1",
        a,
        "--input2",
        b,
        "--isc",
        "--fid",
        "--kid",
        "--prc",
        "--cpu",
        "--json",
        "--silent",
        "--feature-extractor",
        "inception-v3-compat",
        "--feature-extractor-weights-path",
        inception_weights,
        "--kid-subset-size",
        size,
        "--no-cache",
    ]
    code = "from torch_fidelity.fidelity import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    reference = open_reference(str(b), extractor, tokenizer=Palette.grey(2), size=(40, 40))
    ours = fidelity(extractor(pictures(a)), reference, extractor)
    pairs = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "isc": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for mine, name in pairs.items():
        assert ours[mine].mean == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name
    assert ours["fid"].mean > 1e-3 and ours["isc"].mean > 1
    assert ours["fid"].std > 0 and ours["kid"].std > 0


def test_running_sums_are_mean_and_covariance():
    rows = torch.randn(60, 40, dtype=torch.float64) * 3 + 100
    moments = Moments()
    for block in rows.split(7):
        moments.add(block)
    found = moments.statistics()
    assert np.allclose(found["mu"], rows.numpy().mean(0), rtol=1e-12)
    assert np.allclose(found["sigma"], np.cov(rows.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)


def test_spatial_features_are_the_first_channels_of_mixed_6(folders, inception_weights, extractor):
    """Layer by layer through the network, without a hook; in ADM's order, rows and columns before channels."""
    network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(inception_weights))
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = interpolate_bilinear_2d_like_tensorflow1x(pixels(folders[0]).float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    with torch.no_grad():
        for name in (
            "Conv2d_1a_3x3",
            "Conv2d_2a_3x3",
            "Conv2d_2b_3x3",
            "MaxPool_1",
            "Conv2d_3b_1x1",
            "Conv2d_4a_3x3",
            "MaxPool_2",
            "Mixed_5b",
            "Mixed_5c",
            "Mixed_5d",
            "Mixed_6a",
            "Mixed_6b",
            "Mixed_6c",
        ):
            x = getattr(network, name)(x)
        spatial = network.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).reshape(COUNT, 2023).double().numpy()
    found = extractor(pictures(folders[0]), spatial=True).spatial.statistics()
    assert np.allclose(found["mu"], spatial.mean(0), rtol=1e-6)
    assert np.allclose(found["sigma"], np.cov(spatial, rowvar=False), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="its images have 40 x 40 pixels, the drawn ones 256 x 256"):
        open_reference(
            str(adm_file(tmp_path / "a.npz", folders[0])), extractor, tokenizer=Palette.grey(2), size=(256, 256)
        )
    whole = (tmp_path / "a.npz").read_bytes()
    for length in (100, len(whole) // 2):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npz is no readable \.npz file"):
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
    with pytest.raises(ValueError, match=r"000\.png has 40 x 40 pixels, the drawn images 64"):
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


def test_inceptions_weights_are_told_from_other_files(tmp_path, inception_weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth", "gone.pth"):
        with pytest.raises(ValueError, match=rf"evaluate\.features_weights = .*{name}: not"):
            inception(str(tmp_path / name), device=CPU)
    state = torch.load(inception_weights, weights_only=True)
    state["fc.weight"] = state["fc.weight"][:10]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"short\.pth: not Inception's"):
        inception(str(tmp_path / "short.pth"), device=CPU)
    cached = tmp_path / "empty" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    for content in (b"", b"no weights"):
        cached.write_bytes(content)
        with pytest.raises(ValueError, match=r"6726825d\.pth: not a file of weights .* Remove it, and fetch"):
            inception(None, device=CPU)


def test_clip_score_is_a_direct_transformers_computation(clip, folders):
    """One picture at a time, from its file, through transformers' own logits."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    captions = [["a blue car", "houses", "a very long caption of more letters than fit"][k % 3] for k in range(COUNT)]
    ours = Clip(str(clip), device=CPU)(pixels(folders[0]), captions)
    for file, caption, found in zip(sorted(folders[0].glob("*.png")), captions, ours, strict=True):
        with Image.open(file) as image:
            inputs = processor(text=[caption], images=[image], truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits_per_image / model.logit_scale.exp()
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert ours.std() > 0
    with pytest.raises(ValueError, match=r"evaluate\.clip = .*: no CLIP can be loaded"):
        Clip(str(folders[0]), device=CPU)


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
