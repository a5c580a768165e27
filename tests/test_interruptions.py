"""Killed, interrupted, on a full disk, twice at once: a packed delta is whole or not there, and nothing is lost."""

import errno
import importlib
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from folders import changed, weights, write_checkpoint

from bitdelta.checkpoint import open_checkpoint
from bitdelta.compress import compress
from bitdelta.errors import Error
from bitdelta.merge import merge
from bitdelta.packfile import load
from bitdelta.packfile_writer import PackfileWriter

module = importlib.import_module("bitdelta.compress")  # the package's attribute of this name is the function

# counts the calls that change the disk, and kills the process at one of them
KILLED = """
import os, signal, sys
from bitdelta.compress import compress
base, finetuned, out, last, planes = sys.argv[1:]
calls = 0
def counted(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
for name in ("write", "fsync", "rename", "unlink", "ftruncate", "mkdir", "posix_fallocate"):
    setattr(os, name, counted(getattr(os, name)))
compress(base, finetuned, out, planes=int(planes))
sys.stdout.write(str(calls))
"""


@pytest.fixture
def pair(tmp_path, rng):
    before = {f"layers.{i}.weight": weights(rng, (40 + i, 300)) for i in range(6)}
    before |= {"norm.weight": weights(rng, (300,)), "same.weight": weights(rng, (50,))}
    after = {name: changed(rng, weight) for name, weight in before.items()}
    after["same.weight"] = before["same.weight"]
    base = write_checkpoint(tmp_path / "base", before)
    return base, write_checkpoint(tmp_path / "finetuned", after, {"new": 1}, n_shards=2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(pair, out, last, planes=1):
    command = [sys.executable, "-c", KILLED, *map(str, pair), str(out), str(last), str(planes)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def clean(tmp_path, pair):
    compress(*pair, tmp_path / "clean")
    return contents(tmp_path / "clean")


def counted_extractions(monkeypatch):
    calls = []
    real = module.extract_with_checksum

    def extract(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module, "extract_with_checksum", extract)
    return calls


def test_killed_at_any_call_it_leaves_nothing_that_looks_whole_and_the_next_run_ends_the_same(
    tmp_path, pair, clean
):
    total = int(killed(pair, tmp_path / "counted", 0).stdout)
    assert contents(tmp_path / "counted") == clean
    points = sorted({1, 2, 3, total // 4, total // 2, 3 * total // 4, *range(total - 8, total + 1)})
    for last in points:
        out = tmp_path / f"delta{last}"
        assert killed(pair, out, last).returncode == -signal.SIGKILL
        if out.exists():  # killed after the rename
            assert contents(out) == clean
            continue
        partial = tmp_path / f".{out.name}.partial"
        if partial.exists():
            try:
                load(partial)
            except Error:
                pass
            else:  # it lacks nothing but its name
                assert contents(partial) == clean
        compress(*pair, out)
        assert contents(out) == clean, last
        assert not (tmp_path / f".{out.name}.partial").exists()


def half_done(tmp_path, pair, out, n_tensors=4):
    """A partial folder in which about this many tensors are finished."""
    journal = tmp_path / f".{out.name}.partial" / "journal"
    for last in range(10, 200, 3):
        if out.exists():
            break
        killed(pair, out, last)
        if journal.is_file() and journal.read_bytes().count(b"\n") > n_tensors:
            return journal.parent
    raise AssertionError("never half done")


def test_a_second_run_takes_over_what_is_finished(tmp_path, pair, clean, monkeypatch):
    half_done(tmp_path, pair, tmp_path / "delta")
    calls = counted_extractions(monkeypatch)
    compress(*pair, tmp_path / "delta")
    assert 0 < len(calls) <= 3 and contents(tmp_path / "delta") == clean


@pytest.mark.parametrize("file", ["signs-1", "rest-1"])
def test_what_the_disk_lost_of_a_partial_folder_is_made_again(tmp_path, pair, clean, file, monkeypatch):
    partial = half_done(tmp_path, pair, tmp_path / "delta")
    raw = bytearray((partial / file).read_bytes())
    raw[-1 if file == "rest-1" else 3000] ^= 1
    (partial / file).write_bytes(raw)
    compress(*pair, tmp_path / "delta")
    assert contents(tmp_path / "delta") == clean


def test_a_torn_journal_is_read_as_far_as_it_goes(tmp_path, pair, clean):
    partial = half_done(tmp_path, pair, tmp_path / "delta")
    raw = (partial / "journal").read_bytes()
    (partial / "journal").write_bytes(raw[:-30] + b"\0" * 20 + b"\n")
    compress(*pair, tmp_path / "delta")
    assert contents(tmp_path / "delta") == clean


def test_other_options_start_anew(tmp_path, pair, monkeypatch):
    half_done(tmp_path, pair, tmp_path / "delta")
    calls = counted_extractions(monkeypatch)
    compress(*pair, tmp_path / "delta", planes=2)
    assert len(calls) == 6
    compress(*pair, tmp_path / "clean", planes=2)
    assert contents(tmp_path / "delta") == contents(tmp_path / "clean")


def test_an_input_that_changed_meanwhile_starts_anew(tmp_path, pair, monkeypatch):
    half_done(tmp_path, pair, tmp_path / "delta")
    tensor = open_checkpoint(pair[1])["layers.0.weight"]
    with open(tensor.path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\0\0")
    calls = counted_extractions(monkeypatch)
    compress(*pair, tmp_path / "delta")
    compress(*pair, tmp_path / "clean")
    assert len(calls) == 12 and contents(tmp_path / "delta") == contents(tmp_path / "clean")


def test_killed_again_and_again_at_random_it_ends_the_same(tmp_path, rng):
    before = {f"layers.{i}.weight": weights(rng, (512, 1024)) for i in range(24)}
    after = {name: changed(rng, weight) for name, weight in before.items()}
    pair = (write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "finetuned", after))
    compress(*pair, tmp_path / "clean", planes=4)
    chance = random.Random(5)
    command = [sys.executable, "-c", KILLED, *map(str, pair), str(tmp_path / "delta"), "0", "4"]
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / ".delta.partial").exists():
                time.sleep(chance.random() * 0.1)
                break
            time.sleep(0.001)
        process.kill()
        process.wait()
        if (tmp_path / "delta").exists():
            break
    else:
        compress(*pair, tmp_path / "delta", planes=4)
    assert contents(tmp_path / "delta") == contents(tmp_path / "clean")


def test_an_exception_leaves_nothing(tmp_path, pair, monkeypatch):
    def interrupt(*arguments):
        if len(os.listdir(tmp_path / ".delta.partial")):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "extract_with_checksum", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(*pair, tmp_path / "delta")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]


def test_two_writers_of_one_target_do_not_meet(tmp_path, pair, clean):
    base = open_checkpoint(pair[0])
    with PackfileWriter(tmp_path / "delta", base) as writer:
        with pytest.raises(Error, match="another process is writing it now"):
            compress(*pair, tmp_path / "delta")
        for name in base:
            writer.add(name, None)
    first = contents(tmp_path / "delta")
    with pytest.raises(FileExistsError):
        compress(*pair, tmp_path / "delta")
    assert contents(tmp_path / "delta") == first
    assert not list(tmp_path.glob(".*"))


def test_many_processes_at_once_give_one_whole_result(tmp_path, pair, clean):
    command = [sys.executable, "-c", KILLED, *map(str, pair), str(tmp_path / "delta"), "0", "1"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    ends = [process.communicate(timeout=120) and process.returncode for process in running]
    assert 0 in ends and contents(tmp_path / "delta") == clean
    assert not list(tmp_path.glob(".*"))


def fail_after(monkeypatch, n_calls, number=errno.ENOSPC):
    real, calls = os.write, []

    def write(descriptor, data):
        calls.append(len(data))
        if len(calls) > n_calls:
            raise OSError(number, os.strerror(number))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("n_calls", [0, 1, 5, 12])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_is_a_clear_error_and_leaves_nothing(tmp_path, pair, monkeypatch, n_calls, number):
    fail_after(monkeypatch, n_calls, number)
    with pytest.raises(OSError) as caught:
        compress(*pair, tmp_path / "delta")
    assert caught.value.errno == number
    if number != errno.EIO:
        assert "nothing was written" in str(caught.value) and "delta" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]


def test_a_merge_that_fails_leaves_nothing(tmp_path, pair, monkeypatch):
    compress(*pair, tmp_path / "delta")
    fail_after(monkeypatch, 3)
    with pytest.raises(OSError, match="nothing was written"):
        merge(pair[0], tmp_path / "delta", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


def test_too_little_space_is_said_before_anything_is_computed(tmp_path, pair, monkeypatch):
    from bitdelta import folder

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, .* has 1,000 free") as caught:
        compress(*pair, tmp_path / "delta")
    assert caught.value.errno == errno.ENOSPC


def test_what_a_dead_writer_holds_counts_as_free(tmp_path, pair, clean, monkeypatch):
    from bitdelta import folder

    partial = half_done(tmp_path, pair, tmp_path / "delta")
    held = sum(path.stat().st_blocks for path in partial.iterdir()) * 512
    assert held > 10_000
    usage = type("Usage", (), {"free": 4000})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage)
    compress(*pair, tmp_path / "delta")
    assert contents(tmp_path / "delta") == clean


DIES = """
import os, sys
from bitdelta.checkpoint import open_checkpoint
from bitdelta.packfile_writer import PackfileWriter
base = open_checkpoint(sys.argv[1])
with PackfileWriter(sys.argv[2], base, key="k", max_shard_bytes=40_000) as writer:
    print(len(writer.entries))
    for name in list(base)[len(writer.entries) :]:
        writer.add(name, base[name].array())
        if len(writer.entries) == int(sys.argv[3]):
            while writer._pending:
                writer._pending.popleft().result()
            os._exit(9)
"""


def test_shards_are_taken_over_too(tmp_path, pair):
    def dies(out, count):
        command = [sys.executable, "-c", DIES, str(pair[0]), str(tmp_path / out), str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=120)
        return done.returncode, done.stdout.strip()

    assert dies("clean", 0) == (0, "0")
    assert len(list((tmp_path / "clean").glob("delta_model-*.safetensors"))) > 2
    for count in (2, 3, 7):
        dies("delta", count)
    assert dies("delta", 0) == (0, "7")
    assert contents(tmp_path / "delta") == contents(tmp_path / "clean")


def test_a_file_size_limit_is_a_clear_error(tmp_path, pair):
    script = KILLED.replace(
        "calls = 0", "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\ncalls = 0"
    )
    command = [sys.executable, "-c", script, *map(str, pair), str(tmp_path / "delta"), "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "File too large; nothing was written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "finetuned"]


def test_a_full_file_system_is_a_clear_error(tmp_path, pair, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        monkeypatch.setattr(module, "refuse_full", lambda *arguments: None)
        with pytest.raises(OSError, match="No space left on device"):
            compress(*pair, small / "delta")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_target_that_cannot_be_made_is_an_error(tmp_path, pair):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        compress(*pair, tmp_path / "file" / "delta")
    assert (tmp_path / "file").read_text() == "mine"


MEMORY = """
import sys, threading
from bitdelta.compress import compress
from bitdelta.merge import merge
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024
base, finetuned, out, scale = sys.argv[1:]
compress(base, finetuned, out + "-first", scale=scale)  # what is loaded once, is loaded
start, most, done = anonymous(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.0005):
        most = max(most, anonymous())
thread = threading.Thread(target=watch)
thread.start()
compress(base, finetuned, out, scale=scale)
compressed = most - start
merge(base, out, out + "-merged")
done.set()
thread.join()
print(compressed, most - start)
"""


@pytest.mark.parametrize("scale", ["row", "rank1"])
def test_memory_beyond_the_page_cache_is_less_than_three_of_the_largest_tensor(tmp_path, rng, scale):
    before = {f"layers.{i}.weight": rng.standard_normal((2048, 2048), np.float32) for i in range(4)}
    after = {name: weight + np.float32(0.01) for name, weight in before.items()}
    largest = 2048 * 2048 * 4
    write_checkpoint(tmp_path / "base", before)
    write_checkpoint(tmp_path / "finetuned", after)
    arguments = [tmp_path / "base", tmp_path / "finetuned", tmp_path / "delta", scale]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    compressed, merged = map(int, done.stdout.split())
    assert compressed < 3 * largest and merged < 3 * largest
    if scale == "row":
        assert compressed < largest  # a sixteenth of a tensor, three times; the rest is the allocator's


def test_no_descriptor_stays_open(tmp_path, pair):
    def is_open():
        return len(os.listdir("/proc/self/fd"))

    compress(*pair, tmp_path / "first")
    before = is_open()
    for i in range(3):
        compress(*pair, tmp_path / f"delta{i}")
        merge(pair[0], tmp_path / f"delta{i}", tmp_path / f"merged{i}")
    assert is_open() <= before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > before
