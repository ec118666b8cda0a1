"""extras/lora.py: the adapter alone is trained and saved; without it there is the base model."""
import json

import pytest
import torch

import train
from common import load_weights, save_weights
from eval_paircomp import main as evaluate
from extras.cuda_graph import sampling_copy
from extras.lora import Adapted, load_adapter, merged, with_adapter
from model import ImageModel, ModelConfig, generate, load_policy, score
from test_train import copy_of, log_of, stopped_in

STAGES = "tokenizer", "pretrain", "reward"
EMPTY = torch.tensor([[1, 2]])
PROMPTS = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0], [1, 5, 8, 2, 0]])
CFG = ModelConfig(text_vocab=12, image_vocab=16, n_text=8, n_image=8, n_layer=2, n_head=2,
                  n_embd=32, n_ffn=48, code_dim=8)


def base_model():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ImageModel(CFG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


def tokens():
    return torch.randint(16, (3, 8), generator=torch.Generator().manual_seed(1))


def trained_some(model, steps, lr):
    """The losses of some steps on random tokens."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = -score(model, PROMPTS, tokens())[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_new_adapter_changes_no_bit_and_holds_no_second_model():
    base = base_model()
    model = with_adapter(base, 4)
    for guidance in (1.0, 3.0):
        ours, theirs = (score(m, PROMPTS, tokens(), EMPTY, guidance) for m in (model, base))
        assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
    drawn = [generate(m, PROMPTS, EMPTY, 2, 3.0, generator=torch.Generator().manual_seed(2))
             for m in (model, base)]
    assert drawn[0][0].equal(drawn[1][0]) and drawn[0][1].equal(drawn[1][1])
    own = dict(model.named_parameters())
    for name, p in base.named_parameters():
        assert own[name].data_ptr() == p.data_ptr() and not own[name].requires_grad
    adapted = [m for m in model.modules() if isinstance(m, Adapted)]
    linear = [m for m in base.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(adapted) == len(linear) == 8         # all linear layers of two layers


def test_training_moves_the_adapter_alone():
    base = base_model()
    before = {name: p.clone() for name, p in base.named_parameters()}
    scores = score(base, PROMPTS, tokens())[0].detach()
    model = with_adapter(base, 4)
    losses = trained_some(model, 10, 1e-2)
    assert losses[-1] < losses[0] - 0.1
    assert all(p.equal(before[name]) for name, p in base.named_parameters())
    assert score(base, PROMPTS, tokens())[0].equal(scores)          # still the reference


def test_at_full_rank_it_learns_what_full_training_learns():
    """The loss of 20 steps falls by as much, within a tenth, as when the same matrices are trained
    themselves."""
    full = base_model()
    for name, p in full.named_parameters():
        p.requires_grad_(name.startswith("layers") and p.dim() == 2)
    whole = trained_some(full, 20, 1e-2)
    adapter = trained_some(with_adapter(base_model(), CFG.n_embd), 20, 1e-2)
    assert whole[0] == adapter[0] and whole[0] - whole[-1] > 0.5
    assert (whole[0] - adapter[-1]) / (whole[0] - whole[-1]) == pytest.approx(1, abs=0.1)


def test_merged_weights_are_the_adapter_switched_on():
    base = base_model()
    model = with_adapter(base, 4)
    trained_some(model, 10, 1e-2)
    one = ImageModel(CFG)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    one.load_state_dict(merged(base.state_dict(), adapter))
    ours, theirs = (score(m, PROMPTS, tokens())[0] for m in (model, one))
    assert (ours - theirs).abs().max() < 1e-5
    assert not theirs.allclose(score(base, PROMPTS, tokens())[0], atol=1e-2)


def test_a_graph_samples_with_the_adapter():
    """The copy that a CUDA graph is captured of shares it, and follows its training."""
    model = with_adapter(base_model(), 4)
    copy = sampling_copy(model)
    trained_some(model, 5, 1e-2)
    assert score(copy, PROMPTS, tokens())[0].equal(score(model, PROMPTS, tokens())[0])
    assert not any(p.requires_grad for p in copy.parameters())


def test_a_run_with_an_adapter(smoke, tmp_path, monkeypatch):
    """train, stop, resume, test: the state and ppo.safetensors hold the adapter and no weight, and
    the policy that they are loaded as is the one that was trained."""
    argv = ["--stage", "ppo", "--preset", "smoke", "--lora", "4", "--lr", "1e-2", "--device", "cpu"]
    whole, stopped = (copy_of(smoke, tmp_path / name, *STAGES) for name in ("whole", "stopped"))
    # The last state, were it worse than the base.
    monkeypatch.setattr(train.BestState, "finish", lambda self, step, base: (1.0, 1.0))
    train.main([*argv, "--out", str(whole)])
    with stopped_in(2):
        train.main([*argv, "--out", str(stopped)])
    names = load_weights(stopped / "ppo.state")[0]
    assert all(name.endswith((".down", ".up", ".exp_avg", ".exp_avg_sq", ".step", "|scores",
                              "|rollouts", "|lr_share")) for name in names)
    train.main([*argv, "--out", str(stopped), "--resume"])
    assert log_of(whole) == log_of(stopped)
    assert (whole / "ppo.safetensors").read_bytes() == (stopped / "ppo.safetensors").read_bytes()

    adapter, metadata = load_weights(whole / "ppo.safetensors")
    assert metadata["lora"] == 4 and all(name.endswith((".down", ".up")) for name in adapter)
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if name.endswith(".up"))
    _, base = load_policy(whole, "pretrain", "cpu")
    _, policy = load_policy(whole, "ppo", "cpu")
    again = load_adapter(base, whole / "ppo.safetensors")
    ids = policy.prompt_ids(["one red circle"])
    codes = torch.zeros(1, policy.cfg.n_image, dtype=torch.long)
    assert score(policy, ids, codes)[0].equal(score(again, ids, codes)[0])
    assert not score(policy, ids, codes)[0].equal(score(base, ids, codes)[0])
    evaluate(["--run", str(whole), "--n", "1", "--device", "cpu"])
    assert json.loads((whole / "config.json").read_text())["ppo"]["lora"] == 4


def test_a_run_that_ends_with_its_base_has_an_adapter_of_zeros(smoke, tmp_path):
    out = copy_of(smoke, tmp_path / "run", *STAGES)
    argv = ["--stage", "ppo", "--preset", "smoke", "--lora", "2", "--lr", "0", "--device", "cpu"]
    train.main([*argv, "--steps", "1", "--out", str(out)])
    _, base = load_policy(out, "pretrain", "cpu")
    _, policy = load_policy(out, "ppo", "cpu")
    ids = policy.prompt_ids(["one red circle"])
    codes = torch.zeros(1, policy.cfg.n_image, dtype=torch.long)
    assert score(policy, ids, codes)[0].equal(score(base, ids, codes)[0])


def test_an_adapter_that_does_not_fit_is_one_line(tmp_path):
    base = base_model()
    save_weights(tmp_path / "ppo.safetensors", {"layers.9.mlp.down_proj.up": torch.zeros(2)},
                 lora=2)
    with pytest.raises(train.UserError, match="unexpected layers.9.mlp.down_proj.up"):
        load_adapter(base, tmp_path / "ppo.safetensors")
