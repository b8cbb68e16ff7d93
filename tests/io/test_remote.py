"""Files behind URLs: what a server answers is told, transient errors pass, and credentials are written nowhere."""

import base64
import http.server
import multiprocessing
import sys
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.io import remote
from zipar_train.io.expansion import expand
from zipar_train.io.remote import conceal, read
from zipar_train.recipe.load import load_recipe

SHORT = [
    "log.wandb=offline",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=1",
    "trainer.check_val_every_n_epoch=1",
]
USER, PASSWORD, SIGNATURE = "me", "hunter2", "c2lnbmVk"


class Handler(http.server.BaseHTTPRequestHandler):
    """`/STATUS/...` answers with a status, `/flaky/...` with 503 first, `/silent/...` with nothing; else with files."""

    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802 the library's name
        place, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        mode, _, name = place.strip("/").partition("/")
        asked = self.server.asked[place] = self.server.asked.get(place, 0) + 1
        status, data = 200, self.server.files.get(name, b"what is there")
        if mode == "silent":
            time.sleep(5)
            return
        if mode.isdigit():
            status = int(mode)
        if mode == "flaky" and asked == 1:
            status = 503
        if mode == "private" and self.headers.get("Authorization") != self.server.authorization:
            status = 401
        if mode == "signed" and query.get("sig") != [SIGNATURE]:
            status = 403
        if name in self.server.missing:
            status = 404
        cut = data[: len(data) // 2] if mode == "cut" and asked == 1 else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(cut)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.03))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads, made.asked, made.files, made.missing = True, {}, {}, set()
        made.authorization = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        made.url = f"http://127.0.0.1:{made.server_port}"
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


@pytest.mark.parametrize(
    ("status", "words", "tries"),
    [
        (401, r"the server answers 401 \(Unauthorized\). It asks for credentials", 1),
        (403, r"the server answers 403 \(Forbidden\)", 1),
        (410, r"the server answers 410 \(Gone\)", 1),
        (418, r"the server answers 418", 1),
        (429, r"the server answers 429 \(Too Many Requests\)", 4),
        (500, r"the server answers 500 \(Internal Server Error\)", 4),
        (599, r"the server answers 599 \(unknown\)", 1),
    ],
)
def test_a_status_is_told_and_a_transient_one_tried_again(server, capsys, status, words, tries):
    url = f"{server.url}/{status}/train.json"
    with pytest.raises(OSError, match=words) as error:
        read(url)
    assert not isinstance(error.value, FileNotFoundError) and server.asked == {f"/{status}/train.json": tries}
    assert capsys.readouterr().err.count("Trying again in") == tries - 1
    with pytest.raises(ValueError, match=rf"{status}/train\.json cannot be read: {words}"):
        read_manifest(url)


def test_only_a_missing_file_is_one_to_be_made(server):
    server.missing.add("train.json")
    with pytest.raises(ValueError, match="no shards at .*train.json: make them with `zipar-train tokenize`"):
        read_manifest(f"{server.url}/x/train.json")
    assert server.asked == {"/x/train.json": 1}


@pytest.mark.parametrize("mode", ["flaky", "cut"])
def test_an_error_that_passes_is_told_and_forgotten(server, capsys, mode):
    assert read(f"{server.url}/{mode}/a.txt") == b"what is there"
    assert f"{server.url}/{mode}/a.txt: " in (told := capsys.readouterr().err) and "Trying again in 0.01 s" in told


@pytest.mark.slow
def test_a_server_that_hangs_or_is_not_there_is_told(server, monkeypatch, capsys):
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    with pytest.raises(OSError, match="the server has been silent for 0.2 s"):
        read(f"{server.url}/silent/a.txt")
    assert capsys.readouterr().err.count("Trying again") == 3
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="Cannot connect to host"):
        read(f"{server.url}/x/a.txt")
    assert capsys.readouterr().err.count("Trying again") == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a/train.json", "https://host/a/train.json"),
        ("https://ghp_abc@host:8080/a?x=1", "https://host:8080/a?x=1"),
        ("https://me:p%40w@host", "https://host"),
        ("https://me:p@w#?x@host/a", "https://host/a"),
        ("ftp://me:pw@host/a", "ftp://host/a"),
        ("simplecache::https://me:pw@host/a.json", "simplecache::https://host/a.json"),
        ("zip://a.json::https://me:pw@host/x.zip", "zip://a.json::https://host/x.zip"),
        ("https://host/a?sv=2&sig=abc&x=1", "https://host/a?sv=2&x=1"),
        ("https://host/a?X-Amz-Signature=abc&X-Amz-Credential=d", "https://host/a"),
        ("https://host/a?access_token=abc", "https://host/a"),
        ("https://host/a?file=b@c/d", "https://host/a?file=b@c/d"),
        (
            "--set=data.train=https://me:pw@host/a and 'http://u:v@w/x'",
            "--set=data.train=https://host/a and 'http://w/x'",
        ),
        ("s3://bucket/a@b.json", "s3://bucket/a@b.json"),
        ("a@b/c:d", "a@b/c:d"),
    ],
)
def test_credentials_leave_the_text(text, shown):
    assert conceal(text) == shown == expand(text)
    assert conceal(shown) == shown


