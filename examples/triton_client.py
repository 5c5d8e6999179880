"""Energies and forces through Triton's own client: no equipot needed, but `tritonclient[grpc]`.

    python examples/triton_client.py localhost:50051 --model alcohols [--structures FILE.npz] [--out FILE.npz]

Without --structures it asks for two water molecules, one of them stretched. The tensors are described in
protos/equipot/wire/inference/codec.py; any client of the Open Inference Protocol v2 can send them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

WATER = np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])


def structures() -> dict[str, Any]:
    """Two molecules in a batch: flat arrays, and the number of atoms of each."""
    return {
        "n_atoms": np.array([3, 3]),
        "atomic_numbers": np.array([8, 1, 1, 8, 1, 1], dtype=np.int32),
        "positions": np.concatenate([WATER, 1.05 * WATER]),
    }


def as_input(name: str, array: Any) -> InferInput:  # noqa: ANN401  # Triton's client has no types
    """One tensor as Triton's client sends it."""
    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def main() -> int:
    """Asks once and prints, or saves, what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--model", required=True)
    parser.add_argument("--structures", type=Path, help="the input tensors by name, as numpy saved them")
    parser.add_argument("--out", type=Path, help="where to save the answer")
    words = parser.parse_args()
    inputs = dict(np.load(words.structures)) if words.structures else structures()
    client = InferenceServerClient(words.address)
    try:
        if not client.is_server_ready():
            raise InferenceServerException(f"{words.address} is not ready")
        outputs = [output.name for output in client.get_model_metadata(words.model).outputs]
        answer = client.infer(
            words.model,
            [as_input(name, array) for name, array in inputs.items()],
            outputs=[InferRequestedOutput(name) for name in outputs if name != "stress"],
        )
    except InferenceServerException as error:
        print(error, file=sys.stderr)
        return 1
    for place, text in enumerate(answer.as_numpy("error")):
        if text:
            print(f"structure {place}: {text.decode()}", file=sys.stderr)
    if words.out:
        np.savez(words.out, energy=answer.as_numpy("energy"), forces=answer.as_numpy("forces"))
    else:
        print("energy, eV:", answer.as_numpy("energy"))
        print("forces, eV/Å:", answer.as_numpy("forces"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
