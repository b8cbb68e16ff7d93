"""A W&B server of a page: as much of its protocol as wandb-core needs to be content, and what it was told."""

import gzip
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 3  # an API key; no run folder may hold it


class WandbServer:
    """Listens on 127.0.0.1 in a thread of its own.

    runs: by their ids, each what was last said of its name, group, tags, config; and `history`, `starts`, `exit_code`.
    files: uploaded, by (run, name).
    artifacts: names of those that were begun, by id; `committed` are the ids of those that are complete.
    """

    def __init__(self):
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.artifacts: dict[str, str] = {}
        self.committed: list[str] = []
        self.asked: list[str] = []
        self.hanging, self.dead = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                """Silence."""

            def do_GET(self):
                self.answer({})

            def do_PUT(self):
                body = self.body()
                _, _, run, name = self.path.split("/", 3)
                outer.files[run, name] = body
                self.answer({})

            def do_POST(self):
                body = self.body()
                if self.path == "/graphql":
                    self.answer({"data": outer.graphql(**json.loads(body))})
                elif self.path.endswith("/file_stream"):
                    outer.stream(self.path.split("/")[4], json.loads(body))
                    self.answer({})
                else:
                    self.answer({})

            def body(self) -> bytes:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

            def answer(self, content):
                while outer.hanging.is_set() and not outer.dead.is_set():
                    time.sleep(0.05)
                if outer.dead.is_set():
                    self.close_connection = True
                    return
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                """Clients that are gone."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def kill(self) -> None:
        """From now on connections are refused, and those that are open are closed."""
        self.dead.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def graphql(self, query: str, variables: dict[str, Any] | None = None, **rest) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name, given = found[1] if found else "", variables or {}
        self.asked.append(name)
        return getattr(self, f"answer_{name}", lambda **_: {})(**given)

    def answer_Viewer(self) -> dict[str, Any]:  # noqa: N802
        return {
            "viewer": {"id": "1", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        }

    def answer_RunResumeStatus(self, name: str, **_) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(name)
        if run is None:
            return {"model": None}
        history = run["history"]
        bucket = {
            "id": "QnVja2V0OjE=",
            "name": name,
            "displayName": run["displayName"],
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(history[max(history)])] if history else []),
            "eventsTail": "[]",
            "config": run["config"],
            "tags": run["tags"],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "TW9kZWw6MQ==", "name": "p", "entity": {"id": "1", "name": "me"}, "bucket": bucket}}

    def answer_UpsertBucket(self, name: str, **given) -> dict[str, Any]:  # noqa: N802
        inserted = name not in self.runs
        run = self.runs.setdefault(name, {"history": {}, "starts": 0, "exit_code": None})
        run["starts"] += given.get("host") is not None
        run.update({key: value for key, value in given.items() if value is not None})
        for key in ("displayName", "config", "tags"):
            run.setdefault(key, None)
        bucket = {
            "id": "QnVja2V0OjE=",
            "name": name,
            "displayName": run["displayName"],
            "description": "",
            "config": run["config"],
            "sweepName": run.get("sweep"),
            "historyLineCount": len(run["history"]),
            "project": {"id": "1", "name": run["project"], "entity": {"id": "1", "name": "me"}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def answer_CreateRunFiles(self, run: str, files: list[str], **_) -> dict[str, Any]:  # noqa: N802
        links = [{"name": name, "uploadUrl": f"{self.url}/put/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": links}}

    def answer_ArtifactType(self, **_) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}  # a name that is free

    def answer_CreateArtifact(self, input: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        number = f"a{len(self.artifacts)}"
        self.artifacts[number] = input["artifactCollectionName"]
        return {
            "createArtifact": {
                "artifact": {"id": number, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            }
        }

    def answer_CreateArtifactManifest(self, artifactID: str, name: str, **_) -> dict[str, Any]:  # noqa: N802, N803
        file = {"id": f"m{artifactID}", "uploadUrl": f"{self.url}/put/{artifactID}/{name}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"m{artifactID}", "file": file}}}

    def answer_CreateArtifactFiles(self, input: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        nodes = [
            {
                "storagePath": each["name"],
                "uploadUrl": f"{self.url}/put/{each['artifactID']}/{each['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": each["artifactID"]},
            }
            for each in input["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def answer_CommitArtifact(self, artifactID: str) -> dict[str, Any]:  # noqa: N802, N803
        self.committed.append(artifactID)
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": ""}}}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        if part:
            for k, line in enumerate(part["content"]):
                self.runs[run]["history"][part["offset"] + k] = json.loads(line)
        if body.get("complete"):
            self.runs[run]["exit_code"] = body["exitcode"]

    def history(self, run: str, name: str) -> dict[int, float]:
        """step of the log: the number."""
        rows = [row for _, row in sorted(self.runs[run]["history"].items()) if name in row]
        return {row["trainer/global_step"]: row[name] for row in rows}

    def config(self, run: str) -> dict[str, Any]:
        return {key: each["value"] for key, each in json.loads(self.runs[run]["config"]).items()}
