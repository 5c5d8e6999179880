"""Forces for i-PI from an equipot server: `pip install ipi 'equipot[ase]'`.

    i-pi input.xml &
    python examples/ipi_client.py localhost:50051 STRUCTURE --unix equipot      # or --host, --port

STRUCTURE is any file that ASE reads, with the atoms in i-PI's order. Start as many clients as i-PI has beads
to ask for at once: the server computes them together. input.xml names the socket:
`<ffsocket name="equipot" mode="unix"><address>equipot</address></ffsocket>`.
"""

from __future__ import annotations

import argparse
import sys

from ase.io import read

from equipot.client import ClientError, EquipotCalculator
from equipot.client.bridges.ipi import answer_ipi


def main() -> int:
    """Answers until i-PI is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("structure")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=31415)
    parser.add_argument("--unix", help="the socket's name in i-PI's input, in place of host and port")
    words = parser.parse_args()
    try:
        with EquipotCalculator(words.address) as calculator:
            atoms = read(words.structure)
            steps = answer_ipi(
                atoms, calculator, host=words.host, port=words.port, unix_socket=words.unix, stress=False
            )
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"answered {steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
