"""torchrun: 1, 2 and 4 processes train the same run, resume each other's states, and end together.

All processes are on this machine and speak over the loopback address."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from common import UserError, load_weights
from test_train import NEEDS, ROOT, copy_of, log_of

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                            "CUDA_VISIBLE_DEVICES": ""}
# train.py, which ends with the last state, were it worse than the base.
SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
import common, train
train.BestState.finish = lambda self, step, base: (1.0, 0.6)
{change}
try:
    train.main(sys.argv[1:])
except common.UserError as e:
    sys.exit("error: " + str(e))
"""
STOPS = """
step = common.Loop.optimizer_step
def stop(self, at):
    self.interrupted = at == 2
    return step(self, at)
common.Loop.optimizer_step = stop
"""
SAVES_ALWAYS = """
common.SAVE_SECONDS, common.SAVE_SHARE = 0, 1e9
log = common.Loop.log
common.Loop.log = lambda *a, **k: (log(*a, **k), time.sleep(0.3))
open(sys.argv.pop() + os.environ["RANK"], "w").write(str(os.getpid()))
"""
JUDGE_GONE = """
submit, calls = train.submit, []
def gone(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise common.UserError("the judge is gone")
    return submit(*args)
train.submit = gone
"""


@pytest.fixture
def command(tmp_path):
    """command(n, *args, change="") -> that of n processes of SCRIPT."""
    def command_of(n, *args, change=""):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), change=change))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                    "--nproc-per-node", str(n)]
        return [sys.executable, *(torchrun if n > 1 else []), str(script), *map(str, args)]
    return command_of


@pytest.fixture
def run(command):
    def run(n, *args, ok=True, **change):
        done = subprocess.run(command(n, *args, **change), capture_output=True, text=True,
                              cwd=ROOT, env=ENVIRONMENT, timeout=120)
        assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-3000:]
        return done
    return run


FLAGS = {
    "pretrain": ["--muon-lr", 0, "--steps", 5],
    "ppo": ["--minibatches", 1, "--steps", 5, "--eval-every", 2, "--eval-pairs", 2, "--lr", 1e-3,
            "--ground-truth", 2, 4, 5, "--guidance", 2],
}
FLAGS = {stage: ["--stage", stage, "--preset", "smoke", "--device", "cpu", *map(str, flags)]
         for stage, flags in FLAGS.items()}
FLAGS["adapter"] = [*FLAGS["ppo"], "--lora", "4"]


