"""Reads the dict form of a pymatgen Structure without pymatgen."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipot.model.elements import MAX_ATOMIC_NUMBER, symbol
from equipot.train.sources.base import FrameError, Reason

KBAR = 1 / 1602.1766208
"""eV/Å³ in a kbar, CODATA 2014 as in ASE and pymatgen's own conversions; the releases were made with it."""
_NUMBERS = {"D": 1, "T": 1, **{symbol(z): z for z in range(1, MAX_ATOMIC_NUMBER + 1)}}


class Structure(NamedTuple):
    """atomic_numbers (n,), positions (n, 3) in Å, cell (3, 3) in Å, pbc (3,), charge in e."""

    atomic_numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    charge: int


def read_structure(body: object) -> Structure:
    """From a dict with lattice and sites; positions come from the fractional coordinates, as in pymatgen.

    Raises:
        FrameError: not such a dict, or a site that is shared by several elements or only partly taken.
    """
    if not isinstance(body, Mapping):
        raise FrameError(Reason.INVALID, f"the structure is a {type(body).__name__}, not named values")
    try:
        cell = np.array(body["lattice"]["matrix"], dtype=np.float64)
        pbc = np.array(body["lattice"].get("pbc", (True, True, True)), dtype=np.bool_)
        sites = body["sites"]
        numbers = np.array([_number(k, site) for k, site in enumerate(sites)], dtype=np.int64)
        fractional = np.array([site["abc"] for site in sites], dtype=np.float64)
        charge = body.get("charge") or 0
        if cell.shape != (3, 3) or pbc.shape != (3,) or fractional.shape != (len(sites), 3):
            raise FrameError(Reason.INVALID, f"cell {cell.shape}, coordinates {fractional.shape}")
        if charge != int(charge):
            raise FrameError(Reason.CHARGE_OR_SPIN, f"charge={charge}, expected a whole number")
        return Structure(numbers, fractional @ cell, cell, pbc, int(charge))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        detail = f"the structure is malformed ({type(error).__name__}: {error})"
        raise FrameError(Reason.INVALID, detail[:200]) from None


def _number(index: int, site: Mapping[str, Any]) -> int:
    species = site["species"]
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise FrameError(Reason.INVALID, f"site {index} is disordered: {species!r:.80}")
    element = species[0]["element"]
    if element not in _NUMBERS:
        raise FrameError(Reason.INVALID, f"site {index} is {element!r}, which is no element")
    return _NUMBERS[element]


def stress_from_kbar(value: object) -> NDArray[np.float64]:
    """(3, 3) in eV/Å³, positive in tension, from kbar, positive in compression, as VASP prints it.

    Either 3×3, or six numbers in VASP's order xx yy zz xy yz zx.
    """
    try:
        kbar = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise FrameError(Reason.WRONG_SHAPE, f"stress does not hold numbers: {value!r:.60}") from None
    if kbar.shape == (6,):
        xx, yy, zz, xy, yz, zx = kbar
        kbar = np.array([[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]])
    if kbar.shape != (3, 3):
        raise FrameError(Reason.WRONG_SHAPE, f"stress has shape {kbar.shape}, expected (3, 3) or (6,)")
    return np.asarray(-KBAR * 0.5 * (kbar + kbar.T))
