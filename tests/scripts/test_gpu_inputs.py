"""What `scripts/gpu/evidence` reads of others' files: codes, a VQ-VAE's decoder, a compressed SqueezeNet."""

from pathlib import Path

import natural
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, relu

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu" / "tin"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_the_decoder_is_the_published_layers(tmp_path):
    """Against the layers written out, the ReLU in place included."""
    import decoder

    state = natural.vqvae()
    torch.save(state, tmp_path / "vq.pth")
    made = decoder.load_decoder(tmp_path / "vq.pth", device=CPU)
    codes = torch.randint(0, 512, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    w = {name.removeprefix("_decoder."): tensor for name, tensor in state.items()}
    x = state["_vq_vae._embedding.weight"][codes].movedim(-1, 1)
    x = conv2d(x, w["_conv_1.weight"], w["_conv_1.bias"], padding=1)
    for i in range(2):
        block = f"_residual_stack._layers.{i}._block"
        nn.ReLU(True)(x)  # in place, as the original's
        x = x + conv2d(relu(conv2d(x, w[f"{block}.1.weight"], padding=1)), w[f"{block}.3.weight"])
    x = conv_transpose2d(relu(x), w["_conv_trans_1.weight"], w["_conv_trans_1.bias"], 2, 1)
    x = conv_transpose2d(relu(x), w["_conv_trans_2.weight"], w["_conv_trans_2.bias"], 2, 1)
    assert (made(codes) - x).abs().max() < 1e-5
    pixels = made.decode(codes)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 64, 64)
    wanted = ((x + 1) / 2 * 255).clamp(0, 255)
    assert (pixels - wanted).abs().max() <= 0.51
    assert made.decode(codes, size=32).shape == (2, 3, 32, 32)
    decoder.shrink(tmp_path / "vq.pth", tmp_path / "half.pth")
    assert not any("_encoder" in name or "_ema" in name for name in torch.load(tmp_path / "half.pth"))
    assert (tmp_path / "half.pth").stat().st_size < (tmp_path / "vq.pth").stat().st_size
    assert torch.equal(decoder.load_decoder(tmp_path / "half.pth", device=CPU).decode(codes), pixels)


@pytest.mark.parametrize("spoil", ["pickle", "shape", "missing", "bytes"])
def test_a_file_that_is_no_decoder_is_named(tmp_path, spoil):
    import decoder

    path, state = tmp_path / "vq.pth", natural.vqvae()
    if spoil == "missing":
        del state["_decoder._conv_1.bias"]
    if spoil == "shape":
        state["_decoder._conv_1.bias"] = torch.zeros(3)
    torch.save(print if spoil == "pickle" else state, path)
    if spoil == "bytes":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="vq.pth is not the weights of swasun's VQ-VAE"):
        decoder.load_decoder(path, device=CPU)


@pytest.fixture(scope="module")
def squeezed():
    rng = np.random.default_rng(3)
    layers = [natural.sparse(shape, rng) for shape in natural.SHAPES]
    return layers, natural.compressed(layers)


def test_a_compressed_network_has_the_weights_that_were_compressed(squeezed):
    import squeezenet

    layers, data = squeezed
    found = list(squeezenet.layers(data))
    assert len(found) == len(layers) == 26
    for (weight, bias), (wanted, offset) in zip(found, layers, strict=True):
        assert np.array_equal(weight.numpy(), wanted) and np.array_equal(bias.numpy(), offset)


def test_the_network_is_torchvision_s_on_the_same_weights(squeezed):
    """Which takes red first, and ends without the padding that the original has."""
    import squeezenet
    from torchvision.models import squeezenet1_0

    parameters = list(squeezenet.layers(squeezed[1]))
    other = squeezenet1_0().eval()
    with torch.inference_mode():
        convolutions = [part for part in other.modules() if isinstance(part, nn.Conv2d)]
        for part, (weight, bias) in zip(convolutions, parameters, strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        pixels = torch.randint(0, 256, (2, 3, 227, 227), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        features, logits = squeezenet.SqueezeNet(parameters)(pixels)
        seen = other.features(pixels.float().flip(1) - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1))
        assert features.std() > 1e-3  # the random weights let something through
        assert torch.allclose(features, seen.mean((2, 3)), rtol=1e-4, atol=1e-4 * features.abs().max().item())
        conv = convolutions[-1]
        wanted = relu(conv2d(seen, conv.weight, conv.bias, padding=1)).mean((2, 3))
        assert torch.allclose(logits, wanted, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
        small = torch.randint(0, 256, (2, 3, 64, 64)).to(torch.uint8)
        assert squeezenet.SqueezeNet(parameters)(small)[0].shape == (2, 512)


@pytest.mark.parametrize("data", [b"", b"text", "short", "long", "beyond"])
def test_a_file_that_is_no_squeezenet_is_named(tmp_path, squeezed, data):
    import squeezenet

    whole = squeezed[1]
    if data == "beyond":  # distances of 15 everywhere lead beyond the first layer's end
        count, at = int.from_bytes(whole[:4], "little"), 4 * 26 + 4 * 256 + 4 * 96
        data = whole[: at + count] + b"\xff" * ((count + 1) // 2) + whole[at + count + (count + 1) // 2 :]
    data = {"short": whole[:-1], "long": whole + b"0"}.get(data, data) if isinstance(data, str) else data
    path = tmp_path / "squeezenet.net"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="squeezenet.net is not Deep Compression's SqueezeNet"):
        squeezenet.load_extractor(path, device=CPU)


def test_inputs_are_found_in_folders_of_the_folder_and_become_shards(tmp_path):
    import inputs

    from zipar_train.data.loader import ShardLoader

    (tmp_path / "codes").mkdir()
    natural.write_inputs(tmp_path / "codes")
    path = inputs.find(tmp_path, inputs.CODES)
    assert path == tmp_path / "codes" / inputs.CODES
    inputs.write(path, tmp_path / "out")
    codes, labels = inputs.arrays(path, "train")
    (batch,) = ShardLoader(tmp_path / "out" / "train.json", batch_size=100)
    order = [int(key.rpartition("/")[2]) for key in batch.keys]
    assert sorted(order) == list(range(60)) != order
    assert np.array_equal(batch.codes.numpy(), codes[order]) and np.array_equal(batch.condition.numpy(), labels[order])
    (few,) = ShardLoader(inputs_of(tmp_path, path, most=7), batch_size=100)
    assert torch.equal(few.codes, batch.codes[:7])
    with pytest.raises(ValueError, match=r"no vqvae_f4_512.pth in it"):
        inputs.find(tmp_path / "out", inputs.DECODER)
    np.savez(tmp_path / "other.npz", train_codes=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"other.npz is damaged or lacks val_codes"):
        inputs.write(tmp_path / "other.npz", tmp_path / "none")


def inputs_of(folder, path, *, most):
    import inputs

    inputs.write(path, folder / "few", most=most)
    return folder / "few" / "train.json"
