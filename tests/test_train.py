"""The scripts as a user runs them: the whole way in small, killed and resumed, and everything that can be typed wrong."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from config import NEEDS, PPO, PRESETS, STAGES, Pretrain
from data import UserError, write_pairs
from pairworld import CATEGORIES, pairworld, shown_in
from runs import load_policy
from loop import Muon, orthogonal
from model import prompt_divergence
from ppo import ORIGINS
from tokenizer import load_weights, save_weights

ROOT = Path(__file__).parents[1]


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def run(script, *args, ok=True):
    done = subprocess.run(command(script, *args), capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One smoke run, all four stages from nothing, which the tests below look at and copy from."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    run("train.py", "--stage", "ppo", "--preset", "smoke", "--out", out)
    return out


def wait_for(condition, process):
    """Until a running script has come so far; its death or a minute ends the test instead of hanging it."""
    deadline = time.time() + 60
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)


def copy_of(smoke, folder, *stages):
    """A run folder in which the given stages are trained already."""
    folder.mkdir()
    for stage in stages:
        shutil.copy(smoke / f"{stage}.safetensors", folder)
    return folder


def test_smoke_run_leaves_all_that_the_contract_names(smoke):
    for name in ["tokenizer", "pretrain", "reward", "ppo"]:
        assert (smoke / f"{name}.safetensors").exists() and not (smoke / f"{name}.state").exists()
    for name in ["config.json", "log.jsonl", "paircomp.json", "samples/before_after.png"]:
        assert (smoke / name).stat().st_size > 0
    report = json.loads((smoke / "paircomp.json").read_text())
    for policy in ("base", "ppo"):
        for judge in ("train", "heldout", "oracle"):
            assert 0 <= report[policy][judge]["average"]["s_g"] <= report[policy][judge]["average"]["s_a"] <= 1
        assert 0 <= report[policy]["pair_accuracy"]["average"] <= 1
    steps = [e for e in map(json.loads, (smoke / "log.jsonl").read_text().splitlines()) if e["stage"] == "ppo"]
    assert [e["step"] for e in steps] == list(range(len(steps)))
    assert not {"grad_norm_of", "kl_of"} & {key for e in steps for key in e}        # which are of ground truth, and there was none
    assert {"reward", "reward_std", "kl", "entropy", "clipfrac", "approx_kl", "grad_norm", "frac_zero_std", "truth_probability"} <= set(steps[0])
    assert json.loads((smoke / "config.json").read_text())["ppo"]["steps"] == len(steps)
    every, n_pairs = PRESETS["smoke"]["ppo"]["eval_every"], len(CATEGORIES) * PRESETS["smoke"]["ppo"]["eval_pairs"]
    assert [e["step"] for e in steps if "test" in e] == list(range(0, len(steps), every))
    assert report["curve"] == [{"step": e["step"], **e["test"]} for e in steps if "test" in e]
    assert report["config"] | {"torch": torch.__version__} == json.loads((smoke / "config.json").read_text())["ppo"]
    for policy in ("base", "ppo"):
        assert [np.shape(report[policy]["pairs"][judge]) for judge in ("train", "heldout", "oracle")] == [(n_pairs, 4)] * 3
        assert list(report[policy]["divergence_auc"]) == [*CATEGORIES, "average"]
    assert [list(report["ppo"]["change"][where]) for where in ("inside", "outside")] == [[*CATEGORIES, "average"]] * 2


def test_smoke_run_takes_less_than_a_minute(smoke):
    """The four loops by their own clocks, which the start of python and the load of the machine touch least: 60 s are promised in all."""
    last = {e["stage"]: e["seconds"] for e in map(json.loads, (smoke / "log.jsonl").read_text().splitlines()) if "step" in e}
    assert set(last) == set(STAGES) and sum(last.values()) < 60


STAGE_FLAGS = {  # short stages that save often, so that a kill lands between two saves
    "tokenizer": ["--steps", 40, "--unquantized", 12],
    "pretrain": ["--steps", 40],
    "reward": ["--steps", 16],
    "ppo": ["--steps", 12, "--eval-every", 100, "--eval-pairs", 1, "--lr", 3e-3, "--difference", 0.5, "--truth-full-until", 2,
            "--truth-low-at", 4, "--truth-zero-at", 9],
}


@pytest.mark.parametrize("stage", list(STAGE_FLAGS))
def test_killed_and_resumed_ends_bitwise_equal(smoke, tmp_path, stage):
    """SIGKILL, which no handler sees, at a moment nobody chose; then --resume. The weights must have the same bits as those of a run
    that was left alone: the state holds the optimizer, and every random choice follows from (seed, stage, step)."""
    args = ["--stage", stage, "--preset", "smoke", "--save-every", 3, *STAGE_FLAGS[stage]]
    whole = copy_of(smoke, tmp_path / "whole", *NEEDS[stage])
    run("train.py", *args, "--out", whole)
    killed = copy_of(smoke, tmp_path / "killed", *NEEDS[stage])
    process = subprocess.Popen(command("train.py", *args, "--out", killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((killed / f"{stage}.state").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / f"{stage}.safetensors").exists(), "the run ended before it could be killed"
    assert load_weights(killed / f"{stage}.state")[1]["step"] >= 3
    with pytest.raises(UserError, match="--resume"):                    # nothing is thrown away by asking again
        train.main([*map(str, args), "--out", str(killed)])
    run("train.py", *args, "--out", killed, "--resume")
    assert (killed / f"{stage}.safetensors").read_bytes() == (whole / f"{stage}.safetensors").read_bytes()
    logs = [[e for e in map(json.loads, (f / "log.jsonl").read_text().splitlines()) if "step" in e] for f in (whole, killed)]
    assert [{k: v for k, v in e.items() if k != "seconds"} for e in logs[0]] == [{k: v for k, v in e.items() if k != "seconds"} for e in logs[1]]


ARMS = {  # what the weights are made of: the other settings of an arm
    "model": ["--difference-on", "choice", "--reward", "product"],
    "shuffled": ["--no-truth-twin", "--no-truth-counted"],
    "mask": ["--reward", "margin", "--truth-floor", 0, "--advantage", "group"],
    "random": ["--guidance", 2, "--epochs", 2],
}


@pytest.mark.parametrize("source", list(ARMS))
def test_a_difference_aware_arm_stopped_and_resumed_ends_bitwise_equal(smoke, tmp_path, monkeypatch, source):
    """On the base model of another run: ground truth from the second rollout on, shaped; a reward for the choice; weights from each source."""
    monkeypatch.setattr(train, "draw_curves", lambda out: out)
    args = [str(a) for a in ["--stage", "ppo", "--preset", "smoke", "--base", smoke, "--device", "cpu", "--n-pairs", 60, "--steps", 3, "--pairs", 2, "--samples", 3,
                             "--eval-every", 2, "--eval-pairs", 1, "--quick-pairs", 1, "--truth-start", 1, "--truth-full-until", 5, "--truth-low-at", 6,
                             "--truth-zero-at", 7, "--truth-shape", 0.1, "--choice", 1, "--difference", 0.5, "--difference-from", source, *ARMS[source]]]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main([*args, "--out", str(whole)])
    for stage in NEEDS["ppo"]:
        assert (whole / f"{stage}.safetensors").read_bytes() == (smoke / f"{stage}.safetensors").read_bytes()
    assert (whole / "ppo.safetensors").read_bytes() != (whole / "pretrain.safetensors").read_bytes()

    real, calls = train.difference_of, []
    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == 2:                                             # in the second rollout, which is ended still
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(train, "difference_of", press_ctrl_c)
    with pytest.raises(UserError, match="stopped after step 2"):
        train.main([*args, "--out", str(stopped)])
    train.main([*args, "--out", str(stopped), "--resume"])
    assert len(calls) == 3 and (stopped / "ppo.safetensors").read_bytes() == (whole / "ppo.safetensors").read_bytes()

    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, stopped)]
    for entry in sum(logs, []):
        del entry["seconds"]
    assert logs[0] == logs[1] and [e["truth_probability"] for e in logs[0]] == [0, 1, 1]
    assert [("test" in e, "grad_norm_of" in e, "kl_of" in e) for e in logs[0]] == [(True, False, False), (False, False, True), (True, True, True)]
    origins = [name for name in ORIGINS if name != "twin_truth" or source != "shuffled"]
    for of, least in (("grad_norm_of", 1e-9), ("kl_of", 0)):
        assert list(logs[0][2][of]) == origins and all(least <= value < 10 for value in logs[0][2][of].values())


@torch.no_grad()
def test_where_the_weights_come_from(smoke):
    """D_t of the model, and its controls: the same values elsewhere, the oracle's cells, 30 % of the tokens."""
    vq, policy = load_policy(smoke, "pretrain", "cpu")
    pairs = pairworld(4, "train", 0)
    pictures, tokens = pairs.images.reshape(-1, 32, 32, 3).repeat(2, 0), train.encode_pairs(vq, pairs, "cpu").unsqueeze(2).expand(-1, -1, 2, -1)
    ids = train.tokens_of(pairs.texts(), policy.cfg.n_text, "cpu").view(4, 2, 1, -1).expand(-1, -1, 2, -1)
    empty = train.tokens_of([None], policy.cfg.n_text, "cpu")

    def weights_from(source):
        cfg = PPO(samples=2, difference_from=source)
        return train.difference_of(cfg, policy, empty, ids, tokens, pictures, pairs.prompts, torch.Generator().manual_seed(0))
    model, shuffled, mask, random = map(weights_from, ("model", "shuffled", "mask", "random"))
    assert model.shape == shuffled.shape == mask.shape == random.shape == (16, 64)
    assert model[2].equal(prompt_divergence(policy, ids[0, 1, :1], ids[0, 0, :1], tokens[0, 1, :1])[0])
    assert shuffled.sort(-1)[0].equal(model.sort(-1)[0]) and not any(a.equal(b) for a, b in zip(shuffled, model))
    assert mask.equal(torch.from_numpy(shown_in(pictures, [two for two in pairs.prompts for _ in range(4)], 8)).flatten(1).float())
    assert set(random.flatten().tolist()) == {0, 1} and 0.25 < random.mean() < 0.35


