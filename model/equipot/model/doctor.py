"""What `equipot doctor` says of the model's ground: torch, devices, the compiled kernel."""

import os
import shutil
from collections.abc import Iterator

import torch

from equipot.model.kernels import cache_folder, kernel_status


def findings(*, build: bool) -> Iterator[tuple[str, str, str | None]]:
    """(name, value, remedy or None) of each thing.

    Args:
        build: build the compiled kernel if it is not there, which takes about a minute.
    """
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads", None
    yield "CPU", f"{torch.backends.cpu.get_cpu_capability()}, bf16 {_cpu_bf16()}", None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if properties.major >= 8 else "no bf16"
            memory = f"{properties.total_memory / 2**30:.1f} GiB"
            yield f"cuda:{index}", f"{properties.name}, {memory}, {bf16}", None
    else:
        built_for = torch.version.cuda
        without = "none: this torch is built for the CPU" if built_for is None else "none found by torch"
        yield "CUDA device", without, None
    yield "message kernel", *_kernel(build=build)


def _cpu_bf16() -> str:
    # Without these instructions bf16 computes as well, more slowly than fp32.
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "in hardware" if fast else "emulated"


def _kernel(*, build: bool) -> tuple[str, str | None]:
    if any(cache_folder().glob("*.so")) or build:
        status = kernel_status()
        remedy = "optional; the messages run in pure torch meanwhile"
        return status, remedy if status.startswith("pure torch") else None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "pure torch: there is no C++ compiler", "optional; apt-get install g++"
    return (
        f"not built yet; built at first use, in {cache_folder()}",
        "to build it now: equipot doctor --build",
    )
