"""`torchrun --nproc-per-node N -m dinv.reproduce`: rank 0 runs the notebooks, the others help with its pools.

The notebooks' kernel is rank 0 of a group; every other rank waits for work in `help_with`. The words between
them stand in torchrun's store, under the notebook's name: "go" or "over" by the number of the piece of work.
A process that is gone is found out by its connection to rank 0, which closes with it, however it ends.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
import torch.distributed as dist

from dinv import files
from dinv.experiments import device
from dinv.group import by_rank, from_first

LONG = timedelta(days=30)  # a notebook may do without the others for as long as it likes

_lost: list[int] = []  # on rank 0: the ranks that went, in that order
_connection: Connection | None = None  # on any other: to rank 0


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _store(name: str) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dinv/{attempt}/{name}", dist.TCPStore(host, port, timeout=LONG))


def _group(name: str) -> dist.ProcessGroup:
    if not dist.is_initialized():
        options = {"store": _store(f"{name}/group"), "rank": rank(), "world_size": count(), "timeout": LONG}
        dist.init_process_group("gloo", **options)  # what is sent are images in bytes, from a card as well
    return dist.group.WORLD


# ---- in the notebooks' kernel ----------------------------------------------------------------------
def together(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`function(..., group=...)` in all processes of the run; without a group where there is one process.

    So it is too where an argument cannot be sent, such as a term that the notebook itself defines.
    """
    name, work = os.environ.get("DINV_NOTEBOOK", ""), io.BytesIO()
    if count() == 1 or not name:
        return function(*arguments, **options)
    try:
        torch.save((function, arguments, options | {"checkpoint": files.NO_CHECKPOINT}), work)
    except (AttributeError, TypeError, pickle.PicklingError):
        work.write(b"__main__")
    if b"__main__" in work.getvalue():
        return function(*arguments, **options)
    store = _store(name)
    store.set(str(store.add("pieces", 1)), "go")
    group = _group(name)
    from_first(work.getvalue(), group)
    by_rank(lambda: None, group)  # have the others understood?
    return function(*arguments, **options, group=group)


# ---- in the processes that torchrun starts ---------------------------------------------------------
def begin(profile: str) -> None:
    """Take up the connection between this rank and rank 0, and this rank's card.

    ValueError for more processes than cards.
    """
    global _connection
    if device.begin(profile) == "cuda":
        own, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= cards:
            raise ValueError(f"one process for each card, {cards} here: torchrun --nproc-per-node {cards}")
        torch.cuda.set_device(own)
    store = _store("watch")
    if rank() == 0:
        signal.signal(signal.SIGTERM, _terminated)
        listener = Listener(("", 0), backlog=count())
        far = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"  # other machines take part
        store.set("address", f"{socket.gethostname() if far else '127.0.0.1'}:{listener.address[1]}")
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends also one that waits in the store
    host, _, port = store.get("address").decode().rpartition(":")
    _connection = Client((host, int(port)))
    _connection.send_bytes(str(rank()).encode())


def _accept(listener: Listener) -> None:
    for _ in range(count() - 1):
        threading.Thread(target=_watch, args=(listener.accept(),), daemon=True).start()


def _watch(connection: Connection) -> None:
    """Until the process at the other end says that it is done, or is gone."""
    number = int(connection.recv_bytes())
    with suppress(EOFError, OSError):
        connection.recv_bytes()
        return
    _lost.append(number)
    time.sleep(15)  # torchrun ends what ran beside it at once, on its own machine
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _terminated(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.2)  # for the connection to close
    raise KeyboardInterrupt(f"rank {_lost[0]} died" if _lost else "terminated")


def over(name: str) -> None:
    """Rank 0's kernel of notebook `name` is gone."""
    store = _store(name)
    store.set(str(store.add("pieces", 1)), "over")


def help_with(names: Sequence[str]) -> None:
    """Make this rank's share of what these notebooks do together, until the last is over."""
    for name in names:
        _help(name)
    _connection.send_bytes(b"done")


def _help(name: str) -> None:
    store, kept = _store(name), None
    for number in itertools.count(1):
        if store.get(str(number)) == b"over":
            break
        with suppress(Exception):  # is raised in the notebook as well; or its kernel is gone
            group = _group(name)
            load = partial(torch.load, io.BytesIO(from_first(None, group)), _here, weights_only=False)
            work: list[Any] = []
            by_rank(lambda load=load, work=work: work.append(load()), group)
            [(function, (inverter, *arguments), options)] = work
            if files.digest(inverter) != files.digest(kept):  # else its step is compiled already
                kept = inverter
            function(kept, *arguments, **options, group=group)
    if dist.is_initialized():
        dist.destroy_process_group()


def _here(storage: Any, place: str) -> Any:
    """What lies on rank 0's card, on this rank's."""
    return storage.cuda() if place.startswith("cuda") else storage
