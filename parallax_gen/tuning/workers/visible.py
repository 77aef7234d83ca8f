"""How many GPUs this process may use. A child asks the driver: the tuning process never touches CUDA.

It asks the driver alone, without torch and without a CUDA context, so it takes a second at most.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys

TIMEOUT_S = 60.0  # the driver may first have to initialise many cards


def visible_devices() -> int:
    """How many GPUs a child sees, among those of CUDA_VISIBLE_DEVICES; at least 1.

    1 may also mean none: the measuring child of device 0 tells the two apart, and reports what is wrong with a driver.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None and "," not in names:
        return 1
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        counted = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, timeout=TIMEOUT_S, check=True, encoding="utf-8"
        )
        return max(1, int(counted.stdout))
    return 1


def count_devices() -> int:
    """The driver's count of GPUs; 0 without a driver. Only for processes that may touch CUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if failed else count.value


if __name__ == "__main__":
    print(count_devices())
