"""Reading of files behind URLs: retries after transient errors, clear errors otherwise, concealed credentials.

A password in a URL (`https://me:password@host/train.json`) or a signature in its query would appear wherever the URL
is written: in run folders, checkpoints, logs and on W&B. Therefore credentials are removed from a URL where it enters
the program, and `read` adds them again. In between they are stored in an environment variable, which the processes of
loaders, of other devices and of sweeps inherit.
"""

import http
import json
import os
import re
import sys
import time
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

KEPT = "ZIPAR_CREDENTIALS"  # an environment variable: {URL or folder without credentials: [user and password, query]}
SILENCE = 20.0  # timeout in seconds: to connect, and between two reads
PAUSES = (1.0, 3.0, 9.0)  # seconds before each retry
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that are retried
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:(?!::)[^\s'\"<>|])+")  # `::` chains the URLs of fsspec
_SECRET = re.compile(r"sig|token|secret|passw|credential|auth|api.?key|access.?key", re.IGNORECASE)


def is_url(path: Any) -> bool:
    return "://" in str(path)


def beside(url: str, name: str) -> str:
    """Return the URL of the file `name` in the folder of `url`; the query stays at the end."""
    path, mark, query = url.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{mark}{query}"


def conceal(text: str) -> str:
    """Remove the credentials from the URLs in a text, and store them for `read`.

    Credentials are the user and password before the host, and query values whose names suggest a secret.
    """
    return _URL.sub(lambda found: _conceal(found[0]), text)


def read(url: str) -> bytes:
    """Return the bytes behind a URL of any protocol that fsspec supports.

    Raises:
        FileNotFoundError: If the server reports that the file does not exist.
        OSError: If reading fails; names the HTTP status or another reason. Transient errors are retried first.
    """
    import fsspec

    shown = conceal(url)
    full = _URL.sub(lambda found: _reveal(found[0]), shown)
    limits = _limits(full)
    for pause in (*PAUSES, None):
        try:
            files, path = fsspec.core.url_to_fs(full, **limits)
            if limits:
                return files.cat_file(path)  # `open` would report every status as 404
            with files.open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise FileNotFoundError(f"{shown} is not there") from None
        except Exception as error:  # each protocol has its own exceptions
            reason, transient = _told(error)
            if pause is None or not transient:
                raise OSError(conceal(reason).replace(full, shown)) from None  # the chain holds the URL as it was
        print(f"{shown}: {conceal(reason)}. Trying again in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError


def _limits(url: str) -> dict[str, Any]:
    """Return the fsspec options for a URL: timeouts for HTTP, which has none by default."""
    if "::" in url or not url.lower().startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, connect=SILENCE, sock_read=SILENCE)}}


def _told(error: Exception) -> tuple[str, bool]:
    """Return a description of an error, and whether it is transient."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        meaning = http.HTTPStatus(status).phrase if status in set(http.HTTPStatus) else "unknown"
        advice = ". It asks for credentials, or for others" if status in (401, 403) else ""
        return f"the server answers {status} ({meaning}){advice}", status in TRANSIENT
    if isinstance(error, TimeoutError):
        return f"the server has been silent for {SILENCE:g} s", True
    words = f"{type(error).__name__}: {error}".strip(": ")
    gone = any(kind.__name__.startswith(("ClientConn", "ClientPayload", "ServerDisconn")) for kind in type(error).mro())
    return words, gone or isinstance(error, ConnectionError)


def _conceal(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host, slash, place = rest.partition("/")
    user, at, host = host.rpartition("@")  # a password may contain `#` or `?`, which end a host
    place, mark, query = place.partition("?")
    values = query.split("&")
    secret = [value for value in values if _SECRET.search(value.partition("=")[0])]
    if not at and not secret:
        return url
    others = "&".join(value for value in values if value not in secret)
    bare = f"{scheme}://{host}{slash}{place}{mark if others else ''}{others}"
    kept = json.loads(os.environ.get(KEPT, "{}"))
    kept[bare] = kept[_folder(bare)] = [user, "&".join(secret)]
    os.environ[KEPT] = json.dumps(kept)
    return bare


def _reveal(url: str) -> str:
    kept = json.loads(os.environ.get(KEPT, "{}"))
    user, secret = kept.get(url) or kept.get(_folder(url)) or ("", "")
    parts = urlsplit(url)
    netloc = f"{quote(user, safe=':%~')}@{parts.netloc}" if user else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, query="&".join(filter(None, (parts.query, secret)))))


def _folder(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[0] + "/"
