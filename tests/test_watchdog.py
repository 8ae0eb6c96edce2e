"""The watchdog: a process that hangs ends with the name of what hung; one that gets on, or was suspended, does not."""

import signal
import subprocess
import sys
import time

# Waits for a pipe that nobody writes to, as a collective waits for a process that is gone.
HANGS = """
import os
from adaptrm.watchdog import doing, watching
def wait_for_the_others():
    os.read(os.pipe()[0], 1)
with watching(0.5):
    doing("saving step 7")
    wait_for_the_others()
"""
GETS_ON = """
import sys, time
from adaptrm.watchdog import doing, watching
with watching(1.0):
    for number in range(20):
        doing(f"step {number}")  # the same words at each: what counts is that they are said
        time.sleep(0.1)
    doing("the first step", at_least=60)
    print("compiling", flush=True)
    time.sleep(2)
with watching(0.3):
    doing("something short")
time.sleep(0.6)  # it ends with its block
print("done")
"""


def test_what_hangs_is_named_and_the_process_ends():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    *stacks, line = done.stderr.splitlines()
    assert line.startswith("adaptrm: saving step 7: nothing has moved for ")
    assert "start the same command again to go on" in line
    assert any("in wait_for_the_others" in text for text in stacks)


def test_what_gets_on_is_left_alone_also_while_it_is_suspended():
    process = subprocess.Popen([sys.executable, "-c", GETS_ON], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "done\n"
    assert process.returncode == 0
