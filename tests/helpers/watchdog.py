"""A time limit for what may hang a GPU: it ends the process, after saying in which test."""

import faulthandler
import os
import threading
from contextlib import contextmanager

# A thread that holds the GIL keeps Python from saying anything: then faulthandler ends the process.
GRACE_S = 10.0


@contextmanager
def time_limit(seconds, name, stderr):
    """Ends the process if what is within takes longer. ``stderr`` is a file descriptor."""

    def end():
        os.write(stderr, f"\n{name} is not done after {seconds:g} s: this process ends.\n".encode())
        faulthandler.dump_traceback(stderr)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
