"""What a bundle knows of how sure it is: how intervals follow from spreads, and where its training ended."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from equipot.model.conformal import Calibration
from equipot.model.domain import Domain
from equipot.model.errors import BundleError


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """Of a domain, for people.

    Attributes:
        mix: digest of the mix whose training split it is of.
        structures: of the training split that were looked at.
        atoms: in these.
        calibrated_on: structures of the validation split that settled its border.
        inside: part of structures like those that the border is meant to hold.
    """

    mix: str
    structures: int
    atoms: int
    calibrated_on: int
    inside: float


@dataclass(frozen=True, slots=True)
class UncertaintyCard:
    """As the bundle's card keeps it; None of what was not made."""

    calibration: Calibration | None
    domain: DomainFacts | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "domain": None if self.domain is None else asdict(self.domain),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            BundleError: it is malformed.
        """
        try:
            calibration, domain = data["calibration"], data["domain"]
            return cls(
                calibration=None if calibration is None else Calibration.from_json(calibration),
                domain=None if domain is None else DomainFacts(**domain),
            )
        except BundleError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"uncertainty: {error}; calibrate the bundle again") from error


@dataclass(frozen=True, slots=True, eq=False)
class Uncertainty:
    """The same with numbers, ready to be asked.

    Attributes:
        members: of the ensemble; 1 has no spread.
        calibration: None if there is none.
        domain: None if it is not known.
        facts: of the domain.
    """

    members: int = 1
    calibration: Calibration | None = None
    domain: Domain | None = None
    facts: DomainFacts | None = None

    @property
    def card(self) -> UncertaintyCard | None:
        """What a card says of it; None if there is nothing to say."""
        if self.calibration is None and self.domain is None:
            return None
        return UncertaintyCard(self.calibration, self.facts)
