"""Why a run ended, from the lines that launchers, frameworks and schedulers leave."""

from __future__ import annotations

import pytest

from ray_train_geo.observe.log_failures import Ending, EndingReader

TRACEBACK = "Traceback (most recent call last):"
TORCHRUN = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "


def ending(*lines: str) -> Ending | None:
    reader = EndingReader()
    for line in lines:
        if line == "ITERATION":
            reader.iteration()
        else:
            reader.line(line)
    return reader.ending


def reason(*lines: str) -> str:
    found = ending(*lines)
    assert found is not None
    return found.reason


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 15.78 GiB",
         "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 15.78 GiB"),
        ("[rank3]: torch.OutOfMemoryError: HIP out of memory.",
         "out of memory: OutOfMemoryError: HIP out of memory."),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1.0.",
         "out of memory: oom-kill event(s) in StepId=1.0."),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
         "out of memory: can't allocate memory: you tried"),
        ("RuntimeError: NCCL error in: /opt/x.cpp:1191, unhandled system error, NCCL version 2.1",
         "communication: NCCL error in: /opt/x.cpp:1191, unhandled system error, NCCL version 2.1"),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600 s",
         "communication: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for"
         " 600 s"),
        ("ncclRemoteError: A call failed possibly due to a network error",
         "communication: ncclRemoteError: A call failed possibly due to a network error"),
        ("slurmstepd: error: *** JOB 18 ON r8i3n1 CANCELLED AT 2021-05-23T08:45:57 ***",
         "cancelled by Slurm"),
        ("slurmstepd: error: *** STEP 1.0 ON n CANCELLED AT 2021-05-24T09:50:34 DUE TO TIME LIMIT"
         " ***", "cancelled by Slurm due to time limit"),
        ("slurmstepd: error: *** JOB 9 ON hpc CANCELLED DUE TO PREEMPTION ***",
         "cancelled by Slurm due to preemption"),
        ("  traceback : Signal 9 (SIGKILL) received by PID 8158", "killed by SIGKILL"),
        ("  exitcode  : -11 (pid: 8158)", "killed by SIGSEGV"),
        ("ERROR:torch.distributed.elastic:failed (exitcode: -9) local_rank: 0 (pid: 9)",
         "killed by SIGKILL"),
        ("[ERROR] [launch.py:341:sigkill_handler] ['python', 'x'] exits with return code = -9",
         "killed by SIGKILL"),
        ("exits with return code = 1", "exit code 1"),
        ("Exception: process 3 terminated with signal SIGSEGV", "killed by SIGSEGV"),
        ("subprocess.CalledProcessError: Command 'x' died with <Signals.SIGKILL: 9>.",
         "killed by SIGKILL"),
        ("Main process received SIGTERM, exiting", "killed by SIGTERM"),
        ("srun: error: r7i1n0: task 3: Killed", "killed by SIGKILL"),
        ("srun: error: r7i1n0: tasks 0-3,7: Exited with exit code 2", "exit code 2"),
        ("run.sh: line 12: 12345 Killed                  python pretrain.py", "killed by SIGKILL"),
        ("Segmentation fault (core dumped)", "killed by SIGSEGV"),
        ("Killed", "killed by SIGKILL"),
        ("srun: error: node: task 0: Exited with exit code 137", "killed by SIGKILL"),
        ("exits with return code = -99", "killed by signal 99"),
    ],
)  # fmt: skip
def test_one_line_says_it(line: str, says: str) -> None:
    found = ending(line)
    assert found == Ending("stopped" if "Slurm" in says else "failed", says)


@pytest.mark.parametrize(
    "line",
    [
        "iteration 7 was fine",
        "r1i0n1:1:1 [0] NCCL INFO comm 0x5 rank 2 nranks 16 - Init COMPLETE",
        "  max_tokens_to_oom ............................... 12000",
        "exits with return code = 0",
        "srun: error: n: task 0: Exited with exit code 0",
        "ValueError: of a library that went on without a traceback",
        "Killing subprocess 16342",
        "the memory of it; Killed time",
        "export NCCL_ASYNC_ERROR_HANDLING=1",
    ],
)
def test_no_failure(line: str) -> None:
    assert ending(line) is None


@pytest.mark.parametrize("prefix", ["", "[rank0]: ", "[default3]:", "12: ", "> ", "[2024] [7] "])
def test_an_exception_is_what_stands_below_its_traceback(prefix: str) -> None:
    lines = [TRACEBACK, '  File "x.py", line 3, in f', "    except KeyError:", "ValueError: no"]
    assert reason(*(prefix + line for line in lines)) == "ValueError: no"


def test_an_exception_by_its_full_name_and_without_words() -> None:
    assert reason(TRACEBACK, "torch.distributed.DistBackendError: x") == (
        "torch.distributed.DistBackendError: x"
    )
    assert reason(TRACEBACK, "KeyboardInterrupt") == "KeyboardInterrupt"
    assert reason(TRACEBACK, "  File") == "a traceback without its end"


def test_long_reasons_are_cut() -> None:
    found = reason(TRACEBACK, "ValueError: " + "very " * 100)
    assert len(found) == 160
    assert found.endswith("...")


def test_the_first_is_the_cause() -> None:
    lines = [TRACEBACK, "ValueError: a", "NCCL error in: b", "exits with return code = 1"]
    assert reason(*lines) == "ValueError: a"
    assert reason(*lines[2:], *lines[:2]).startswith("communication: NCCL error in: b")


def test_memory_is_the_cause_wherever_it_stands() -> None:
    oom = "torch.OutOfMemoryError: CUDA out of memory."
    assert reason("NCCL error in: b", TRACEBACK, oom).startswith("out of memory")


def test_sigterm_waits_for_who_sent_it() -> None:
    terminated = "Main process received SIGTERM, exiting"
    slurm = "slurmstepd: error: *** JOB 1 ON n CANCELLED AT 2021-05-24T09:50:34 ***"
    assert ending(terminated, terminated, slurm) == Ending("stopped", "cancelled by Slurm")
    assert ending(slurm, terminated) == Ending("stopped", "cancelled by Slurm")
    assert reason(terminated, "innocent") == "killed by SIGTERM"


def test_torchruns_own_error_says_nothing() -> None:
    assert reason(TRACEBACK, TORCHRUN, "  exitcode  : -9 (pid: 1)") == "killed by SIGKILL"


def test_what_an_iteration_survived_is_no_failure() -> None:
    assert ending(TRACEBACK, "ImportError: no apex", "ITERATION") is None
    assert ending("CUDA out of memory.", "ITERATION", "bye") is None
    assert reason("CUDA out of memory", "ITERATION", TRACEBACK, "OSError: x") == "OSError: x"
