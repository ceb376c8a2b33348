import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bittrue.errors import ConfigError
from bittrue.rl.verifiers.code import Call, FunctionTests, ProgramTests, Run
from bittrue.rl.verifiers.exact import Exact
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.reward_function import RewardFunction, reward_function
from bittrue.rl.verifiers.sandbox import IsolationKind
from bittrue.rl.verifiers.verifier import Verdict, Verifier, answer_of
from bittrue.rl.verifiers.worker_process import descendants

BAD = """
import os, signal, socket, sys, time

def good(prompts, completions, **columns):
    return [1.0]

def hangs(prompts, completions, **columns):
    while True:
        pass

def hangs_with_patience(prompts, completions, **columns):
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass

def takes_its_time(prompts, completions, **columns):
    time.sleep(0.7)
    return [1.0]

def sleeps(prompts, completions, **columns):
    time.sleep(1e6)

def leaves_at_once(prompts, completions, **columns):
    os._exit(0)

def is_killed(prompts, completions, **columns):
    os.kill(os.getpid(), signal.SIGSEGV)

def forks_for_ever(prompts, completions, **columns):
    while True:
        os.fork()

def leaves_a_daemon(prompts, completions, path, **columns):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            try:
                with open(path[0], "w") as file:
                    file.write(str(os.getpid()))
            except OSError:
                pass
            time.sleep(1e6)
        os._exit(0)
    time.sleep(0.2)
    return [1.0]

def writes_outside(prompts, completions, path, **columns):
    open(path[0], "w").close()
    return [1.0]

def opens_a_socket(prompts, completions, port, **columns):
    socket.create_connection(("127.0.0.1", port[0]), 5).close()
    return [1.0]

def takes_all_memory(prompts, completions, **columns):
    return [float(len(bytearray(10**11)))]

def stops_the_worker(prompts, completions, **columns):
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(1e6)

def kills_the_worker(prompts, completions, **columns):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1e6)

def writes_to_every_pipe(prompts, completions, **columns):
    for handle in range(64):
        try:
            os.write(handle, b"\\x20\\x00\\x00\\x00" + b'{"outcome":"right","score":1.0} ')
        except OSError:
            pass
    os._exit(0)

def spoils_the_process(prompts, completions, **columns):
    import builtins, json
    sys.modules[__name__] = None
    builtins.float = builtins.len = json.loads = None
    os.chdir("/")
    raise ValueError("spoiled")

def fills_the_directory(prompts, completions, **columns):
    with open("rest", "wb") as file:
        while True:
            file.write(b"x" * 10**6)

def sees_the_rest(prompts, completions, **columns):
    return [float(os.path.exists("rest"))]
"""

SLOW = """
import time
time.sleep(0.7)
def f():
    return 3
print(f())
"""


@pytest.fixture(scope="module")
def bad_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "bad.py"
    path.write_text(BAD)
    return path


def of(file: Path, name: str, **columns: object) -> RewardFunction:
    return reward_function(f"{file}:{name}", "p", dict(columns))


def costs_one(pool: Pool, verifier: RewardFunction, file: Path, *, seconds: float = 60.0) -> Verdict:
    """The verdict of a verifier that misbehaves; everything around it goes on as if it had not been."""
    before = pool.health().total.outcomes
    verdict = pool.judge(verifier, answer_of(f"{verifier.function}"), seconds=seconds)
    assert verdict.outcome in ("timeout", "crash"), verdict
    assert verdict.score == 0
    assert pool.judge(of(file, "good"), answer_of(f"after {verifier.function}")).outcome == "right"
    after = pool.health().total.outcomes
    gained = {outcome: after[outcome] - before[outcome] for outcome in after}
    assert {outcome: count for outcome, count in gained.items() if count} == {verdict.outcome: 1, "right": 1}
    return verdict


@pytest.mark.parametrize("name", ["hangs", "sleeps", "forks_for_ever"])
def test_what_does_not_end_costs_one_timeout(sandboxed: Pool, bad_file: Path, name: str) -> None:
    verdict = costs_one(sandboxed, of(bad_file, name), bad_file, seconds=0.5)
    assert name == "forks_for_ever" or verdict.outcome == "timeout"


@pytest.mark.parametrize(
    "name",
    [
        "leaves_at_once",
        "is_killed",
        "takes_all_memory",
        "kills_the_worker",
        "writes_to_every_pipe",
        "spoils_the_process",
    ],
)
def test_what_breaks_costs_one_crash(sandboxed: Pool, bad_file: Path, name: str) -> None:
    assert costs_one(sandboxed, of(bad_file, name), bad_file).outcome == "crash"


def test_writing_outside_the_directory_costs_one_crash(sandboxed: Pool, bad_file: Path) -> None:
    target = bad_file.parent / "written"
    verdict = costs_one(sandboxed, of(bad_file, "writes_outside", path=str(target)), bad_file)
    assert (verdict.outcome, target.exists()) == ("crash", False)
    assert verdict.detail.startswith("OSError: [Errno 30]")


