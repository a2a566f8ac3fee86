"""Every failure of a command as one line: our own errors, and those of other libraries."""

import errno
import os
import select
import sys
import traceback

from flashbone.cli.terminal import in_colour
from flashbone.errors import FlashboneError, one_line

_DISK = {
    errno.ENOSPC: "no space left on device; free some or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EACCES: "permission denied; write elsewhere or change the folder's permissions",
    errno.EPERM: "the system does not permit it; write elsewhere or change the folder's permissions",
    errno.EFBIG: "the file is larger than the disk or a limit allows; write elsewhere, or in shards",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an error; write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n`, or use fewer shards",
    errno.ENFILE: "too many open files on this machine; close some programs",
    errno.ENOMEM: "not enough memory; use a smaller model or batch, or close other programs",
    errno.ELOOP: "its links lead in circles; replace them by the files",
}
# Classes are named, so that none has to be imported. The first name among an error's classes decides.
_KINDS = {
    "MemoryError": "not enough memory; use a smaller model or batch, or close other programs",
    "OutOfMemoryError": "not enough memory; use a smaller model or batch, or close other programs",
    "RecursionError": "a file, a template or a setting is nested too deeply",
    "SecurityError": "the chat template does what templates may not do",
    "TemplateSyntaxError": "the chat template is malformed",
    "TemplateError": "the chat template cannot be rendered",
    "YAMLError": "a YAML file is malformed",
}
# What gloo, TCPStore and NCCL say where another process has ended, which says why.
_PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "was likely closed", "remote process exited")
READER_GONE = 141  # what a shell reports for other programs whose reader closed the pipe, as `| head -1` does
_MOST_OF_A_REASON = 250  # characters


def report(error: Exception, who: str, with_traceback: bool) -> int:
    """Print one line on stderr, after the traceback if that is wanted; returns the exit code."""
    if isinstance(error, BrokenPipeError) and _is_unread():
        _forget_stdout()
        return READER_GONE
    rank = os.environ.get("RANK", "0")  # of a process that accelerate or torchrun launched
    prefix = "" if rank == "0" else f"[process {rank}] "
    if prefix and isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_GONE):
        return 1
    try:
        if with_traceback:
            traceback.print_exception(error)
        print(f"{prefix}{who}: {in_colour('error:', 31)} {one_line(_words(error))}", file=sys.stderr)
    except (OSError, ValueError):  # nobody reads stderr either
        pass
    return 1


def _words(error: Exception) -> str:
    if isinstance(error, FlashboneError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{_DISK[error.errno]}"
    reason = one_line(error, _MOST_OF_A_REASON)
    names = [kind.__name__ for kind in type(error).__mro__]
    if words := next((_KINDS[name] for name in names if name in _KINDS), ""):
        return f"{words}{f': {reason}' if reason else ''}"
    package = _package(error)
    if type(error) is Exception and package == "transformers":  # the tokenizers library raises no other kind
        return f"the tokenizer cannot read a text: {reason}; is its tokenizer.json damaged? copy or download it again"
    failure = f"{names[0]}: {reason}"
    if error.__cause__ is not None:
        failure += f" ({type(error.__cause__).__name__}: {one_line(error.__cause__, 100)})"
    if package == "flashbone":
        return f"{failure}; this is a bug of flashbone: run it again with --traceback, and report what that prints"
    return (
        f"{failure}, raised by {package}; a file or a setting may be wrong; if they are right this is a bug: run it"
        " again with --traceback, and report what that prints"
    )


def _package(error: Exception) -> str:
    """The top-level package whose code raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    return names[-1] if names and names[-1] else "flashbone"


def _is_unread() -> bool:
    """Whether the reader of stdout is gone."""
    try:
        sys.stdout.flush()
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)  # errors are always reported
        return any(events & select.POLLERR for _, events in watched.poll(0))
    except BrokenPipeError:
        return True
    except (OSError, ValueError, AttributeError):  # not a file, or no poll on this system
        return False


def _forget_stdout() -> None:
    """Send further output nowhere; Python would try to write once more as it exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # not a file
        sys.stdout = None
