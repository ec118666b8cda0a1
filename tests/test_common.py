"""common.py: checkpoints that survive anything, the log and state of a run, optimizers."""

import json
import math
import os
import re
import signal
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch

import common
from common import Loop, Muon, Stopped, UserError, orthogonal
from tokenizer import VQConfig, VQModel

TINY = dict(
    image_size=16,
    patch=2,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    kernel=3,
    attention=True,
    norm_groups=4,
    z_channels=8,
    codebook_size=16,
    codebook_dim=4,
)


@pytest.fixture
def vq():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return VQModel(VQConfig(**TINY)).eval()


# --- checkpoints


def saved(vq, path, **changes):
    common.save_weights(path, vq.state_dict(), config=vars(vq.cfg) | changes)
    return path


def test_a_checkpoint_comes_back_bit_for_bit(vq, tmp_path):
    again = common.load_module(saved(vq, tmp_path / "t.safetensors"), VQModel, VQConfig)
    assert again.cfg == vq.cfg and not again.training
    assert list(vq.state_dict()) == list(again.state_dict())
    for a, b in zip(vq.state_dict().values(), again.state_dict().values(), strict=True):
        assert a.equal(b) and a.dtype == b.dtype


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    """Optimizer states and Janus weights hold more than fp32; a scalar and an empty tensor too."""
    numbers = torch.arange(6).view(2, 3)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
    tensors = {str(dtype): numbers.to(dtype) for dtype in (*dtypes, torch.uint8, torch.bool)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    common.save_weights(tmp_path / "x.safetensors", tensors)
    again, _ = common.load_weights(tmp_path / "x.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].equal(tensor) and again[name].dtype == tensor.dtype
        assert common.read_tensor(tmp_path / "x.safetensors", name).equal(tensor)


def test_metadata_comes_back(tmp_path):
    common.save_weights(tmp_path / "x", {"a": torch.ones(2)}, step=7, note={"ä": [1, None]})
    assert common.load_weights(tmp_path / "x")[1] == {"step": 7, "note": {"ä": [1, None]}}


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors: no such checkpoint"):
        common.load_module(tmp_path / "nowhere.safetensors", VQModel, VQConfig)


def test_weights_that_others_have_saved_can_be_read(tmp_path):
    """Every safetensors file of Hugging Face says {"format": "pt"}, the real weights too."""
    whole = safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"})
    (tmp_path / "t.safetensors").write_bytes(whole)
    assert common.load_weights(tmp_path / "t.safetensors")[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_a_user_error(vq, tmp_path, keep):
    path = saved(vq, tmp_path / "t.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="t.safetensors: not a whole checkpoint"):
        common.load_module(path, VQModel, VQConfig)


def test_a_pickle_is_never_opened(vq, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"weights": vq.state_dict(), "trap": Trap()}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        common.load_weights(tmp_path / "t.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_weights_that_do_not_fit_are_all_listed(vq):
    tensors = vq.state_dict()
    del tensors["quant_conv.bias"], tensors["encoder.conv_in.weight"]
    tensors |= {"extra.weight": torch.ones(1), "post_quant_conv.bias": torch.ones(3)}
    before = {name: tensor.clone() for name, tensor in vq.state_dict().items()}
    with pytest.raises(UserError) as error:
        common.load_strictly(vq, tensors, "some.safetensors")
    for part in (
        "some.safetensors",
        "missing quant_conv.bias",
        "missing encoder.conv_in.weight",
        "unexpected extra.weight",
        "post_quant_conv.bias is (3,), should be (8,)",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    # nothing was half loaded
    assert all(before[name].equal(tensor) for name, tensor in vq.state_dict().items())


def test_a_checkpoint_of_another_size_is_a_user_error(vq, tmp_path):
    """The weights of one size under the config of another."""
    path = saved(vq, tmp_path / "t.safetensors", codebook_size=32)
    wrong = re.escape("quantize.embedding.weight is (16, 4), should be (32, 4)")
    with pytest.raises(UserError, match=wrong):
        common.load_module(path, VQModel, VQConfig)


def test_a_checkpoint_of_another_kind_is_a_user_error(tmp_path):
    common.save_weights(tmp_path / "t.safetensors", {"a": torch.ones(1)}, config={"n_embd": 3})
    with pytest.raises(UserError, match="metadata lacks .*image_size"):
        common.load_module(tmp_path / "t.safetensors", VQModel, VQConfig)


# --- files


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, broken):
    path = tmp_path / "t.safetensors"
    common.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(UserError, match="t.safetensors.*No space left on device"):
        common.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_save_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    common.write_atomically(tmp_path / "x", b"old")
    common.write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be saved"):
        common.write_atomically(tmp_path / "nowhere" / "x", b"new")


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file.*cannot be made a folder"):
        common.make_folder(tmp_path / "file" / "below")
    common.make_folder(tmp_path / "a" / "b")
    common.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_json_goes_there_and_back(tmp_path):
    value = {"a": [1, None, 0.1], "ä": "ö"}
    common.write_json(tmp_path / "x.json", value)
    assert common.read_json(tmp_path / "x.json", "a test") == value


BROKEN_JSON = {"line": b'{\n"a": oops}', "bytes": b"\xff\xfe\x00", "empty": b""}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_json_that_cannot_be_read_is_one_line(tmp_path, kind):
    (tmp_path / "x.json").write_bytes(BROKEN_JSON[kind])
    with pytest.raises(UserError, match="x.json: ") as error:
        common.read_json(tmp_path / "x.json", "a test")
    assert "\n" not in str(error.value)


def test_a_folder_in_place_of_a_json_file_is_named(tmp_path):
    with pytest.raises(UserError, match="is a folder, should be a JSON file"):
        common.read_json(tmp_path, "a test")


def test_the_first_few_problems_are_listed_and_all_are_counted():
    assert common.first_few(["a", "b"]) == "a; b"
    listed = common.first_few([str(i) for i in range(9)], most=3)
    assert listed == "0; 1; 2; and 6 more (9 in all)"


# --- devices


def test_a_device_that_is_not_here_is_one_line():
    assert common.pick_device("cpu") == torch.device("cpu")
    assert common.pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            common.pick_device("cuda")


def test_bf16_is_asked_for_or_comes_with_cuda():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    used = [common.uses_bf16(d, device) for d in ("fp32", "bf16", "auto") for device in (cpu, cuda)]
    assert used == [False, False, True, True, False, True]


# --- randomness and learning rates


@dataclass
class Settings:
    out: str
    seed: int = 0
    steps: int = 6
    warmup: int = 2
    decay: float = 0.5
    lr: float = 0.1
    judge: str = ""
    microbatch: int = 0


def test_the_randomness_of_a_step_follows_from_seed_stage_and_step_alone():
    def drawn(seed, stage, step):
        rng, generator = common.step_random(Settings("", seed), stage, step)
        return *rng.random(3).tolist(), *torch.rand(3, generator=generator).tolist()

    assert drawn(0, "ppo", 7) == drawn(0, "ppo", 7)
    others = [drawn(1, "ppo", 7), drawn(0, "pretrain", 7), drawn(0, "ppo", 8)]
    assert len({drawn(0, "ppo", 7), *others}) == 4


def test_the_learning_rate_rises_stays_and_falls():
    cfg = Settings("", steps=10, warmup=4, decay=0.5)
    shares = [common.schedule(cfg, step) for step in range(10)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    constant = Settings("", steps=3, warmup=0, decay=0.0)
    assert [common.schedule(constant, step) for step in range(3)] == [1, 1, 1]


# --- the loop


def train_line(folder, resume=False, stop=None, **changes):
    """Six steps of a line through random points, logged and saved like a stage. stop(step,
    after_step) may fail, before or after the optimizer's step."""
    cfg = Settings(str(folder), **changes)
    torch.manual_seed(0)
    line = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(line.parameters(), lr=cfg.lr)
    with Loop("ppo", cfg, resume) as loop:
        usage = torch.zeros(1)
        loop.start({"model": line}, [optimizer], {"usage": usage})
        for step in loop:
            rng, _ = common.step_random(cfg, "ppo", step)
            points = torch.from_numpy(rng.random((4, 2))).float()
            if stop:
                stop(step, False)
            loss = (line(points) - points.sum(1, keepdim=True)).square().mean()
            loss.backward()
            loop.optimizer_step(step)
            usage += 1
            if stop:
                stop(step, True)
            loop.log(step, loss=loss)
        common.save_weights(folder / "ppo.safetensors", line.state_dict() | {"usage": usage})
        loop.finish()
    return (folder / "ppo.safetensors").read_bytes()


def fail_at(step, after_step):
    """A judge that is gone in one step, before or after the optimizer's."""

    def stop(*now):
        if now == (step, after_step):
            raise UserError("the judge is gone")

    return stop


def logged(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: entry[key] for key in ("step", "loss")} for entry in entries]


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    return train_line(tmp_path / "whole"), logged(tmp_path / "whole")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_finished_stage_leaves_weights_log_and_config_but_no_state(whole, tmp_path):
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {"ppo.safetensors", "log.jsonl", "config.json"}
    assert [entry["step"] for entry in whole[1]] == list(range(6))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["ppo"]
    assert config["lr"] == 0.1 and config["torch"] == torch.__version__


def test_a_step_that_fails_before_the_weights_move_is_repeated(whole, folder):
    """A judge that is gone, an image that cannot be read: the same for every stage, in one place.
    The run ends with its state saved, and resumed ends with the bits of one never stopped."""
    says = "ppo, step 3: the judge is gone. .*ppo.state of step 3 is intact.*--resume"
    with pytest.raises(UserError, match=says):
        train_line(folder, stop=fail_at(3, False))
    assert train_line(folder, resume=True) == whole[0]
    assert logged(folder) == whole[1]


def test_memory_that_is_full_loses_nothing_and_a_smaller_microbatch_goes_on(whole, folder):
    """An OutOfMemoryError saved nothing, and --resume refused the very flag that would have helped:
    the run could not go on with less memory."""

    def full(step, after_step):
        if (step, after_step) == (3, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text")

    says = "ppo, step 3: out of memory; go on with a smaller --microbatch.*of step 3 is intact"
    with pytest.raises(UserError, match=says) as error:
        train_line(folder, stop=full)
    assert "\n" not in str(error.value)
    assert train_line(folder, resume=True, microbatch=2) == whole[0]
    assert logged(folder) == whole[1]


def test_memory_that_is_full_before_the_first_step_is_one_line(folder):
    def full(step, after_step):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match="out of memory; go on with a smaller --microbatch"):
        with Loop("ppo", Settings(str(folder)), resume=False):
            full(0, False)


def test_a_step_that_fails_after_the_weights_moved_is_not_saved(folder):
    """Half of a step is no state: what was saved before counts, or the run starts again."""
    with pytest.raises(UserError, match="ppo, step 3: the judge is gone. Nothing was saved yet"):
        train_line(folder, stop=fail_at(3, True))
    assert not (folder / "ppo.state").exists()


def test_a_later_failure_leaves_the_state_before_it(whole, folder):
    with pytest.raises(UserError, match="of step 2 is intact"):
        train_line(folder, stop=fail_at(2, False))
    with pytest.raises(UserError, match="ppo, step 4: .*of step 2 is intact"):
        train_line(folder, resume=True, stop=fail_at(4, True))
    assert train_line(folder, resume=True) == whole[0]
    assert logged(folder) == whole[1]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_log_line_that_a_kill_cut_short_does_not_stop_the_resumption(whole, folder, cut):
    """A line cut right behind a nested object ends in "}" like a whole one, and --resume ended in a
    JSONDecodeError."""
    with pytest.raises(UserError):
        train_line(folder, stop=fail_at(3, False))
    line = json.dumps({"stage": "ppo", "step": 3, "test": {"heldout": {"s_g": 0.5}}, "loss": 1.0})
    with open(folder / "log.jsonl", "a") as f:
        f.write(line[:line.index("}") + 1] if cut == 1 else line[:cut])
    assert train_line(folder, resume=True) == whole[0]
    assert logged(folder) == whole[1]


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(whole, folder):
    def press(step, after_step):
        if (step, after_step) == (2, False):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped after step 3 of ppo; nothing is lost.*--resume"):
        train_line(folder, stop=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert common.load_weights(folder / "ppo.state")[1]["step"] == 3
    assert train_line(folder, resume=True) == whole[0]
    assert logged(folder) == whole[1]


def test_ctrl_c_pressed_again_ends_at_once(folder):
    def press(step, after_step):
        if (step, after_step) == (2, False):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_line(folder, stop=press)


def test_an_unfinished_run_is_neither_overwritten_nor_forgotten(folder):
    with pytest.raises(UserError):
        train_line(folder, stop=fail_at(3, False))
    before = (folder / "ppo.state").read_bytes()
    with pytest.raises(UserError, match="unfinished run; add --resume"):
        train_line(folder)
    assert (folder / "ppo.state").read_bytes() == before


def test_a_run_goes_on_with_its_own_settings_only(whole, folder):
    """A run that goes on with another learning rate is neither run; a server may have moved."""
    judge = "http://here:8000/v1#qwen"
    with pytest.raises(UserError):
        train_line(folder, stop=fail_at(3, False), judge=judge)
    with pytest.raises(UserError, match=r"other settings \(--lr 0.1 -> 0.2\)"):
        train_line(folder, resume=True, judge=judge, lr=0.2)
    with pytest.raises(UserError, match="--judge .*#qwen -> .*#other"):
        train_line(folder, resume=True, judge="http://here:8000/v1#other")
    assert train_line(folder, resume=True, judge="http://there:9000/v1#qwen") == whole[0]


def test_a_gradient_that_is_not_finite_stops_before_the_weights(folder):
    with pytest.raises(UserError, match="ppo, step 1: the gradient's norm is nan; start again"):
        cfg = Settings(str(folder))
        line = torch.nn.Linear(1, 1)
        with Loop("ppo", cfg, False) as loop:
            loop.start({"model": line}, [torch.optim.SGD(line.parameters(), lr=cfg.lr)])
            for step in loop:
                weight = line.weight.item()
                line(torch.tensor([[1.0, math.nan][step]])).sum().backward()
                loop.optimizer_step(step)
    assert line.weight.item() == weight
    assert not (folder / "ppo.state").exists()


# --- optimizers


def test_matrices_decay_and_vectors_do_not():
    linear = torch.nn.Linear(3, 3)
    optimizer = common.adamw(linear.parameters(), 0.1, 0.5)
    decays = {}
    for group in optimizer.param_groups:
        decays |= {tuple(p.shape): group["weight_decay"] for p in group["params"]}
    assert decays == {(3, 3): 0.5, (3,): 0.0}


def test_muon_is_the_librarys_in_bf16_and_orthogonal_in_fp32():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (20, 20), (16, 48)]  # two of a shape: multiplied at once
    ours = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    our_muon = Muon(ours, 0.1, 0.01, torch.bfloat16)
    their_muon = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        our_muon.step()
        their_muon.step()
    assert all(a.equal(b) for a, b in zip(ours, theirs))
    for shape in shapes:
        values = torch.linalg.svdvals(orthogonal(torch.randn(2, *shape), torch.float32))
        assert 0.4 < values.min() and values.max() < 1.3
