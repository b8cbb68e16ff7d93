"""The doctor on W&B: modes are those of fit, servers out of reach are told in time, and no secret shows."""

import http.server
import socket
import threading
import time

import pytest
from doctor_rows import KEY, UNREACHABLE, told

from zipar_train.doctor import tracking
from zipar_train.doctor.checks import CheckContext, hidden, problem
from zipar_train.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("recipe", "variable", "mode"),
    [
        (None, None, None),
        (None, "dryrun", "offline"),
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_modes_are_those_of_fit(recipe, variable, mode, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    asked = CheckContext(recipe=load_recipe("digits", [f"log.wandb={recipe}"]) if recipe else None)
    assert tracking.mode(asked) == mode
    assert [row.status for row in tracking.modes(asked)] == ["ok"]
    monkeypatch.setenv("WANDB_MODE", "")  # wandb itself refuses this
    assert [row.status for row in tracking.modes(asked)] == ["problem" if recipe in (None, "online") else "ok"]
    if mode == "disabled":
        assert not [*tracking.login(asked), *tracking.server(asked)]


@pytest.mark.slow
def test_a_server_that_is_not_there_or_never_answers_is_told_in_time():
    assert "refused" in tracking.unreached("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert tracking.unreached(f"http://127.0.0.1:{silent.getsockname()[1]}") == "no answer in 3 s"
        assert time.monotonic() - start < tracking.SECONDS + 1
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as answers:
        threading.Thread(target=answers.serve_forever, daemon=True).start()
        assert tracking.unreached(f"http://127.0.0.1:{answers.server_port}/") == ""  # not implemented: an answer
        answers.shutdown()


@pytest.mark.slow
def test_wandb_unreachable_and_no_secret_told(fresh_cli, tmp_path):
    settings = [
        "doctor",
        "--checks",
        "wandb",
        "--json",
        "doctor.json",
        "--recipe",
        "digits",
        "--set",
        "log.wandb=online",
    ]
    done = fresh_cli(*settings, env=UNREACHABLE)
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and rows["login"]["seen"] == "wandb finds a key"
    assert rows["server"]["status"] == "problem" and "127.0.0.1:9 is not reached" in rows["server"]["seen"]
    assert "--set log.wandb=offline" in rows["server"]["remedy"]
    everything = done.stdout + done.stderr + (tmp_path / "doctor.json").read_text()
    assert KEY not in everything and "hunter2" not in everything


@pytest.mark.slow
def test_a_malformed_key_is_told_without_it(fresh_cli, tmp_path):
    done = fresh_cli(
        "doctor", "--checks", "wandb", "--json", "doctor.json", env=UNREACHABLE | {"WANDB_API_KEY": "too-short"}
    )
    rows = told(tmp_path / "doctor.json")
    assert rows["login"]["status"] == "problem" and "API key must have" in rows["login"]["seen"]
    assert "too-short" not in done.stdout + done.stderr


def test_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")
    monkeypatch.setenv("SSH_KEY_PATH", "/home/me/keys")
    text = "abcdefgh1234 at https://me:pw@host/x.json?X-Sig=zz&e=1 in /home/me/keys, s3://bucket/a"
    assert hidden(text) == "*** at https://***@host/x.json?*** in /home/me/keys, s3://bucket/a"
    assert "abcdefgh1234" not in problem("a", "abcdefgh1234", "abcdefgh1234").model_dump_json()
