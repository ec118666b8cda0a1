"""Fixtures of several files."""
import os
import resource

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch is imported: two test at once


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One smoke run, all four stages from nothing, which tests look at and copy from."""
    from test_train import run
    out = tmp_path_factory.mktemp("smoke") / "run"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run("train.py", "--stage", "ppo", "--preset", "smoke", "--out", out)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (out / "cpu_seconds").write_text(str(seconds))
    return out
