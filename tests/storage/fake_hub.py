"""A Hugging Face hub in memory behind a real HTTP server, as far as huggingface_hub asks one about models.

    with served() as hub:          # HF_ENDPOINT = hub.url
        hub.put("user/name", {"README.md": b"…"}, private=True)

Accounts: token "hf_user" is user's, with the right to write in "user/"; "hf_other" is other's; "hf_reader" is user's,
without the right to write.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_user": "user", "hf_other": "other", "hf_reader": "user"}
WRITERS = {"hf_user", "hf_other"}
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by hash, and the names of some: branches and pull requests."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, revision: str, files: Files, message: tuple[str, str] = ("", "")) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{len(self.messages)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[revision] = sha
        return sha

    def sha_of(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        sha = self.sha_of(revision)
        assert sha is not None
        return self.commits[sha]


class FakeHub:
    """The repositories, what was asked ("METHOD path"), and `fails`: a status that answers everything."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.agents: set[str] = set()
        self.fails: int | None = None
        self.url = ""

    def put(
        self, name: str, files: Files, *, revision: str = "main", private: bool = False, gated: bool = False
    ) -> str:
        """Commit files to a repository, made if there is none; returns the commit's hash."""
        repository = self.repositories.setdefault(name, Repository(private, gated))
        before = repository.files(revision) if revision in repository.refs else {}
        return repository.commit(revision, {**before, **files})

    def __getitem__(self, name: str) -> Repository:
        return self.repositories[name]


class Answer(Exception):
    """An answer of the hub: status, JSON or bytes, headers."""

    def __init__(self, status: int, body: object = None, **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def problem(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    coded = {} if code is None else {"X_Error_Code": code}
    return Answer(status, {"error": message}, X_Error_Message=message, **coded, **headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def serve(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.asked.append(f"{self.command} {unquote(url.path)}")
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        try:
            if self.hub.fails is not None:
                raise problem(self.hub.fails, "as told")
            self.dispatch(url.path)
            raise problem(404, f"the fake hub does not know {self.command} {url.path}")
        except Answer as answer:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    def dispatch(self, path: str) -> None:
        method = self.command.replace("HEAD", "GET")
        for wanted, pattern, answer in ROUTES:
            if method == wanted and (found := re.fullmatch(pattern, path)):
                answer(self, *map(unquote, found.groups()))

    # who asks, and for what

    def token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token is not None and token not in TOKENS:
            raise problem(401, "Invalid credentials in Authorization header")
        return token

    def may_write(self, name: str) -> bool:
        token = self.token()
        return token in WRITERS and TOKENS[token] == name.partition("/")[0]

    def repository(self, name: str, *, contents: bool = False) -> Repository:
        token = self.token()
        owner = token is not None and TOKENS[token] == name.partition("/")[0]
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not owner):
            raise problem(404 if token else 401, "Repository not found", "RepoNotFound")
        if contents and found.gated and not owner:
            raise problem(403 if token else 401, f"Access to model {name} is restricted.", "GatedRepo")
        return found

    def at(self, name: str, revision: str, *, contents: bool = False) -> tuple[str, Files]:
        repository = self.repository(name, contents=contents)
        sha = repository.sha_of(revision)
        if sha is None:
            raise problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # reading

    def resolve(self, name: str, revision: str, file: str) -> None:
        sha, files = self.at(name, revision, contents=True)
        if file not in files:
            raise problem(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        data = files[file]
        etag = hashlib.sha256(data).hexdigest()
        raise Answer(200, data, X_Repo_Commit=sha, ETag=f'"{etag}"', Content_Length=str(len(data)))

    def info(self, name: str, revision: str = "main") -> None:
        sha, files = self.at(name, revision)
        siblings = [{"rfilename": file} for file in files]
        raise Answer(200, {"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        _, files = self.at(name, revision)
        listed = [{"type": "file", "path": f, "size": len(data), "oid": "0" * 40} for f, data in files.items()]
        raise Answer(200, json.dumps(listed).encode(), Content_Type="application/json")

    def refs(self, name: str) -> None:
        refs = self.repository(name).refs
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in refs.items()]
        raise Answer(200, {"branches": branches, "converts": [], "tags": []})

    def whoami(self) -> None:
        token = self.token()
        if token is None:
            raise problem(401, "Invalid credentials in Authorization header")
        raise Answer(200, {"name": TOKENS[token], "type": "user"})

    # writing

    def create(self) -> None:
        asked = json.loads(self.content)
        token = self.token()
        if token is None:
            raise problem(401, "Invalid username or password.")
        name = f"{asked.get('organization') or TOKENS[token]}/{asked['name']}"
        if not self.may_write(name):
            raise problem(403, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = made = Repository(private=asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, ("initial commit", ""))
        raise Answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        """What the hub asks of a model card's metadata."""
        text = json.loads(self.content)["content"]
        found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else None
        if not isinstance(data, dict):
            raise Answer(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        bases = data.get("base_model", [])
        wrong = [b for b in [bases] * isinstance(bases, str) + list(bases) * isinstance(bases, list)
                 if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", b)]  # fmt: skip
        errors = [{"message": f'"base_model" with value "{base}" is not valid.'} for base in wrong]
        errors += [{"message": '"tags" must be an array'}] * (not isinstance(data.get("tags", []), list))
        raise Answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def writable(self, name: str) -> Repository:
        repository = self.repository(name)
        if not self.may_write(name) and "create_pr" not in self.query:
            raise problem(403, "Forbidden: you must use a write token to upload to a repository.")
        return repository

    def branch(self, name: str, branch: str) -> None:
        repository = self.writable(name)
        if branch in repository.refs:
            raise problem(409, "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        raise Answer(200)

    def preupload(self, name: str, revision: str) -> None:
        self.writable(name)
        self.at(name, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.content)["files"]
        ]
        raise Answer(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}
            for asked in json.loads(self.content)["objects"]
        ]
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.content).hexdigest() == oid
        self.hub.objects[oid] = self.content
        raise Answer(200)

    def commit(self, name: str, revision: str) -> None:
        repository = self.writable(name)
        _, files = self.at(name, revision)
        lines = [json.loads(line) for line in self.content.splitlines()]
        header, files = lines[0]["value"], dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.hub.objects[value["oid"]]
        request = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        asked = "create_pr" in self.query
        target = f"refs/pr/{request}" if asked else revision
        sha = repository.commit(target, files, (header["summary"], header["description"]))
        url = f"{self.hub.url}/{name}"
        link = {"pullRequestUrl": f"{url}/discussions/{request}"} if asked else {}
        raise Answer(200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, **link})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("GET", rf"/api/models/{NAME}/refs", Handler.refs),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/objects/([0-9a-f]+)", Handler.upload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
)


@contextmanager
def served() -> Iterator[FakeHub]:
    """A hub that listens on a port of this machine until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
