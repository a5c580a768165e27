"""How many threads there are, and that no number of them, no fork and no neighbour changes a result."""

import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from conftest import pair

import bitdelta
from bitdelta import threads

# the number of threads


@pytest.mark.parametrize("n", [1, 2, 7, np.int64(3)])
def test_the_number_that_is_set_is_the_number_that_holds(n):
    bitdelta.set_num_threads(n)
    assert bitdelta.get_num_threads() == n


@pytest.mark.parametrize("n", [0, -1, 1025, 10**20])
def test_numbers_out_of_range_are_refused(n):
    with pytest.raises(ValueError, match="n: expected 1 to 1024"):
        bitdelta.set_num_threads(n)


@pytest.mark.parametrize("n", [1.5, "2", [2]])
def test_what_is_no_whole_number_is_refused(n):
    with pytest.raises(TypeError, match="n: expected a whole number"):
        bitdelta.set_num_threads(n)


def python(script, **environment):
    """Runs a script in an interpreter of its own, without this one's BITDELTA_ variables; its output's words."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BITDELTA_NUM")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_environment_sets_the_number_and_a_call_overrides_it():
    script = (
        "import bitdelta; print(bitdelta.get_num_threads());"
        "bitdelta.set_num_threads(2); print(bitdelta.get_num_threads());"
        "bitdelta.set_num_threads(None); print(bitdelta.get_num_threads())"
    )
    assert python(script, BITDELTA_NUM_THREADS="3") == ["3", "2", "3"]


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5", "4096"])
def test_a_wrong_environment_is_an_error_that_names_it(monkeypatch, text):
    bitdelta.set_num_threads(None)
    monkeypatch.setenv("BITDELTA_NUM_THREADS", text)
    monkeypatch.setattr(threads, "_machine", 0)
    with pytest.raises(ValueError, match=f"BITDELTA_NUM_THREADS: expected .* 1024, got '{text}'"):
        bitdelta.get_num_threads()


def test_an_empty_variable_is_none():
    assert int(python("import bitdelta; print(bitdelta.get_num_threads())", BITDELTA_NUM_THREADS="")[0]) >= 1


def test_the_setting_of_torch_holds_once_it_is_loaded_and_whenever_it_changes():
    script = (
        "import bitdelta, sys, numpy; n = bitdelta.get_num_threads(); print('torch' in sys.modules)\n"
        "import torch\n"
        "for n in (3, 1, 2):\n"
        "    torch.set_num_threads(n)\n"
        "    bitdelta.extract(numpy.zeros((2, 2), 'f'), numpy.ones((2, 2), 'f'))\n"
        "    print(bitdelta._C.get_num_threads())\n"
    )
    assert python(script) == ["False", "3", "1", "2"]
    assert python(script, BITDELTA_NUM_THREADS="5") == ["False", "5", "5", "5"]


def test_a_module_torch_that_is_still_loading_is_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    bitdelta.set_num_threads(None)
    assert bitdelta.get_num_threads() == threads.default_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_is_respected():
    one = min(os.sched_getaffinity(0))
    script = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); import bitdelta; print(bitdelta.get_num_threads())"
    )
    assert python(script) == ["1"]


def test_the_quota_bounds_the_number(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for quota, n in ((None, 64), (0.3, 1), (2.0, 2), (2.5, 3), (1000.0, 64)):
        monkeypatch.setattr(threads, "cgroup_quota", lambda quota=quota: quota)
        assert threads.default_count() == n


# cgroups


def cgroup(tmp_path, text, files):
    (tmp_path / "cgroup").write_text(text)
    for name, content in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return threads.cgroup_quota(str(tmp_path / "cgroup"), str(tmp_path / "fs"))


V1 = "5:devices:/a\n4:cpu,cpuacct:/a/b\n1:name=systemd:/a\n"


@pytest.mark.parametrize(
    "text, files, quota",
    [
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5, id="v2"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, None, id="v2 without a limit"),
        pytest.param(
            "0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0, id="v2 parent"
        ),
        pytest.param("0::/gone/b\n", {"cpu.max": "300000 100000"}, 3.0, id="v2 container"),
        pytest.param("0::/../b\n", {"cpu.max": "300000 100000", "b/cpu.max": "1 1"}, 3.0, id="v2 outside"),
        pytest.param("0::/\n", {}, None, id="v2 root"),
        pytest.param("0::/a\n", {"a/cpu.max": "what is this"}, None, id="v2 unreadable"),
        pytest.param("0::/a\n", {"a/cpu.max": "100000 0"}, None, id="v2 no period"),
        pytest.param(
            V1,
            {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"},
            2.5,
            id="v1",
        ),
        pytest.param(
            V1, {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5, id="v1 parent"
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
            id="v1 without a limit",
        ),
        pytest.param(
            V1 + "0::/a\n",
            {"unified/a/cpu.max": "max 1", "cpu/cpu.cfs_quota_us": "8", "cpu/cpu.cfs_period_us": "4"},
            2.0,
            id="both",
        ),
        pytest.param("nonsense\n::\n", {}, None, id="nonsense"),
    ],
)
def test_the_quota_is_the_least_of_the_group_and_its_parents(tmp_path, text, files, quota):
    assert cgroup(tmp_path, text, files) == quota


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert threads.cgroup_quota(str(tmp_path / "none"), str(tmp_path)) is None


# the same results


@pytest.fixture
def work(rng):
    """A product of some milliseconds whose delta part is exact, and its result on one thread."""
    base, finetuned = pair(rng, 700, 1500)
    deltas = [bitdelta.extract(base, finetuned, planes) for planes in (1, 2)]
    x = rng.normal(size=(6, 1500)).astype(np.float32)
    ids = np.array([0, 1, -1, 1, 0, 1])

    def compute():
        y = bitdelta.linear(x, base, deltas, ids)
        d = bitdelta.extract(base, finetuned, 2)
        g = bitdelta.linear_transposed(y, deltas, ids)
        return y.tobytes() + d.sign.tobytes() + d.scale.tobytes() + g.tobytes()

    bitdelta.set_num_threads(1)
    expected = compute()
    bitdelta.set_num_threads(4)
    return compute, expected


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_the_number_of_threads_changes_no_bit(work, n):
    compute, expected = work
    bitdelta.set_num_threads(n)
    assert compute() == expected


def in_child(compute):
    """What compute() returns in a forked child; a child that hangs is ended by its alarm, and gives nothing."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks is the point
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(compute())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "the child hung or crashed"
    return data


