"""Notices go to stderr as it is at the time, and nowhere else; a stderr that is gone ends nothing."""

import io
import subprocess
import sys

SET_UP = """
import logging, os, sys
from flashbone.cli.terminal import set_up_notices
set_up_notices()
log = logging.getLogger("flashbone.train.run")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SET_UP + code], capture_output=True, text=True, timeout=60)


def test_notices_go_to_the_stderr_of_the_time():
    code = """
import io
log.info("first")
sys.stderr = other = io.StringIO()
log.info("second")
sys.stderr = sys.__stderr__
log.info("third")
print(repr(other.getvalue()))
"""
    done = run(code)
    assert done.returncode == 0
    assert done.stderr == "flashbone: first\nflashbone: third\n"
    assert done.stdout == repr("flashbone: second\n") + "\n"


def test_a_stderr_whose_reader_is_gone_does_not_end_the_command():
    code = """
reader, writer = os.pipe()
os.close(reader)
sys.stderr = os.fdopen(writer, "w", buffering=1)
log.info("hello")
print("went on", flush=True)
os._exit(0)  # without Python's own last flush of stderr
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_a_closed_stderr_does_not_send_notices_to_stdout():
    for closed in ("sys.stderr = None", "sys.stderr.close()"):
        done = run(f"{closed}\nlog.info('hello')\nprint('the results')\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "the results\n", ""), closed


def test_a_stderr_that_was_closed_before_the_start_is_none_at_all(tmp_path):
    code = SET_UP + "assert sys.stderr is None\nlog.info('hello')\nprint('the results')\n"
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "the results\n")


def test_a_notice_that_cannot_be_written_is_not_written_elsewhere(monkeypatch, capsys):
    """As the handler itself: no process, a stream that fails."""
    import logging

    from flashbone.cli.terminal import _Notices

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    _Notices().handle(logging.makeLogRecord({"msg": "hello"}))
    assert capsys.readouterr().out == ""
