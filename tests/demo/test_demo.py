"""The demo page as a browser uses it: through the server's API, with the real command line."""

import base64
import io
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import torch
from commands import sets
from forked import Running
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from zipar_train import load

ASKED = {"prompt": "3, 5", "window": 2, "lookahead": 0, "guidance": 1.5, "seed": 7, "images": 4, "slow": 0}


@pytest.fixture
def served(tmp_path):
    """Start the demo and return its process and a client."""

    def start(*args) -> tuple[Running, Client]:
        demo = Running("demo", *args, "--port", "0", log=tmp_path / "demo.log")
        demo.until(lambda: "http://" in demo.said())
        address = re.search(r"http://\S+", demo.said())[0]
        return demo, Client(address, verbose=False, download_files=False)

    return start


def shown(content: str) -> tuple[np.ndarray, str]:
    """The picture and the words of a column."""
    source, words = re.fullmatch(r'<img src="data:image/webp;base64,(\S+)" .*?<p .*?>(.*)</p>', content).groups()
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))), words


@pytest.mark.slow(20)
def test_images_are_those_of_generate(served, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    log = run / "logs" / "version_1" / "metrics.csv"  # of a run that validates
    log.parent.mkdir(parents=True)
    log.write_text("step,val/bits_w8,val/bits_w2\n20,2.5,2.75\n40,2.0,2.0625\n")
    demo, client = served("--checkpoint", run)
    job = client.submit(**ASKED | {"lookahead": 12, "slow": 20}, compared=True, api_name="/generate")
    first, second = job.result(timeout=60)
    generator = load(trained)
    for content, how, words in (
        (first, {"window": 2, "lookahead": 12}, "window 2, lookahead 12: "),
        (second, {}, "next-token: 64 passes, "),
    ):
        images = generator.generate([3, 5, 3, 5], seed=7, guidance=1.5, **how)
        picture, found = shown(content)
        assert np.array_equal(picture, np.asarray(images.sheet(columns=2)))
        assert found.startswith(words) and f" {int(images.passes.max())} passes, " in found
    assert shown(first)[1].endswith(" ms. It costs +0.0625 bits per code, 2.0625 in all.")
    assert shown(second)[1].endswith(" ms. 2.0000 bits per code.")
    outputs = job.outputs()  # how they grew
    assert len(outputs) > 4 and "..." in outputs[0][0] and outputs[0][1] == ""

    alone, none = client.predict(**ASKED | {"window": 8}, compared=False, api_name="/generate")
    assert shown(alone)[1].startswith("next-token: 64 passes") and none == ""
    demo.kill(signal.SIGINT)
    assert demo.ended(20) == 128 + signal.SIGINT
    assert demo.said().endswith("zipar-train: stopped by SIGINT; run the same command again to go on\n"), demo.said()


@pytest.mark.slow(10)
def test_what_programs_send_is_checked(served, trained):
    demo, client = served("--checkpoint", trained)
    for wrong, message in (
        ({"window": 9}, "Window: 9 is out of range. Use 1 .. 8"),
        ({"window": 0}, "Window: 0 is out of range"),
        ({"window": "two"}, "Window: 'two' is not a whole number"),
        ({"prompt": ""}, "give a class number, 0 .. 9"),
        ({"prompt": "11"}, "'11' is not a class number"),
        ({"images": 100}, "Images: 100 is out of range. Use 1 .. 16"),
        ({"images": None}, "Images: None is not a whole number"),
        ({"seed": -1}, "Seed: -1 is out of range"),
        ({"guidance": "much"}, "guidance"),
        ({"lookahead": 10**9}, "Lookahead: 1,000,000,000 is out of range"),
    ):
        with pytest.raises(AppError, match=re.escape(message)):
            client.predict(**ASKED | wrong, compared=False, api_name="/generate")
    assert client.predict(**ASKED, compared=False, api_name="/generate")[0]
    assert "Traceback" not in demo.said(), demo.said()


@pytest.mark.slow(20)
def test_two_at_once_and_one_that_leaves(served, trained):
    demo, client = served("--checkpoint", trained)
    address = client.src
    other = Client(address, verbose=False, download_files=False)
    slow = client.submit(**ASKED | {"window": 8, "slow": 200}, compared=False, api_name="/generate")  # 12.8 s
    while not slow.outputs():
        time.sleep(0.05)
    waiting = other.submit(**ASKED | {"seed": 8}, compared=False, api_name="/generate")
    time.sleep(1)
    assert not waiting.done()  # one batch at a time
    slow.cancel()
    began = time.monotonic()
    picture, _ = shown(waiting.result(timeout=60)[0])
    assert time.monotonic() - began < 8
    images = load(trained).generate([3, 5, 3, 5], window=2, seed=8, guidance=1.5)
    assert np.array_equal(picture, np.asarray(images.sheet(columns=2)))
    assert "Traceback" not in demo.said(), demo.said()


@pytest.mark.slow(20)
def test_a_checkpoint_that_is_being_written(served, cli, trained, tmp_path):
    """Training replaces last.ckpt by whole files; what another program has written half of is refused."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last = run / "checkpoints" / "last.ckpt"
    (run / "checkpoints" / ".last.ckpt.12.tmp").write_bytes(last.read_bytes()[:1000])
    _, client = served("--checkpoint", run)
    last.write_bytes(last.read_bytes()[:1000])
    assert client.predict(**ASKED, compared=False, api_name="/generate")[0]  # of the file that was whole
    done = cli("demo", "--checkpoint", run, "--port", "0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "last.ckpt is not a readable file of weights" in done.stderr, done.stderr


def test_what_cannot_be_shown(cli, run, trained, tmp_path):
    for arguments, message in (
        (["--checkpoint", tmp_path / "none"], f"nothing to load at {tmp_path}/none"),
        (["--recipe", "digits-base"], "starts from random weights"),
        ([], "give either --checkpoint or --recipe"),
        (["--checkpoint", trained, "--host", "192.0.2.1"], "--host 192.0.2.1 is not an address of this machine"),
        (["--checkpoint", trained, "--host", "no.such.host.invalid"], "is not an address of this machine"),
    ):
        status, _, err = run("demo", *arguments)
        assert status == 2 and message in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("demo", "--checkpoint", trained, "--port", port)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(f"zipar-train: --port {port} is in use: choose another, or 0 for any that is free\n")


@pytest.mark.slow(20)
def test_captions(served, vq, t5, tmp_path):
    import original

    weights = tmp_path / "t2i.pt"
    state = original.random_gpt(depth=2, width=24, codes=24, grid=4, features=6, prompt=5, dtype=torch.float32)
    torch.save({"model": state}, weights)
    small = ["model.size=null", "model.num_layers=2", "model.num_heads=2", "model.hidden_size=24", "model.ffn_size=48"]
    small += ["model.codebook_size=24", "model.grid=[4,4]", "zipar.windows={2: 1}", "evaluate.windows=[2]"]
    small += [f"model.weights={weights}", f"model.tokenizer_weights={vq}"]
    small += [f"model.t5_features={{encoder: {t5}, tokens: 5, features: 6}}"]
    recipe = sets(small)
    _, client = served("--recipe", "llamagen-xl-t2i", *recipe)
    asked = ASKED | {"prompt": "a blue car", "window": 1, "images": 2}
    first, second = client.predict(**asked, compared=True, api_name="/generate")
    assert shown(first)[0].shape == shown(second)[0].shape and shown(second)[1].startswith("next-token: 16 passes")
    with pytest.raises(AppError, match="the caption is empty: describe the image"):
        client.predict(**asked | {"prompt": " "}, compared=True, api_name="/generate")
