"""`--processes N`: the command again in N processes of this machine, by accelerate's launcher."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from flashbone.errors import ConfigError

TRACEBACK = "--traceback"


def check_processes(processes: int, on_cpu: bool) -> None:
    """Raise ConfigError where so many processes cannot be started here."""
    import torch

    if processes < 1:
        raise ConfigError(f"--processes: got {processes}, wanted 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--processes: a launcher has started this process already; leave --processes out")
    if not on_cpu and processes > torch.cuda.device_count():
        raise ConfigError(
            f"--processes: got {processes}, but there are {torch.cuda.device_count()} GPUs, and each process takes one;"
            " ask for fewer, or set training.use_cpu: true"
        )
    if on_cpu and processes > (cores := os.cpu_count() or 1):
        raise ConfigError(f"--processes: got {processes}, but there are {cores} CPU cores; ask for fewer")


def launch(command: Sequence[str], processes: int, on_cpu: bool) -> int:
    """Run `flashbone COMMAND ...` in so many processes, to the end of all of them; returns the code of the first that
    failed, or 0. When this process is interrupted or terminated, they are ended first.

    Args:
        command: What follows `flashbone`.
        processes: How many.
        on_cpu: Whether they train on CPUs, which they share.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what is wrong
    threads = max(1, torch.get_num_threads() // processes) if on_cpu else 1
    options = {"num_processes": processes, "num_machines": 1, "main_process_port": 0, "mixed_precision": "no"}
    options |= {"dynamo_backend": "no", "num_cpu_threads_per_process": threads}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    more = [TRACEBACK] if TRACEBACK in sys.argv else []
    args = launch_command_parser().parse_args([*words, "--multi_gpu", "--module", "flashbone", *command, *more])
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"flashbone {command[0]}: process {rank} was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode  # as a shell reports it
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval
    return 0
