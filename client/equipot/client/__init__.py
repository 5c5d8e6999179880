"""Asks an equipot server: `Client`, `AsyncClient`, `EquipotCalculator` for ASE. Imports no torch, no ASE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipot.client.aio import AsyncClient
from equipot.client.aio_jobs import AsyncJobs
from equipot.client.aio_session import AsyncSession
from equipot.client.certainty import Certainty, DomainVerdict, Uncertainty
from equipot.client.channel import Health
from equipot.client.credentials import Tls
from equipot.client.dynamics import Begun, Ended, MotionFrame, Observation, Restart, Resumed, Trajectory
from equipot.client.errors import (
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    InvalidStructure,
    JobFailed,
    JobNotFound,
    LimitExceeded,
    ModelChanged,
    ModelNotFound,
    NotTrusted,
    Refused,
    ServerError,
    ServerUnavailable,
    StructureFailure,
    Unauthenticated,
)
from equipot.client.explanation import Explanation
from equipot.client.job_info import JobInfo, JobResult
from equipot.client.jobs import Jobs
from equipot.client.relax import Relaxed
from equipot.client.results import Limits, ModelInfo, ModelReference, Prediction, Predictions
from equipot.client.retry import RetryPolicy
from equipot.client.session import Session
from equipot.client.structures import Structure
from equipot.client.sync import Client
from equipot.wire.v1.codec import Failure, FailureReason, StructureArrays

if TYPE_CHECKING:
    from equipot.client.calculator import EquipotCalculator

__all__ = [
    "AsyncClient",
    "AsyncJobs",
    "AsyncSession",
    "Begun",
    "Certainty",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "DomainVerdict",
    "Ended",
    "EquipotCalculator",
    "Explanation",
    "Failure",
    "FailureReason",
    "Health",
    "InvalidRequest",
    "InvalidStructure",
    "JobFailed",
    "JobInfo",
    "JobNotFound",
    "JobResult",
    "Jobs",
    "LimitExceeded",
    "Limits",
    "ModelChanged",
    "ModelInfo",
    "ModelNotFound",
    "ModelReference",
    "MotionFrame",
    "NotTrusted",
    "Observation",
    "Prediction",
    "Predictions",
    "Refused",
    "Relaxed",
    "Restart",
    "Resumed",
    "RetryPolicy",
    "ServerError",
    "ServerUnavailable",
    "Session",
    "Structure",
    "StructureArrays",
    "StructureFailure",
    "Tls",
    "Trajectory",
    "Unauthenticated",
    "Uncertainty",
]


def __getattr__(name: str) -> type[EquipotCalculator]:
    # ASE takes longer to import than all the rest, and a client of plain arrays has no need of it.
    if name == "EquipotCalculator":
        from equipot.client.calculator import EquipotCalculator

        return EquipotCalculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
