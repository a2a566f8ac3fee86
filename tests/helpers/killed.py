"""A command that is killed once it has written its fifth answer."""

# Killed by itself, so that it is in the middle of a batch whatever the machine does.
KILLED = """
import os, signal, sys
from flashbone.cli import main
from flashbone.evaluate.answer_file import Appender
add, added = Appender.add, []
def add_and_die(self, answered):
    add(self, answered)
    added.append(answered)
    if len(added) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Appender.add = add_and_die
sys.exit(main(sys.argv[1:]))
"""
