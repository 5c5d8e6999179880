"""A stand-in for Kubernetes' API server: as much of it as Helm's `lookup` and dry runs ask.

A real one cannot be had from package registries. It answers version, discovery and GET, and 404 for what is
not there; it admits and writes nothing.
"""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

KINDS = {
    "v1": ["Pod", "Service", "ServiceAccount", "Secret", "ConfigMap", "PersistentVolumeClaim"],
    "apps/v1": ["Deployment"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["NetworkPolicy", "Ingress"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "leaderworkerset.x-k8s.io/v1": ["LeaderWorkerSet"],
    "keda.sh/v1alpha1": ["ScaledObject"],
}


def plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}{'es' if kind.endswith('s') else 's'}"


class ApiServer(http.server.ThreadingHTTPServer):
    """Objects by path, as a client asks for them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, Any]] = {}

    def put(self, item: dict[str, Any], namespace: str) -> None:
        """Has an object be there."""
        version, kind, name = item["apiVersion"], item["kind"], item["metadata"]["name"]
        self.objects[f"{root(version)}/namespaces/{namespace}/{plural(kind).lower()}/{name}"] = item

    def kubeconfig(self, file: Path) -> Path:
        """How clients find it."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}],
            "users": [{"name": "x", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "current-context": "x",
        }
        file.write_text(yaml.safe_dump(content))
        return file


def root(version: str) -> str:
    return f"/api/{version}" if "/" not in version else f"/apis/{version}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        answer = self._find(path)
        if answer is None:
            missing = {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "reason": "NotFound",
                "code": 404,
            }
            self._send(404, {**missing, "message": f"{path} not found"})
        else:
            self._send(200, answer)

    def do_POST(self) -> None:
        self._refuse()

    do_PUT = do_PATCH = do_DELETE = do_POST

    def _refuse(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        self._send(405, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 405})

    def _find(self, path: str) -> dict[str, Any] | None:
        if path == "/version":
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = []
            for version in KINDS:
                if "/" in version:
                    entry = {"groupVersion": version, "version": version.split("/")[1]}
                    groups.append(
                        {"name": version.split("/")[0], "versions": [entry], "preferredVersion": entry}
                    )
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        for version, kinds in KINDS.items():
            if path == root(version):
                resources = [
                    {
                        "name": plural(kind).lower(),
                        "singularName": kind.lower(),
                        "namespaced": True,
                        "kind": kind,
                        "verbs": ["get", "list", "create", "patch", "update", "delete"],
                    }
                    for kind in kinds
                ]
                return {
                    "kind": "APIResourceList",
                    "apiVersion": "v1",
                    "groupVersion": version,
                    "resources": resources,
                }
        if path.endswith("/secrets"):
            return {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": self._secrets(path)}
        return self.server.objects.get(path)

    def _secrets(self, path: str) -> list[dict[str, Any]]:
        return [item for place, item in self.server.objects.items() if place.startswith(f"{path}/")]

    def _send(self, code: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[ApiServer]:
    with ApiServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
