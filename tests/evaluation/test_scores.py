"""Scores against torch-fidelity's own command, against definitions in float64, against transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scored_pictures import COUNT, CPU, assert_equal_scores, pictures, pixels
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from zipar_train.evaluation.scores.clip import Clip
from zipar_train.evaluation.scores.features import inception
from zipar_train.evaluation.scores.reference import open_reference
from zipar_train.evaluation.scores.scores import Moments, fidelity
from zipar_train.models.tokenizers.base import Palette

pytestmark = pytest.mark.usefixtures("few_groups")


@pytest.mark.slow(seconds=25)
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
    assert_equal_scores(ours, theirs)
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


@pytest.mark.slow
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
