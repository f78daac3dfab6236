"""Children that tune might have: each begins a candidate, and then does not end well."""

import os
import time


def hangs(connection):
    connection.send(("begin", "slow"))
    time.sleep(60)


def dies(connection):
    connection.send(("begin", "fatal"))
    os._exit(7)


def fails(connection):
    connection.send(("begin", "sticky"))
    connection.send(("error", "CUDA_ERROR_ILLEGAL_ADDRESS"))


def ends(connection):
    connection.send(("progress", "compiled 1 of 1"))
    connection.send(("record", {"gain": 1.0}))
