"""`python -m jaxmoe launch`: what the ranks get, and that they end together, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxmoe.cli import _reaper

ROOT = Path(__file__).parents[1]
CPU = ("--platform", "cpu")
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(90)]

# Waits for what only the other ranks could bring, as a rank does in a collective.
WAIT = "import time; time.sleep(80)"
RANK = "import os; rank = int(os.environ['JAX_PROCESS_ID'])"


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Writes a script and returns its path."""

    def write(*lines: str) -> str:
        path = tmp_path / "a script.py"
        path.write_text("\n".join(map(textwrap.dedent, lines)) + "\n")
        return str(path)

    return write


def start(*args: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A launcher in a session of its own, as a terminal gives it one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    # An installed jaxmoe comes before it; without one the package is that of the checkout.
    paths = [os.environ.get("PYTHONPATH"), str(ROOT)]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxmoe", "launch", *map(str, args)],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(*args: object, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Standard output and error of a launch that must end with `code`."""
    process = start(*args, cwd=cwd)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, output + errors
    return output, errors


def lines_of(rank: int, output: str) -> list[str]:
    mark = f"[{rank}] "
    return [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 40
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Callable[[], dict[str, int]]]:
    """Processes that noted their number in a file here; all must have ended by the end."""

    def read() -> dict[str, int]:
        found = {path.name: path.read_text() for path in tmp_path.glob("pid-*")}
        return {name: int(text) for name, text in found.items() if text}

    yield read
    left = {name: pid for name, pid in read().items() if lives(pid)}
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
    assert not left


def note_pids(folder: Path) -> str:
    """Lines of a script that note the rank's number, and start a child and one that hides."""
    return f"""
        import os, pathlib, subprocess, sys
        rank = int(os.environ['JAX_PROCESS_ID'])
        def note(name, pid):
            pathlib.Path({str(folder)!r}, f'pid-{{name}}-{{rank}}').write_text(str(pid))
        child = subprocess.Popen(['sleep', '80'])
        hidden = subprocess.Popen(['sleep', '80'], start_new_session=True)
        note('child', child.pid), note('hidden', hidden.pid), note('rank', os.getpid())
    """


SHOW = """
    import json, os, sys
    import jax
    assert jax.distributed.is_initialized()
    facts = dict(
        argv=sys.argv[1:], name=__name__, path=sys.path[0], stdin=sys.stdin.read(),
        rank=jax.process_index(), ranks=jax.process_count(),
        devices=[jax.local_device_count(), jax.device_count()], platform=jax.default_backend(),
    )
    print(json.dumps(facts))
    print('to stderr', file=sys.stderr)
"""


@pytest.mark.smoke
def test_ranks_are_joined_and_get_their_arguments(script, tmp_path: Path):
    arguments = ["--n", "3", "-n", "5", "-m", "--", "--log-dir", "a 'b' \"c\"", "", "$HOME;", "-h"]
    logs = tmp_path / "logs" / "run 1"
    options = ("-n", 2, *CPU, "--devices-per-process", 3, "--log-dir", logs)
    output, errors = launch(*options, script(SHOW), *arguments)
    for rank in range(2):
        (line,) = lines_of(rank, output)
        assert json.loads(line) == {
            "argv": arguments,
            "name": "__main__",
            "path": str(tmp_path),
            "stdin": "",
            "rank": rank,
            "ranks": 2,
            "devices": [3, 6],
            "platform": "cpu",
        }
        assert "to stderr" in lines_of(rank, errors)
        log = (logs / f"rank{rank}.log").read_text().splitlines()
        assert {line, "to stderr"} <= set(log)
    assert f"launch: output of the ranks: {logs}/rank0.log and so on\n" in errors


def test_a_module_runs_with_the_first_rank_shown(script, tmp_path: Path):
    Path(script(SHOW)).rename(tmp_path / "shows.py")
    output, errors = launch("-n", 2, *CPU, "-q", "-m", "shows", "-x", cwd=tmp_path)
    facts = json.loads(lines_of(0, output)[0])
    assert (facts["argv"], facts["name"], facts["path"]) == (["-x"], "__main__", str(tmp_path))
    assert not lines_of(1, output + errors)


def test_several_nodes(script):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("-n", 1, *CPU, "--nodes", 2, "--coordinator", address)
    nodes = [start(*options, "--node-rank", node, script(SHOW)) for node in (0, 1)]
    for rank, node in enumerate(nodes):
        output, errors = node.communicate(timeout=60)
        assert node.returncode == 0, output + errors
        facts = json.loads(lines_of(rank, output)[0])
        assert (facts["rank"], facts["ranks"], facts["devices"]) == (rank, 2, [1, 2])


@pytest.mark.parametrize(
    ("failure", "code", "how"),
    [
        ("raise SystemExit(3)", 3, "ended with exit code 3"),
        ("sys.exit('a reason')", 1, "ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "was killed by SIGSEGV"),
        ("{}['a key']", 1, "ended with exit code 1"),
    ],
)
def test_a_failing_rank_ends_the_others(script, failure: str, code: int, how: str):
    # An exit handler that hangs, as of a library that waits for the others, is given up on.
    hang = "import atexit, sys, signal; atexit.register(lambda: time.sleep(80))"
    slow = "key" in failure
    path = script(RANK, "import time", hang if slow else "import sys, signal", "print('so far')",
                  f"if rank == 1: {failure}", WAIT)  # fmt: skip
    begin = time.monotonic()
    _, errors = launch("-n", 2, *CPU, "--grace", 1, path, code=code)
    assert time.monotonic() - begin < 30
    assert f") {how}; ending the others\n" in errors
    report = errors.split("launch: last lines of rank 1:\n")[1]
    assert "[1] so far\n" in report
    assert "launch: rank 0 was killed by SIG" in report
    if "reason" in failure:
        assert "[1] a reason\n" in report
    if slow:
        lines = lines_of(1, report)
        first = lines.index("Traceback (most recent call last):")
        # The traceback begins with the script.
        assert "a script.py" in lines[first + 1]
        assert "KeyError: 'a key'" in lines


def test_what_was_printed_before_a_crash_is_shown(script):
    path = script("import os", "print('before')", "print('no end of line', end='')", "os._exit(7)")
    output, _ = launch("-n", 1, *CPU, path, code=7)
    assert lines_of(0, output) == ["before", "no end of line"]


def test_control_c_reaches_every_rank_once(script, tmp_path: Path, pids):
    path = script(
        note_pids(tmp_path),
        """
        import time
        try:
            time.sleep(80)
        except KeyboardInterrupt:
            time.sleep(0.5)  # a second one would be a traceback
            print('stopped')
            sys.exit(130)
        """,
    )
    process = start("-n", 2, *CPU, path)
    wait_for(lambda: len(pids()) == 6, process)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, output + errors
    assert [lines_of(rank, output) for rank in (0, 1)] == [["stopped"], ["stopped"]]
    assert "Traceback" not in errors
    assert "launch: SIGINT: passed on to all ranks" in errors


@pytest.mark.parametrize("twice", [False, True])
def test_ranks_that_ignore_a_signal_are_killed(script, tmp_path: Path, pids, twice: bool):
    ignore = "import signal; signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))"
    path = script(ignore, note_pids(tmp_path), WAIT, WAIT)
    process = start("-n", 2, *CPU, "--grace", 60 if twice else 0.5, path)
    wait_for(lambda: len(pids()) == 6, process)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if twice:
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 143, output + errors
    assert lines_of(0, output) == lines_of(1, output) == ["no"]
    assert 0.5 <= time.monotonic() - begin < 10


def test_a_killed_launcher_leaves_nobody_behind(script, tmp_path: Path, pids):
    process = start("-n", 2, *CPU, script(note_pids(tmp_path), WAIT))
    wait_for(lambda: len(pids()) == 6, process)
    assert all(lives(pid) for pid in pids().values())
    process.kill()
    process.communicate(timeout=10)
    until = time.monotonic() + 5
    while any(lives(pid) for pid in pids().values()) and time.monotonic() < until:
        time.sleep(0.02)  # the fixture asserts the outcome


def test_what_ranks_leave_running_is_ended(script, tmp_path: Path, pids):
    begin = time.monotonic()
    launch("-n", 1, *CPU, script(note_pids(tmp_path)))
    assert len(pids()) == 3
    assert time.monotonic() - begin < 30


def test_a_time_limit(script):
    begin = time.monotonic()
    _, errors = launch("-n", 2, *CPU, "--timeout", 1, "--grace", 0, script(WAIT), code=124)
    assert "launch: not done after 1 seconds: ending all ranks\n" in errors
    assert time.monotonic() - begin < 20


def test_output_that_nobody_reads_ends_the_ranks(script, tmp_path: Path, pids):
    path = script(
        note_pids(tmp_path), "import time", "while True: print('x' * 99); time.sleep(0.01)"
    )
    process = start("-n", 2, *CPU, path)
    with process:
        wait_for(lambda: len(pids()) == 6, process)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
        assert "Traceback" not in process.stderr.read()


def test_the_reaper_knows_its_own(tmp_path: Path):
    environment = os.environ | {_reaper.LAUNCH_ID: "test-id-1"}
    marked = subprocess.Popen(["sleep", "80"], env=environment)
    session = subprocess.Popen(["sleep", "80"], start_new_session=True)
    other = subprocess.Popen(["sleep", "80"])
    try:
        time.sleep(0.1)
        assert sorted(_reaper.members("test-id-1", {session.pid})) == sorted(
            [marked.pid, session.pid]
        )
        assert _reaper.members("test-id", set()) == []
    finally:
        for process in (marked, session, other):
            process.kill()
    marked.wait()
    session.wait()
    other.wait()
