"""The process of one calculator: builds it, and answers structures from its pipe. Needs no torch of its own.

A calculator may crash its process, hang, print, or change what others rely on: here it harms nobody else.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from equipot.serve.foreign.words import Backend, Refused, Structure

ORPHAN_SECONDS = 1.0
"""How often it is asked whether the server still lives."""

LONGEST_MESSAGE = 400


def main(descriptor: int) -> None:
    """Serves the pipe until its other end closes."""
    pipe = Connection(descriptor)
    # What calculators print is for the log, and not for whoever reads the server's output.
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    kind, options = pipe.recv()
    try:
        module = importlib.import_module(f"equipot.serve.foreign.{kind}_backend")
        backend: Backend = module.build(**options)
        facts = backend.facts()
    except Exception as error:
        pipe.send(Refused("internal", describe(error)))
        return
    pipe.send(facts)
    while True:
        try:
            structures, forces, stress = pipe.recv()
        except EOFError:
            return
        if facts.batched:
            for answer in _answers(backend, structures, forces, stress):
                pipe.send(answer)
        else:
            # One by one: whoever waits then knows at which one it stopped.
            for structure in structures:
                pipe.send(_answers(backend, [structure], forces, stress)[0])


def describe(error: BaseException) -> str:
    """An exception in one line, which can be sent: not all that Python calls a string has an encoding."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = "it does not say why"
    text = f"{type(error).__name__}: {said}"[:LONGEST_MESSAGE]
    return text.encode(errors="backslashreplace").decode()


def _answers(backend: Backend, structures: list[Structure], forces: bool, stress: bool) -> list[Any]:
    try:
        return list(backend.compute(structures, forces=forces, stress=stress))
    except Exception as error:
        if len(structures) == 1:
            # ASE's calculators say so of elements and properties that they do not have.
            known = isinstance(error, NotImplementedError | KeyError)
            return [Refused("unsupported" if known else "internal", describe(error))]
    middle = len(structures) // 2
    first = _answers(backend, structures[:middle], forces, stress)
    return first + _answers(backend, structures[middle:], forces, stress)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    # With the programs that the calculator runs.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
