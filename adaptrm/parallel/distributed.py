"""Several processes as one program."""

import os

import jax

from adaptrm.errors import InputError


def start_processes() -> None:
    """Join the other processes where the environment names them, else stay alone.

    Reads ``JAX_COORDINATOR_ADDRESS`` (host:port), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, as ``launch/local.sh``
    sets them.

    Raises:
        InputError: some of the three are set and others are not.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ.get(name) for name in names}
    if not any(given.values()):
        return
    if missing := [name for name, value in given.items() if not value]:
        raise InputError(f"{missing[0]} is not set, other settings of a multi-process run are; set all three")
    address, count, number = given.values()
    if not count.isdecimal() or not number.isdecimal():
        raise InputError(f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={number} must be numbers")
    jax.distributed.initialize(address, int(count), int(number))
