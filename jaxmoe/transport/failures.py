"""Failures that a kernel records on the device: told at once, and raised even where no call would.

A call that fails on a GPU ends, with NaN for results. The next call of its group raises the error.
But a captured graph replays calls without any host code, and a failed call may be the last one. So
a thread waits for records: it writes the error to stderr, and if no call has raised it a moment
later, raises `ExchangeError` in the main thread, as an interrupt from the keyboard would be.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Any

_GRACE_SECONDS = 2.0  # for the next call to raise the error
_MESSAGE_BYTES = 1024
_lock = threading.Lock()
_watched: list[Any] = []
_last_message = ""


class ExchangeError(RuntimeError):
    """A dispatch or combine failed on the device: a peer did not come in time, or is in another
    call. The group of the call cannot be used any more.
    """

    def __init__(self, message: str | None = None):
        super().__init__(_last_message if message is None else message)


def watch(lib: Any) -> None:
    """Start the thread that waits for the failures of a library's groups, once."""
    with _lock:
        if lib in _watched:
            return
        _watched.append(lib)
        threading.Thread(target=_watch, args=(lib,), name="jaxmoe-failures", daemon=True).start()


def _watch(lib: Any) -> None:
    uid, message = ctypes.c_int64(), ctypes.create_string_buffer(_MESSAGE_BYTES)
    wait = (ctypes.c_double(1.0), ctypes.byref(uid), message, ctypes.c_int(_MESSAGE_BYTES))
    while True:
        if lib.jaxmoe_cuda_wait_failure(*wait):
            _announce(lib, uid.value, message.value.decode(errors="replace"))


def _announce(lib: Any, uid: int, message: str) -> None:
    global _last_message
    _last_message = message
    print(f"jaxmoe: {message}", file=sys.stderr, flush=True)
    until = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < until:
        if lib.jaxmoe_cuda_was_raised(ctypes.c_int64(uid)):
            return
        time.sleep(0.02)
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(ExchangeError))
