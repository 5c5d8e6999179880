"""Bundles from URLs: over real HTTP with cut connections, by the protocol of registries, through fsspec."""

import hashlib
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equipot.model.bundle import read_card, write_bundle
from equipot.model.config import ModelConfig
from equipot.model.errors import BundleError
from equipot.model.fetching import fetch
from equipot.model.potential import Potential
from equipot.model.references import References

WRONG = "0" * 64


class Site(http.server.ThreadingHTTPServer):
    """Serves what it is given; `cut` connections end half-way, `asks` for a token if told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.seen: list[tuple[str, str | None]] = []
        self.cut = 0
        self.token = ""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.seen.append((path, self.headers.get("Range")))
        authorization = self.headers.get("Authorization")
        if path == "/token":
            assert authorization == "Basic dXNlcjpwYXNz"
            self._answer(200, json.dumps({"token": self.server.token}).encode())
        elif self.server.token and authorization != f"Bearer {self.server.token}":
            realm = f'Bearer realm="http://{self.server.host}/token",service="here",scope="pull"'
            self._answer(401, b"", {"WWW-Authenticate": realm})
        elif path not in self.server.files:
            self._answer(404, b"")
        else:
            body = self.server.files[path]
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self._answer(206 if start else 200, body[start:])

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.cut and len(body) > 1000:
            self.server.cut -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        site.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fetch") / "small"
    config = ModelConfig.from_json(
        {
            **ModelConfig(elements=(1, 8), levels_of_theory=("PBE",)).to_json(),
            "width": 16,
            "layers": 1,
            "radial": 4,
        }
    )
    references = References.from_json({"energy": [[-1.0, -2.0]], "scale": [1.0]})
    potential = Potential(config, references)
    write_bundle(
        path,
        name="small",
        config=config,
        references=references,
        tensors=potential.state_dict().items(),
        provenance={},
        metrics={},
    )
    return path


@pytest.fixture(scope="module")
def archive(bundle: Path) -> bytes:
    return packed(bundle)


def packed(folder: Path, *, mode: Any = "w:gz", name: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        tar.add(folder, name or folder.name)
    return buffer.getvalue()


def digest(bundle: Path) -> str:
    return read_card(bundle).digest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def assert_whole(found: Path, bundle: Path) -> None:
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in bundle.iterdir())
    for path in bundle.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes()


def test_a_download_goes_on_where_it_broke_off(
    site: Site, archive: bytes, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipot.model.fetching.time.sleep", lambda seconds: None)
    site.files["/small.tar.gz"], site.cut = archive, 1
    found = fetch(
        f"http://{site.host}/small.tar.gz?v=1", out=tmp_path / "out", name="main", sha256=sha256(archive)
    )
    assert_whole(found, bundle)
    assert site.seen == [("/small.tar.gz", None), ("/small.tar.gz", f"bytes={len(archive) // 2}-")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".main.fetched", "main"]


def test_what_is_there_is_not_fetched_again_and_another_one_replaces_it(
    site: Site, archive: bytes, bundle: Path, tmp_path: Path
) -> None:
    url = f"http://{site.host}/small.tar.gz"
    site.files["/small.tar.gz"] = archive
    for _ in range(2):
        fetch(url, out=tmp_path, name="main", sha256=f"sha256:{sha256(archive)}")
    assert len(site.seen) == 1
    fetch(url, out=tmp_path, name="main", sha256=digest(bundle))
    assert len(site.seen) == 2
    assert_whole(tmp_path / "main", bundle)


@pytest.mark.parametrize("where", ["http", "folder", "file", "memory", "memory folder"])
def test_another_checksum_is_refused_and_nothing_stays(
    where: str, site: Site, archive: bytes, bundle: Path, tmp_path: Path
) -> None:
    url = made_url(where, site, archive, bundle, tmp_path)
    with pytest.raises(BundleError, match="is not what sha256"):
        fetch(url, out=tmp_path / "out", name="main", sha256=WRONG)
    assert list((tmp_path / "out").iterdir()) == []
    assert_whole(fetch(url, out=tmp_path / "out", name="main", sha256=digest(bundle)), bundle)


def made_url(where: str, site: Site, archive: bytes, bundle: Path, tmp_path: Path) -> str:
    import fsspec

    if where == "http":
        site.files["/small.tgz"] = archive
        return f"http://{site.host}/small.tgz"
    if where == "folder":
        return str(bundle)
    if where == "file":
        (tmp_path / "small.tar.gz").write_bytes(archive)
        return f"file://{tmp_path}/small.tar.gz"
    memory = fsspec.filesystem("memory")
    if where == "memory":
        memory.pipe("/models/small.tar.gz", archive)
        return "memory://models/small.tar.gz"
    memory.put(str(bundle), "/models/folder", recursive=True)
    return "memory://models/folder"


@pytest.mark.parametrize("layout", ["oras files", "image layer", "oras folder"])
def test_an_artifact_of_a_registry_that_asks_for_a_token(
    layout: str, site: Site, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = []
    if layout == "oras files":
        for path in sorted(bundle.iterdir()):
            layers.append(
                (path.read_bytes(), "application/octet-stream", {"org.opencontainers.image.title": path.name})
            )
    elif layout == "image layer":
        layers.append(
            (packed(bundle, name="models/small"), "application/vnd.oci.image.layer.v1.tar+gzip", {})
        )
    else:
        unpack = {"io.deis.oras.content.unpack": "true", "org.opencontainers.image.title": "small"}
        layers.append((packed(bundle), "application/octet-stream", unpack))
    manifest = {
        "layers": [
            {"digest": f"sha256:{sha256(data)}", "mediaType": kind, "annotations": annotations}
            for data, kind, annotations in layers
        ]
    }
    raw = json.dumps(manifest).encode()
    for data, _, _ in layers:
        site.files[f"/v2/lab/small/blobs/sha256:{sha256(data)}"] = data
    site.files[f"/v2/lab/small/manifests/sha256:{sha256(raw)}"] = raw
    index = {
        "manifests": [
            {"digest": f"sha256:{sha256(raw)}", "platform": {"os": "linux", "architecture": "amd64"}}
        ]
    }
    site.files["/v2/lab/small/manifests/v1"] = json.dumps(index).encode()
    site.token = "let-me-in"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {site.host: {"auth": "dXNlcjpwYXNz"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    found = fetch(f"oci://{site.host}/lab/small:v1", out=tmp_path / "out", name="main", sha256=digest(bundle))
    assert_whole(found, bundle)
    blob = next(path for path in site.files if "/blobs/" in path)
    site.files[blob] = site.files[blob][:-1] + bytes([site.files[blob][-1] ^ 1])
    with pytest.raises(BundleError, match="came damaged"):
        fetch(f"oci://{site.host}/lab/small:v1", out=tmp_path / "out2", name="main", sha256=digest(bundle))


def damaged(bundle: Path, folder: Path) -> bytes:
    shutil.copytree(bundle, folder / "damaged")
    (shard,) = (folder / "damaged").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return packed(folder / "damaged")


def escaping(bundle: Path, folder: Path) -> bytes:
    return packed(bundle, name="../../escaped")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (damaged, "sha256 differs from the card's"),
        (escaping, "cannot be unpacked"),
        (lambda bundle, folder: b"no archive at all", "cannot be unpacked"),
        (lambda bundle, folder: packed(folder), "no bundle|should hold one bundle"),
    ],
)
def test_a_bad_archive_is_refused(
    make: Callable[[Path, Path], bytes], says: str, site: Site, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    data = make(bundle, tmp_path / "made")
    site.files["/bad.tar.gz"] = data
    with pytest.raises(BundleError, match=says):
        fetch(f"http://{site.host}/bad.tar.gz", out=tmp_path / "out", name="main", sha256=sha256(data))
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://{host}/missing.tar", "404"),
        ("http://{host}/folder/", "is no archive by its name"),
        ("oci://{host}/lab/none:v1", "404"),
        ("oci://no-repository", "give oci://REGISTRY/REPOSITORY:TAG"),
        ("s3gpt://bucket/x.tar", "s3gpt"),
        ("/no/such/folder", "neither a folder nor an archive"),
    ],
)
def test_what_cannot_be_fetched_says_why(url: str, says: str, site: Site, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=says):
        fetch(url.format(host=site.host), out=tmp_path / "out", name="main", sha256=WRONG)


@pytest.mark.parametrize(("name", "checksum"), [("..", WRONG), ("main", "abc"), ("a/b", WRONG)])
def test_names_and_checksums_are_checked_first(name: str, checksum: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"name is|sha256 is"):
        fetch("http://127.0.0.1:1/x.tar", out=tmp_path, name=name, sha256=checksum)