def test_credentials_reach_the_server_alone(server, capsys):
    base = server.url.replace("//", f"//{USER}:{PASSWORD}@")
    private, signed = f"{base}/private/a.json", f"{server.url}/signed/a.json?sv=1&sig={SIGNATURE}"
    assert read(private) == read(conceal(private)) == b"what is there"
    assert read(conceal(signed)) == read(signed) == b"what is there"
    for given, shown in ((private, f"{server.url}/private/"), (signed, f"{server.url}/signed/")):
        assert read(remote.beside(conceal(given), "b.tar")) == b"what is there"
        assert remote.beside(conceal(given), "b.tar").startswith(f"{shown}b.tar")
    for mode in ("500", "410"):
        with pytest.raises(OSError, match=mode) as error:
            read(f"{base}/{mode}/a.json?token={SIGNATURE}")
        told = f"{error.value} {error.value.__cause__} {capsys.readouterr()}"
        assert PASSWORD not in told and SIGNATURE not in told


def test_other_processes_have_the_credentials_too(server):
    url = conceal(server.url.replace("//", f"//{USER}:{PASSWORD}@") + "/private/a.json")
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(read, (url,)) == b"what is there"


@pytest.fixture
def private(server, shards):
    """The digits' shards behind a password, from a server that fails now and then."""
    server.files = {file.name: file.read_bytes() for file in shards.iterdir() if file.is_file()}
    return server.url.replace("//", f"//{USER}:{PASSWORD}@") + "/private/train.json"


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_behind_a_password_are_read_and_named_without_it(server, private, workers):
    loader = ShardLoader(private, batch_size=100, workers=workers)
    assert sum(len(batch.codes) for batch in loader) == loader.manifest.samples
    assert PASSWORD not in str(loader.path)
    server.missing.add(loader.manifest.shards[0].name)
    with pytest.raises(ValueError, match="train-000000.tar cannot be read") as error:
        next(read_shard(private, loader.manifest.shards[0], loader.manifest))
    assert PASSWORD not in str(error.value)


@pytest.mark.slow
def test_a_password_is_written_nowhere(tiny, tmp_path, run, private):
    """A run of the command line, its logs, W&B's files, exports and errors."""
    sets = [f"--set={o}" for o in (*tiny, *SHORT, f"data.train={private}")]
    (tmp_path / "grid.yaml").write_text("method: grid\nparameters: {optim.lr: {values: [1e-4]}}\n")
    said = [
        run("fit", "--recipe", "digits-base", *sets),
        run("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "exported"),
        run("sweep", "--recipe", "digits-base", *sets, "--file", tmp_path / "grid.yaml", "--out", tmp_path / "sweep"),
        run("shards", "check", private),
    ]
    assert [status for status, *_ in said] == 4 * [0], said
    assert PASSWORD not in f"{said} {sys.argv}"
    said = [
        run("shards", "check", private.replace("train", "nothing").replace("private", "410")),
        run("fit", "--recipe", "digits-base", *sets),  # the folder holds a run
        run("fit", "--recipe", "digits-base", f"--set=data.nothing={private}"),
        run("tokenize", "--recipe", "digits-base", "--images", private, "--out", tmp_path / "shards"),
    ]
    assert [status for status, *_ in said][1:] == 3 * [2] and said[0][0]
    assert PASSWORD not in f"{said} {sys.argv}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files) and (tmp_path / "sweep" / "sweep.json") in files
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    status, _, err = run(
        "fit",
        "--recipe",
        "digits-base",
        *sets,
        "--set=trainer.max_epochs=2",
        "--resume",
        "--allow-change=trainer.max_epochs",
    )
    assert status == 0, err


def test_a_recipe_holds_no_credentials(tmp_path, tiny):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodel: 'https://me:pw@host/train.json'\n")
    with pytest.raises(ValueError, match="model = 'https://host/train.json'"):
        load_recipe(str(path))
    recipe = load_recipe("digits-base", [*tiny, "data.train=https://me:pw@host/train.json"])
    assert recipe.data.train == "https://host/train.json"