@pytest.fixture(scope="module")
def alone(smoke, tmp_path_factory):
    """{one of FLAGS: the folder of one process' run}."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.BestState, "finish", lambda self, step, base: (1.0, 0.6))
        for name, flags in FLAGS.items():
            out = tmp_path_factory.mktemp(name) / "one"
            runs[name] = copy_of(smoke, out, *NEEDS[stage_of(name)])
            torch.set_num_threads(1)
            train.main([*flags, "--out", str(out)])
    return runs


def stage_of(name):
    return FLAGS[name][1]


def same_run(stage, out, expected):
    """Weights and log figures agree within 1e-5 of their size."""
    ours, theirs = (load_weights(folder / f"{stage}.safetensors")[0] for folder in (out, expected))
    assert ours.keys() == theirs.keys()
    ours, theirs = (torch.cat([tensors[name].flatten() for name in tensors])
                    for tensors in (ours, theirs))
    if stage == "ppo":                  # the base model, or an adapter's start, has changed
        base = load_weights(expected / "pretrain.safetensors")[0]
        assert any(x.any() if k.endswith(".up") else not x.equal(base.get(k, x))
                   for k, x in load_weights(expected / "ppo.safetensors")[0].items())
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    for one, other in zip(log_of(out, stage), log_of(expected, stage), strict=True):
        one, other = (numbers(entry) for entry in (one, other))
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def numbers(entry, prefix=""):
    """A nested log entry -> {name: number}."""
    found = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


# The gate has ten minutes: what other cases cover too runs with ALL_PROCESSES=1.
LONG = pytest.mark.skipif("ALL_PROCESSES" not in os.environ, reason="wants ALL_PROCESSES=1")
CASES = [pytest.param(2, "pretrain", 0, marks=LONG), (4, "ppo", 0), (2, "pretrain", 1),
         pytest.param(2, "ppo", 1, marks=LONG), (2, "adapter", 0)]


@pytest.mark.parametrize("n, name, shard", CASES)
def test_n_processes_train_the_run_of_one(smoke, alone, run, tmp_path, n, name, shard):
    stage = stage_of(name)
    out = copy_of(smoke, tmp_path / "run", *NEEDS[stage])
    done = run(n, *FLAGS[name], "--shard", shard, "--out", out)
    same_run(stage, out, alone[name])
    assert done.stdout.count(f"{stage}: done in") == 1              # one process speaks
    assert done.stdout.count("curves: ") == (stage == "ppo")
    kept = {path.name for path in out.iterdir()}
    assert kept == {path.name for path in alone[name].iterdir()}


@pytest.mark.parametrize("first, then", [((2, 1), (1, 0)), ((1, 0), (2, 1))])
def test_another_number_of_processes_resumes(smoke, alone, run, tmp_path, first, then):
    """(processes, --shard): a state says nothing of how many have saved it."""
    out = copy_of(smoke, tmp_path / "run", *NEEDS["ppo"])
    done = run(first[0], *FLAGS["ppo"], "--shard", first[1], "--out", out, ok=False, change=STOPS)
    assert done.stderr.count("nothing is lost") == 1, done.stderr[-3000:]
    run(then[0], *FLAGS["ppo"], "--shard", then[1], "--out", out, "--resume")
    same_run("ppo", out, alone["ppo"])


def said(stderr):
    return [line for line in stderr.splitlines() if "error: " in line]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=LONG), 1])
def test_a_killed_process_ends_all(smoke, alone, command, run, tmp_path, victim):
    """SIGKILL to one: the other says one line, nothing hangs, and what was saved goes on."""
    out = copy_of(smoke, tmp_path / "run", *NEEDS["ppo"])
    words = command(2, *FLAGS["ppo"], "--out", out, tmp_path / "pid", change=SAVES_ALWAYS)
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 100
    while not ((out / "log.jsonl").exists() and len(log_of(out, "ppo")) >= 3):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[victim], signal.SIGKILL)
    began = time.time()
    _, stderr = process.communicate(timeout=60)
    assert time.time() - began < 30 and process.returncode != 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    (line,) = said(stderr)
    assert "another process of this run has ended" in line and "--resume" in line
    run(1, *FLAGS["ppo"], "--out", out, "--resume")
    same_run("ppo", out, alone["ppo"])


def test_a_judge_that_one_process_cannot_reach_ends_all(smoke, run, tmp_path):
    out = copy_of(smoke, tmp_path / "run", *NEEDS["ppo"])
    words = *FLAGS["ppo"], "--out", out, tmp_path / "pid"
    (line,) = said(run(2, *words, ok=False, change=SAVES_ALWAYS + JUDGE_GONE).stderr)
    assert "ppo, step 2: the judge is gone" in line
    assert load_weights(out / "ppo.state")[1]["step"] == 2


@pytest.mark.parametrize("argv, says", [
    (["--stage", "tokenizer"], "stage tokenizer is for one process"),
    (["--stage", "ppo"], "stage tokenizer is for one process: train it first, without torchrun"),
    (["--stage", "ppo", "--pairs", "5", "--minibatches", "1"], "be a multiple of --minibatches 1"),
    (["--stage", "pretrain", "--batch", "25"], "--batch 25: should be a multiple of 2 processes"),
    (["--stage", "pretrain", "--shard", "1"], "with --muon-lr 0"),
    (["--stage", "ppo", "--shard", "1", "--lora", "4"], "and without --lora"),
])
def test_what_several_processes_refuse(argv, says, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(train, "world", lambda: (0, 2))
    with pytest.raises(UserError, match=says) as error:
        stage, resume, cfg, preset = train.parse([*argv, "--preset", "smoke",
                                                  "--out", str(tmp_path / "run")])
        train.make_folder(cfg.out)
        train.train_stages(stage, cfg, preset, resume)
    assert "\n" not in str(error.value)


def test_without_torchrun_nothing_is_split(tmp_path):
    with pytest.raises(UserError, match="--shard 1: should go with several processes of torchrun"):
        train.parse(["--stage", "ppo", "--shard", "1"])
    assert list(range(8))[train.share(8)] == list(range(8))