def test_a_forked_child_computes_the_same_and_so_does_its_child(work):
    compute, expected = work
    assert compute() == expected  # the pool's threads run now
    assert in_child(compute) == expected
    assert in_child(lambda: in_child(compute)) == expected
    assert compute() == expected


def test_a_child_may_set_its_own_number(work):
    compute, expected = work
    compute()

    def child():
        bitdelta.set_num_threads(2)
        return compute()

    assert in_child(child) == expected
    assert bitdelta.get_num_threads() == 4


def run_together(*functions):
    """Runs them in threads of their own; raises what one of them raised."""
    failures = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    started = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(120)
        assert not thread.is_alive(), "a thread hung"
    if failures:
        raise failures[0]


def test_many_python_threads_at_once_get_equal_results(work):
    compute, expected = work

    def repeat():
        for _ in range(5):
            assert compute() == expected

    run_together(*[repeat] * 8)


def test_the_number_may_change_during_calls(work):
    compute, expected = work
    is_done = threading.Event()

    def repeat():
        for _ in range(10):
            assert compute() == expected

    def change():
        n = 0
        while not is_done.wait(0.001):
            n = n % 6 + 1
            bitdelta.set_num_threads(n)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        run_together(*[repeat] * 3)
    finally:
        is_done.set()
        changer.join()


def test_a_fork_while_another_thread_computes_gives_a_child_that_works(work):
    compute, expected = work
    is_done = threading.Event()

    def busy():
        while not is_done.is_set():
            compute()

    def fork():
        try:
            for _ in range(8):
                assert in_child(compute) == expected
        finally:
            is_done.set()

    run_together(busy, busy, fork)


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_idle_threads_of_torch_sleep_unless_the_user_says_otherwise(monkeypatch, before, after):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if before:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    threads.let_torch_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == after
