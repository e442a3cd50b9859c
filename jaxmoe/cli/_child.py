"""One rank of a launch: joins the others, then runs the user's script as Python itself would.

    python -m jaxmoe.cli._child [-m] SCRIPT_OR_MODULE ARGS...

The launcher says in JAX's own environment variables what there is to join.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import runpy
import sys
import threading
from pathlib import Path

# What a rank that failed may still take to write its logs.
_EXIT_SECONDS = 5.0
_failure: list[int] = []


def _join() -> None:
    """Make this process one of a `jax.distributed` world."""
    import jax

    env = os.environ
    devices = env.get("JAX_LOCAL_DEVICE_IDS")
    jax.distributed.initialize(
        env["JAX_COORDINATOR_ADDRESS"],
        int(env["JAX_NUM_PROCESSES"]),
        int(env["JAX_PROCESS_ID"]),
        local_device_ids=[int(d) for d in devices.split(",")] if devices else None,
        cluster_detection_method="deactivate",
    )


def _leave_if_failed() -> None:
    """Skips JAX's own clean-up, which waits for the other ranks, and so for ever.

    Handlers run in the reverse of the order they were registered in: this one after all of the
    script's and before JAX's.
    """
    if _failure:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_failure[0])


def _fail(code: int) -> None:
    """Exit with a code that is not 0, whatever the script's own exit handlers do."""
    _failure.append(code)
    watchdog = threading.Timer(_EXIT_SECONDS, os._exit, [code])
    watchdog.daemon = True
    watchdog.start()
    sys.exit(code)


def _run(arguments: list[str]) -> None:
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _print_traceback(error: BaseException) -> None:
    """As Python prints it, from the script's first line on."""
    trace = error.__traceback__
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def main() -> None:
    """Join, run, and exit as the script does."""
    faulthandler.enable()
    arguments = sys.argv[1:]
    try:
        _join()
        atexit.register(_leave_if_failed)
        _run(arguments)
    except SystemExit as error:
        if error.code in (None, 0):
            raise
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        _fail(error.code & 0xFF if isinstance(error.code, int) else 1)
    except KeyboardInterrupt as error:
        _print_traceback(error)
        _fail(130)
    except BaseException as error:
        _print_traceback(error)
        _fail(1)


if __name__ == "__main__":
    main()
