"""Repositories of tiny bundles, and a server in this process that serves one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import grpc
from tests.serve.conftest import Inside, ask, inside, molecule, read

from equipot.serve.config import ServeConfig
from equipot.serve.repository.settings import RepositorySettings
from equipot.wire.v1 import admin_pb2, admin_pb2_grpc
from equipot.wire.v1 import potential_pb2 as pb

if TYPE_CHECKING:
    from equipot.wire.v1.admin_pb2_grpc import AdminServiceAsyncStub

MOLECULE = molecule(1)


def put(bundle: Path, version: Path) -> None:
    """Copies a bundle to its place as one should: aside, then named."""
    aside = version.with_name(f".{version.name}")
    shutil.copytree(bundle, aside)
    version.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(version)


def label(model: Path, text: str) -> None:
    """Writes labels.toml, later than the last one by more than a clock's tick."""
    file = model / "labels.toml"
    before = file.stat().st_mtime_ns if file.exists() else 0
    file.write_text(text)
    os.utime(file, ns=(before + 10**9, before + 10**9))


@dataclass
class Serving:
    """A server with a repository, and both stubs."""

    inside: Inside
    admin: AdminServiceAsyncStub

    async def refresh(self) -> admin_pb2.Repository:
        return await self.admin.RefreshRepository(admin_pb2.RefreshRepositoryRequest())

    async def energy(self, model: str = "tiny", session: str = "") -> tuple[float, pb.ModelReference]:
        response = await self.inside.stub.Predict(ask([MOLECULE], model=model, session=session))
        return float(read(response, [MOLECULE]).energy[0]), response.model

    async def once_loaded(self, model: str = "tiny") -> tuple[float, pb.ModelReference]:
        """As `energy`, of a model that is loaded when it is asked for."""
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await self.energy(model)
            await asyncio.sleep(0.02)

    async def version(self, model: str = "tiny", session: str = "") -> str:
        return (await self.energy(model, session))[1].version

    async def refused(self, model: str) -> tuple[grpc.StatusCode, str]:
        try:
            await self.energy(model)
        except grpc.aio.AioRpcError as error:
            return error.code(), str(error.details())
        raise AssertionError(f"{model} was answered")

    async def listed(self) -> dict[str, pb.Model]:
        models = (await self.inside.stub.ListModels(pb.ListModelsRequest())).models
        return {f"{model.name}@{model.version}": model for model in models}


@contextlib.asynccontextmanager
async def serving(
    folder: Path | str, *, dtype: Literal["float32", "float64"] = "float64", **settings: Any
) -> AsyncIterator[Serving]:
    """Looks at the repository when told, unless `poll` is given."""
    values = {"poll": 0.0, "unload_after": 0.0} | settings
    config = ServeConfig(
        repository=RepositorySettings(url=str(folder), **values),
        admins=("*",),
        port=0,
        metrics_port=None,
        dtype=dtype,
        threads=1,
    )
    async with inside(config) as there, grpc.aio.insecure_channel(there.address) as channel:
        yield Serving(there, cast("AdminServiceAsyncStub", admin_pb2_grpc.AdminServiceStub(channel)))
