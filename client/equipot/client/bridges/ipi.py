"""Forces for i-PI from an equipot server. i-PI moves the atoms and asks by its socket.

The socket is ASE's `SocketClient`, the force field `EquipotCalculator`: what is here puts the two together.
"""

from __future__ import annotations

from ase import Atoms
from ase.calculators.socketio import SocketClient

from equipot.client.calculator import EquipotCalculator
from equipot.client.errors import ServerUnavailable


def answer_ipi(
    atoms: Atoms,
    calculator: EquipotCalculator,
    *,
    host: str = "localhost",
    port: int = 31415,
    unix_socket: str | None = None,
    stress: bool | None = None,
) -> int:
    """Answers an i-PI server until it has no more to ask, and returns how often it did.

    Args:
        atoms: the species, cell and pbc that i-PI moves, in its order; positions come from i-PI.
        calculator: asks the equipot server.
        host: where i-PI listens.
        port: where i-PI listens.
        unix_socket: the name in `<address>` of i-PI's `<ffsocket mode="unix">`, in place of host and port.
        stress: whether i-PI needs the virial; None: if the atoms are periodic in all three directions.

    Raises:
        ServerUnavailable: i-PI cannot be reached.
        ClientError: the equipot server could not answer a step; i-PI is left and waits for another client.
    """
    where = f"the socket {unix_socket}" if unix_socket else f"{host}:{port}"
    try:
        client = SocketClient(host=host, port=port, unixsocket=unix_socket)
    except OSError as error:
        raise ServerUnavailable(f"cannot reach i-PI at {where}: is it running? ({error})") from error
    atoms.calc = calculator
    answered = 0
    try:
        for _ in client.irun(atoms, use_stress=bool(atoms.pbc.all()) if stress is None else stress):
            answered += 1
    finally:
        client.close()
    return answered
