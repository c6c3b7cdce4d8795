"""The program that tries a machine's GPUs; a process of its own, since a broken driver may hang.

It needs nothing of isoflop and is run by its path. It prints one JSON object a line as it gets on,
so that whoever started it knows where it stopped. `gpu_checks` starts it and reads the lines.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from typing import Any

SIZE = 256
"""Rows and columns of the products: with ones on both sides, each entry is exactly this number."""
DRIVER_LIBRARY = "libcuda.so.1"


def say(**values: Any) -> None:
    """Print one line of the report."""
    print(json.dumps(values), flush=True)


def driver() -> None:
    """Report what the CUDA driver itself says, without torch."""
    say(stage="the CUDA driver")
    try:
        library = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        say(driver_error=str(error))
        return
    version, count = ctypes.c_int(), ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
        say(driver_cuda=version.value)
    status = library.cuInit(0)
    if status == 0:
        status = library.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        say(driver_error=f"the driver answers with {_error_name(library, status)}")
    say(driver_gpus=count.value)


def _error_name(library: Any, status: int) -> str:
    name = ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(name))
    return f"{(name.value or b'an unknown error').decode()} ({status})"


def torch_devices() -> list[str]:
    """Report what torch was built for and sees, and return its CUDA devices."""
    say(stage="importing torch")
    import torch

    say(torch=torch.__version__, torch_cuda=torch.version.cuda, torch_hip=torch.version.hip)
    say(stage="starting CUDA in torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    say(torch_gpus=count)
    return [f"cuda:{i}" for i in range(count)]


def product(device: str) -> None:
    """Report whether a matrix product on a device is right."""
    import torch

    say(stage=f"a matrix product on {device}")
    properties = torch.cuda.get_device_properties(device) if device != "cpu" else None
    if properties is not None:
        say(device=device, name=properties.name, memory_bytes=properties.total_memory)
    say(device=device, product_error=product_error(device))


def product_error(device: str) -> str | None:
    """Return why a matrix product on a device is not right, in fp32 or bf16; None if it is."""
    import torch

    try:
        for dtype in (torch.float32, torch.bfloat16):
            ones = torch.ones(SIZE, SIZE, device=device, dtype=dtype)
            if not bool((ones @ ones == SIZE).all()):
                raise ArithmeticError(f"a product of ones in {dtype} is wrong")
    except Exception as error:  # whatever a broken GPU raises is what is reported
        return _sentence(error)
    return None


def compiled(device: str) -> None:
    """Report whether torch.compile works for a device."""
    import torch

    say(stage=f"compiling a function for {device}")
    try:
        function = torch.compile(lambda x: x * 2 + 1, dynamic=False)
        if not bool((function(torch.ones(SIZE, device=device)) == 3).all()):
            raise ArithmeticError("the compiled function gives another result")
    except Exception as error:  # whatever compilers raise is what is reported
        say(device=device, compile_error=_sentence(error))
    else:
        say(device=device, compile_error=None)


def _sentence(error: Exception) -> str:
    """The first line of an error that has words in it, with the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main() -> None:
    """Try what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--driver-only", action="store_true", help="leave torch out")
    parser.add_argument("--device", help="one device, such as cpu, in place of all GPUs")
    arguments = parser.parse_args()
    driver()
    if not arguments.driver_only:
        devices = torch_devices()
        for device in [arguments.device] if arguments.device else devices:
            product(device)
            compiled(device)
    say(stage="")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