def test_gradient_norms_are_of_what_each_origin_adds():
    policy, x, origin = torch.nn.Linear(1, 1, bias=False), torch.tensor([1.0, -3, 5, 7]), torch.tensor([0, 1, 0, 1])
    loss_of = lambda rows: policy(x[rows, None]).mean()
    assert train.gradient_norms(policy, loss_of, origin) == pytest.approx({"sampled": 1.5, "own_truth": 1.0})       # of 6 and 4, a mean over 4
    assert policy.weight.grad is None


def test_a_base_that_lacks_a_stage_is_refused(smoke, tmp_path):
    base = copy_of(smoke, tmp_path / "base", "tokenizer", "pretrain")
    with pytest.raises(UserError, match="--base .*base: has no reward.safetensors"):
        train.main(["--stage", "ppo", "--preset", "smoke", "--base", str(base), "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="--base nowhere: has no tokenizer.safetensors"):
        train.main(["--stage", "ppo", "--preset", "smoke", "--base", "nowhere", "--out", str(tmp_path / "run")])


def test_a_base_does_not_replace_other_weights(smoke, tmp_path):
    out = copy_of(smoke, tmp_path / "run", "tokenizer", "pretrain")
    tensors, meta = load_weights(out / "pretrain.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] * 2
    save_weights(out / "pretrain.safetensors", tensors, **meta)
    before = (out / "pretrain.safetensors").read_bytes()
    with pytest.raises(UserError, match="pretrain.safetensors is there already and another; choose another --out"):
        train.main(["--stage", "ppo", "--preset", "smoke", "--base", str(smoke), "--out", str(out)])
    assert (out / "pretrain.safetensors").read_bytes() == before and not (out / "ppo.state").exists()


def test_ctrl_c_says_how_to_go_on(smoke, tmp_path):
    out = copy_of(smoke, tmp_path / "run", "tokenizer")
    process = subprocess.Popen(command("train.py", "--stage", "pretrain", "--preset", "smoke", "--steps", 5000, "--out", out), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text(), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and "--resume" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert load_weights(out / "pretrain.state")[1]["step"] >= 1


def test_own_pairs_go_through_every_stage(tmp_path):
    """A folder in the FocusDiff-Data layout, with unpaired prompts mixed in, takes the same path as the embedded pairs."""
    write_pairs(pairworld(40, "train", 3), tmp_path / "data")
    (tmp_path / "prompts.txt").write_text("three red circles\nein Hund im Schnee\n", encoding="utf-8")
    common = ["--preset", "smoke", "--data", tmp_path / "data" / "pairs.json", "--out", tmp_path / "run"]
    run("train.py", "--stage", "tokenizer", *common)
    run("train.py", "--stage", "pretrain", *common)
    run("train.py", "--stage", "reward", *common)
    run("train.py", "--stage", "ppo", "--prompts", tmp_path / "prompts.txt", "--prompts-share", 0.5, "--advantage", "group", *common)
    assert (tmp_path / "run" / "ppo.safetensors").exists()


def test_a_broken_picture_loses_nothing(smoke, tmp_path, monkeypatch):
    """Pictures are opened when a batch has them, so that a broken one is found in the middle of a run: it ends with its state saved, and with the
    picture mended ends with the bits of one that was never stopped."""
    write_pairs(pairworld(20, "train", 3), tmp_path / "data")
    picture = tmp_path / "data" / "images" / "00007_1.png"
    args = ["--stage", "pretrain", "--preset", "smoke", "--data", str(tmp_path / "data" / "pairs.json"), "--steps", "4", "--batch", "4", "--device", "cpu"]
    whole, stopped = copy_of(smoke, tmp_path / "whole", "tokenizer"), copy_of(smoke, tmp_path / "stopped", "tokenizer")
    train.main([*args, "--out", str(whole)])
    real, opened = train.PairSet.load_rows, []

    def load(self, rows):
        opened.append(rows)
        if len(opened) == 3:
            good = picture.read_bytes()
            picture.write_bytes(good[:40])
            try:
                return real(self, np.array([14]))
            finally:
                picture.write_bytes(good)
        return real(self, rows)
    monkeypatch.setattr(train.PairSet, "load_rows", load)
    with pytest.raises(UserError, match="pretrain, step 2: .*00007_1.png: cannot be read as an image.*pretrain.state of step 2 is intact"):
        train.main([*args, "--out", str(stopped)])
    train.main([*args, "--out", str(stopped), "--resume"])
    assert (whole / "pretrain.safetensors").read_bytes() == (stopped / "pretrain.safetensors").read_bytes()


def test_muon_is_the_librarys_in_bf16_and_orthogonal_in_fp32():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (20, 20)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = Muon(ours, 0.1, 0.01, torch.bfloat16), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(a.equal(b) for a, b in zip(ours, theirs))
    for shape in shapes:
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), torch.float32))
        assert 0.4 < values.min() and values.max() < 1.3


def test_sample_draws_a_prompt_and_a_pair(smoke, tmp_path):
    for n, prompts in ((1, ["three red circles"]), (2, ["three red circles", "two red circles"])):
        picture = tmp_path / f"{n}.png"
        sample.main(["--run", str(smoke), *[w for p in prompts for w in ("--prompt", p)], "--n", "2", "--out", str(picture)])
        assert picture.stat().st_size > 500


def test_no_stage_lists_the_stages(capsys):
    train.main([])
    out = capsys.readouterr().out
    assert all(stage in out for stage in STAGES)


@pytest.mark.parametrize("stage", list(STAGES))
def test_help_lists_every_flag_of_a_stage(stage, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", stage, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(f"--{name.replace('_', '-')}" in out for name in STAGES[stage].__dataclass_fields__)


@pytest.mark.parametrize("args, says", [
    (["--stage", "ppo", "--sample", "3"], "did you mean --samples"),
    (["--stage", "ppo", "--lr", "fast"], "invalid float value: 'fast'"),
    (["--stage", "pp0"], "invalid choice: 'pp0'"),
    (["--lr", "1"], "say which stage"),
    (["--stage", "ppo", "--samples", "2", "--truth-full-until", "1", "--truth-low-at", "1", "--truth-zero-at", "1"], "should be at least 3, since ground truth"),
    (["--stage", "ppo", "--data", "x", "--heldout-judge", "http://h:1/v1"], "has nothing to test on with --data"),
    (["--stage", "ppo", "--advantage", "critic"], "should be one of pair, group"),
    (["--stage", "ppo", "--reward", "sum"], "should be one of own, .*product, margin, shared"),
    (["--stage", "ppo", "--difference-on", "reward"], "should be one of all, choice"),
    (["--stage", "ppo", "--difference-from", "noise"], "should be one of model, shuffled, mask, random"),
    (["--stage", "reward", "--base", "runs/tiny"], "unknown flag --base for stage reward"),
    (["--stage", "ppo", "--pairs", "5", "--minibatches", "2"], "should divide"),
    (["--stage", "tokenizer", "--steps", "0"], "should be positive"),
    (["--stage", "ppo", "--quick-pairs", "0"], "--quick-pairs 0: should be positive"),
    (["--stage", "ppo", "--truth-full-until", "50"], "should rise in this order"),
    (["--stage", "pretrain", "--n-embd", "130"], "should be a multiple of 8"),
    (["--stage", "tokenizer", "--seed", "-1"], "should be at least 0"),
    (["--stage", "tokenizer", "--data", "nowhere.json"], "nowhere.json: no such file"),
])
def test_what_is_typed_wrong_is_one_line(args, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        train.main([*args, "--out", str(tmp_path / "run")] if "--stage" in args else args)
    assert "\n" not in str(error.value)


def test_errors_leave_with_one_line_and_a_status(tmp_path):
    (tmp_path / "pairs.json").write_text('[{"prompt1": "a",\n oops')
    done = run("train.py", "--stage", "tokenizer", "--data", tmp_path / "pairs.json", "--out", tmp_path / "run", ok=False)
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "line 2" in done.stderr and "Traceback" not in done.stderr


def test_a_truncated_checkpoint_is_named(smoke, tmp_path):
    out = copy_of(smoke, tmp_path / "run", "tokenizer", "pretrain", "reward")
    whole = (out / "pretrain.safetensors").read_bytes()
    (out / "pretrain.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="pretrain.safetensors: not a whole checkpoint"):
        train.main(["--stage", "ppo", "--preset", "smoke", "--out", str(out)])


def test_a_model_of_another_tokenizer_is_refused(smoke, tmp_path):
    out = copy_of(smoke, tmp_path / "run", "tokenizer", "pretrain", "reward")
    tensors, meta = load_weights(out / "pretrain.safetensors")
    meta["config"]["image_vocab"] += 1
    tensors["gen_embed.weight"] = torch.cat([tensors["gen_embed.weight"], tensors["gen_embed.weight"][:1]])
    for name in ("gen_head.2.weight", "gen_head.2.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_weights(out / "pretrain.safetensors", tensors, **meta)
    with pytest.raises(UserError, match="codes"):
        train.main(["--stage", "ppo", "--preset", "smoke", "--out", str(out)])


def test_a_loss_that_is_not_finite_stops_before_the_weights(smoke, tmp_path):
    out = copy_of(smoke, tmp_path / "run", "tokenizer")
    with pytest.raises(UserError, match="pretrain, step .*smaller --lr"):
        train.main(["--stage", "pretrain", "--preset", "smoke", "--lr", "1e30", "--muon-lr", "0", "--out", str(out)])
    assert not (out / "pretrain.safetensors").exists()


def test_a_full_disk_loses_nothing(smoke, tmp_path, monkeypatch):
    """The state of step 5 is on disk when the disk fills up at step 10: it must still be whole, and the run goes on from it."""
    out, calls = copy_of(smoke, tmp_path / "run", "tokenizer"), []
    real = os.fsync

    def full(fd):
        calls.append(fd)
        if len(calls) > 3:                                              # log.jsonl, config.json, the state of step 5
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    args = ["--stage", "pretrain", "--preset", "smoke", "--save-every", "5", "--out", str(out)]
    with pytest.raises(UserError, match="No space left on device"):
        train.main(args)
    monkeypatch.undo()
    assert load_weights(out / "pretrain.state")[1]["step"] == 5 and not list(out.glob("*.tmp"))
    train.main([*args, "--resume"])
    assert (out / "pretrain.safetensors").exists()


def test_resuming_with_other_settings_is_refused(smoke, tmp_path):
    """A run that goes on with another learning rate is neither run; the message lists what differs."""
    out = copy_of(smoke, tmp_path / "run", "tokenizer")
    process = subprocess.Popen(command("train.py", "--stage", "pretrain", "--preset", "smoke", "--steps", 5000, "--save-every", 2, "--out", out), cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for((out / "pretrain.state").exists, process)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match=f"--lr {Pretrain().lr} -> 0.5"):
        train.main(["--stage", "pretrain", "--preset", "smoke", "--steps", "5000", "--lr", "0.5", "--out", str(out), "--resume"])
    assert json.loads((out / "config.json").read_text())["pretrain"]["lr"] == Pretrain().lr


def test_a_finished_stage_is_not_overwritten(smoke):
    before = (smoke / "ppo.safetensors").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        train.main(["--stage", "ppo", "--preset", "smoke", "--out", str(smoke)])
    assert (smoke / "ppo.safetensors").read_bytes() == before
