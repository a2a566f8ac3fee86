"""The first tier as other machines would run it: `make test-anywhere`.

Each entry of SETTINGS is one run of the whole first tier: another instruction set, number of threads or workers, or
order of tests. What fails once is a fault. `python tests/anywhere.py aten-avx2 twice` runs those two alone.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Without the limit of five seconds, which holds for `make test` alone: four spinning threads on two cores, or slower
# instructions, stretch the same work by up to three.
TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--dist", "loadfile"]
RANDOMLY = {"PYTHONPATH": str(ROOT / ".venv" / "randomly")}

# Name -> environment, workers, seed of the order (None: as written), runs at the same time.
SETTINGS: dict[str, tuple[dict[str, str], int, int | None, int]] = {
    "aten-default": ({"ATEN_CPU_CAPABILITY": "default"}, 2, 1, 1),
    "aten-avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, 2, 2, 1),
    "mkl-compatible": ({"MKL_CBWR": "COMPATIBLE"}, 2, 3, 1),
    "onednn-avx2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, 2, 4, 1),
    "two-threads": ({"OMP_NUM_THREADS": "2"}, 2, 5, 1),
    "one-process": ({}, 0, None, 1),
    "twice": ({}, 2, None, 2),
}


def run(name: str) -> bool:
    """Run one setting; whether every test passed."""
    more, workers, seed, at_once = SETTINGS[name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more | (RANDOMLY if seed is not None else {})
    order = [] if seed is None else [f"--randomly-seed={seed}"]
    command = [*TESTS, "-n", str(workers), *order]
    logs = [ROOT / ".cache" / "anywhere" / f"{name}-{i}.log" for i in range(at_once)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for log in logs
    ]
    codes = [process.wait() for process in running]
    last = [log.read_text().strip().splitlines()[-1] for log in logs]
    for code, line, log in zip(codes, last, logs, strict=True):
        print(
            f"{name:15} {'green' if code == 0 else f'RED ({log})'} {time.monotonic() - started:5.0f} s  {line}",
            flush=True,
        )
    return not any(codes)


if __name__ == "__main__":
    results = [run(name) for name in sys.argv[1:] or SETTINGS]
    sys.exit(not all(results))
