"""Checks of Weights & Biases: installed, logged in, server reachable; as far as runs need it."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from zipar_train.doctor.checks import Check, CheckContext, CheckResult, note, ok, problem, words

SECONDS = 3  # time limit for the server's answer
ONLINE, OFFLINE, DISABLED = "online", "offline", "disabled"
GO_WITHOUT = "--set log.wandb=offline or disabled"


def mode_from_environment() -> str | None:
    """Return WANDB_MODE as wandb interprets it, or None if it is not set."""
    said = os.environ.get("WANDB_MODE")
    return {"dryrun": OFFLINE, "run": ONLINE, "shared": ONLINE}.get(said, said) if said is not None else None


def mode(asked: CheckContext) -> str | None:
    """Return the W&B mode of the recipe's runs; without a recipe that of WANDB_MODE, or None."""
    recipe = asked.recipe
    if recipe is None or recipe.log.wandb == ONLINE:
        given = mode_from_environment()
        return given if given is not None else (ONLINE if recipe else None)
    return recipe.log.wandb


def modes(asked: CheckContext) -> Iterator[CheckResult]:
    found = mode(asked)
    if found is None:
        yield ok("mode", "as recipes say, the shipped ones offline")
    elif found not in (ONLINE, OFFLINE, DISABLED):
        yield problem("mode", f"WANDB_MODE = {found!r}, which wandb refuses", "unset WANDB_MODE, or set it to offline")
    elif asked.recipe and asked.recipe.log.wandb == found:
        yield ok("mode", f"{found}, by log.wandb")
    else:
        yield ok("mode", f"{found}, by WANDB_MODE")


def installed(asked: CheckContext) -> Iterator[CheckResult]:
    try:
        yield ok("wandb", version("wandb"))
    except PackageNotFoundError:
        if mode(asked) == DISABLED:
            yield ok("wandb", "not installed, nor needed")
        else:
            yield problem("wandb", "not installed", "pip install wandb, or --set log.wandb=disabled")


def login(asked: CheckContext) -> Iterator[CheckResult]:
    """Check that wandb finds an API key; the key is not stored or shown."""
    if mode(asked) not in (None, ONLINE, OFFLINE):
        return
    needed = mode(asked) == ONLINE
    try:
        found = logged_in()
    except Exception as error:  # a malformed key
        yield (problem if needed else note)("login", words(error), f"wandb login --relogin, or {GO_WITHOUT}")
        return
    if found:
        yield ok("login", "wandb finds a key")
    elif mode(asked) == OFFLINE:
        yield ok("login", "none; only `wandb sync` will need it")
    else:
        remedy = f"wandb login, or {GO_WITHOUT}"
        yield (problem if needed else note)("login", "none: wandb finds no key", remedy)


def logged_in() -> bool:
    """Return True if wandb finds an API key in online mode; without a terminal it does not prompt.

    Raises:
        wandb.errors.AuthenticationError: If the key is malformed.
    """
    import wandb

    wandb.setup(wandb.Settings(mode="online", silent=True))
    try:
        return bool(wandb.login(verify=False))
    except wandb.errors.UsageError:
        return False


def server(asked: CheckContext) -> Iterator[CheckResult]:
    if mode(asked) not in (None, ONLINE):
        return
    try:
        import wandb

        address = wandb.setup().settings.base_url
    except Exception:  # reported by the rows above
        address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    why = unreached(str(address))
    if why:
        remedy = f"Check network, proxy and WANDB_BASE_URL, or {GO_WITHOUT}; `wandb sync` uploads later"
        yield (problem if mode(asked) == ONLINE else note)("server", f"{address} is not reached: {why}", remedy)
    else:
        yield ok("server", f"{address} answers")


def unreached(address: str) -> str:
    """Return why the server does not answer within SECONDS, or an empty string if it does."""
    why = [f"no answer in {SECONDS} s"]  # DNS lookups ignore timeouts, so a thread enforces one

    def ask() -> None:
        try:
            urllib.request.urlopen(f"{address.rstrip('/')}/healthz", timeout=SECONDS).close()
            why[0] = ""
        except urllib.error.HTTPError:  # an HTTP error is an answer too
            why[0] = ""
        except Exception as error:
            why[0] = str(getattr(error, "reason", error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return why[0]


CHECKS = (
    Check("mode", modes, "unset WANDB_MODE"),
    Check("wandb", installed, "pip install wandb, or --set log.wandb=disabled"),
    Check("login", login, f"wandb login, or {GO_WITHOUT}"),
    Check("server", server, GO_WITHOUT),
)