def test_opening_a_socket_costs_one_crash(sandboxed: Pool, bad_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        verdict = costs_one(sandboxed, of(bad_file, "opens_a_socket", port=port), bad_file)
        assert verdict.outcome == "crash"
        with pytest.raises(BlockingIOError):
            server.accept()


def test_what_one_answer_writes_is_gone_for_the_next(sandboxed: Pool, bad_file: Path) -> None:
    costs_one(sandboxed, of(bad_file, "fills_the_directory"), bad_file)
    for number in range(4):
        assert sandboxed.judge(of(bad_file, "sees_the_rest"), answer_of(str(number))).outcome == "wrong"


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_daemon_costs_one_crash_and_does_not_live_on(sandboxed: Pool, bad_file: Path) -> None:
    with Pool(num_workers=1, limits=Limits(seconds=60.0)) as pool:
        pool.judge(of(bad_file, "good"), answer_of("x"))
        before = descendants(os.getpid())
        verdict = costs_one(pool, of(bad_file, "leaves_a_daemon", path="/tmp/pid"), bad_file)
        assert verdict.outcome == "crash"
        assert pool.health().restarts == 1
        assert len(descendants(os.getpid())) == len(before)


def test_a_worker_that_no_longer_answers_is_killed(sandboxed: Pool, bad_file: Path) -> None:
    with Pool(num_workers=1, limits=Limits(seconds=60.0, grace_seconds=0.3)) as pool:
        verdict = costs_one(pool, of(bad_file, "stops_the_worker"), bad_file, seconds=0.3)
        assert verdict.outcome == "timeout"
        health = pool.health()
        assert (health.workers_started, health.restarts, health.total.timeouts) == (2, 1, 1)


@pytest.mark.slow
def test_with_limits_alone_what_does_not_end_is_killed_too(bad_file: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with Pool(num_workers=1, isolation="limits", limits=Limits(seconds=60.0)) as pool:
        assert not pool.isolation.is_sandbox
        costs_one(pool, of(bad_file, "hangs"), bad_file, seconds=0.5)
        costs_one(pool, of(bad_file, "leaves_at_once"), bad_file)
        verdict = costs_one(pool, of(bad_file, "leaves_a_daemon", path=str(note)), bad_file)
        assert verdict.outcome == "crash"
        assert gone([int(note.read_text())])


def test_workers_die_with_the_process_that_uses_them(bad_file: Path) -> None:
    program = f"""
import time
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.reward_function import reward_function
from bittrue.rl.verifiers.sandbox import IsolationKind
from bittrue.rl.verifiers.verifier import answer_of
pool = Pool(num_workers=2)
pool.judge(reward_function({f"{bad_file}:good"!r}, "p"), answer_of("x"))
pool.submit(reward_function({f"{bad_file}:sleeps"!r}, "p"), answer_of("x"))
print("ready", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "ready\n"
        workers = descendants(user.pid)
        user.send_signal(signal.SIGKILL)
    assert workers
    assert gone(workers)


def test_verdicts_are_kept_by_verifier_and_answer(bad_file: Path) -> None:
    with Pool(num_workers=1, isolation="limits", cache_entries=2, limits=Limits(seconds=60.0)) as pool:
        seen = [pool.judge(Exact(e), answer_of(a)) for e, a in ["aa", "ab", "aa", "ba", "ab", "aa"]]
        assert [v.is_cached for v in seen] == [False, False, True, False, False, False]
        assert [v.outcome for v in seen] == ["right", "wrong", "right", "wrong", "wrong", "right"]
        crash = [pool.judge(of(bad_file, "leaves_at_once"), answer_of("x")) for _ in range(2)]
        assert [(v.outcome, v.is_cached) for v in crash] == [("crash", False)] * 2


def test_health_counts_what_happened() -> None:
    with Pool(num_workers=2, isolation="limits", limits=Limits(seconds=60.0, answer_characters=5)) as pool:
        assert pool.health().total.p50_seconds is None
        pool.judge_all([(Exact("a"), answer_of(text)) for text in ("a", "b", "c", "123456")])
        pool.judge(Exact("a"), answer_of("a"))
        health = pool.health()
    expected = {"right": 2, "wrong": 2, "unparsable": 1, "timeout": 0, "crash": 0}
    assert health.total.outcomes == expected == health.kinds["exact"].outcomes
    assert (health.total.cached, health.restarts) == (1, 0)
    p50, p99 = health.total.p50_seconds, health.total.p99_seconds
    assert p50 is not None and p99 is not None and 0 <= p50 <= p99


def test_many_answers_come_back_in_order(pool: Pool) -> None:
    jobs = [(Exact(str(n % 3)), answer_of(str(n % 5))) for n in range(60)]
    right = [v.outcome == "right" for v in pool.judge_all(jobs)]
    assert right == [n % 3 == n % 5 for n in range(60)]


def test_a_pool_without_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Pool(num_workers=0)


@pytest.fixture
def namespaced(sandboxed: Pool) -> None:
    if sandboxed.isolation.kind != "namespaces":
        pytest.skip(sandboxed.isolation.describe())


def killed_while_judging(
    pool: Pool, verifier: Verifier, *, of_all: int, victim: int, times: int = 1
) -> Verdict:
    """The verdict on a text at whose check a process of the pool is killed from outside: ``victim``, by its
    place among the ``of_all`` that there are once all have been started, parents first."""
    gone = set(descendants(os.getpid()))
    future = pool.submit(verifier, answer_of(SLOW))
    for _ in range(times):
        family: list[int] = []
        while len(family) < of_all:
            time.sleep(0.02)
            family = sorted(set(descendants(os.getpid())) - gone)
        os.kill(family[victim], signal.SIGKILL)
        gone |= set(family)
    return future.result()


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2, 3],
    ids=["waiter", "first of the namespace", "worker", "child that judges"],
)
def test_a_process_killed_from_outside_costs_no_verdict(
    namespaced: None, bad_file: Path, victim: int
) -> None:
    with Pool(num_workers=1, isolation="namespaces", limits=Limits(seconds=60.0)) as pool:
        verdict = killed_while_judging(pool, of(bad_file, "takes_its_time"), of_all=4, victim=victim)
        assert (verdict.outcome, verdict.score) == ("right", 1.0)
        health = pool.health()
        assert health.restarts == (victim < 3)  # the child is forked again, its worker lives on
        assert health.total.outcomes["right"] == 1


@pytest.mark.slow
def test_with_limits_alone_a_process_killed_from_outside_costs_no_verdict(bad_file: Path) -> None:
    with Pool(num_workers=1, isolation="limits", limits=Limits(seconds=60.0)) as pool:
        for victim in (0, 1):
            verifier = of(bad_file, "takes_its_time", victim=victim)
            assert killed_while_judging(pool, verifier, of_all=2 - victim, victim=0).outcome == "right"
        assert pool.health().restarts == 1


def test_an_idle_worker_killed_from_outside_costs_no_verdict(bad_file: Path) -> None:
    with Pool(num_workers=1, isolation="limits", limits=Limits(seconds=60.0)) as pool:
        before = set(descendants(os.getpid()))
        for number in range(3):
            assert pool.judge(of(bad_file, "good"), answer_of(str(number))).outcome == "right"
            (worker,) = set(descendants(os.getpid())) - before
            os.kill(worker, signal.SIGKILL)
        assert pool.health().restarts == 2


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["namespaces", "limits"])
def test_a_program_killed_from_outside_costs_no_verdict(namespaced: None, isolation: IsolationKind) -> None:
    for verifier in (FunctionTests("f", (Call(3),)), ProgramTests((Run("", "3\n"),))):
        with Pool(num_workers=1, isolation=isolation, limits=Limits(seconds=60.0)) as pool:
            of_all = 5 if isolation == "namespaces" else 3
            assert killed_while_judging(pool, verifier, of_all=of_all, victim=-1).outcome == "right"


@pytest.mark.slow
def test_an_answer_whose_check_is_killed_each_time_is_a_crash(namespaced: None, bad_file: Path) -> None:
    with Pool(num_workers=1, isolation="namespaces", limits=Limits(seconds=60.0)) as pool:
        slow = of(bad_file, "takes_its_time")
        verdict = killed_while_judging(pool, slow, of_all=4, victim=2, times=3)
        assert (verdict.outcome, verdict.score) == ("crash", 0.0)
        assert verdict.detail == "a worker was ended by SIGKILL, each of 3 times"
        verdict = pool.judge(of(bad_file, "kills_the_worker"), answer_of("x"))
        assert (verdict.outcome, verdict.detail) == (
            "crash",
            "a worker was ended by SIGKILL, each of 3 times",
        )
        program = "import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGKILL)"
        assert pool.judge(FunctionTests("f", (Call(3),)), answer_of(program)).outcome == "crash"


@pytest.mark.slow
def test_a_signal_that_a_limit_sends_is_a_timeout_at_once(bad_file: Path) -> None:
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f():\n"
    program += "    while True:\n        pass"
    with Pool(num_workers=1, limits=Limits(seconds=60.0, cpu_seconds=1)) as pool:
        for verifier, text in [
            (of(bad_file, "hangs"), "x"),
            (of(bad_file, "hangs_with_patience"), "x"),
            (FunctionTests("f", (Call(3),)), program),
        ]:
            verdict = pool.judge(verifier, answer_of(text))
            assert verdict.outcome == "timeout"
            assert "each of" not in verdict.detail
        assert pool.health().restarts == 0
