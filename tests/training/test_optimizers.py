import pytest
import torch

from speculators_core.training import device, optimizers
from speculators_core.training.optimizers import Muon, MuonAdamW
from tests.conftest import SMALL_RECIPES, make_draft, make_eagle3, make_verifier


def trained(optimizer, model, steps):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight in model.parameters()]


def test_matrices_take_muon_and_the_rest_adamw():
    verifier = make_verifier()
    model = make_eagle3(verifier, embed_requires_grad=True)
    muon, adamw = MuonAdamW(model, 1e-2).parts
    of_muon = {id(w) for group in muon.param_groups for w in group["params"]}
    of_adamw = {id(w) for group in adamw.param_groups for w in group["params"]}
    assert id(model.fc.weight) in of_muon
    assert id(model.layers[0].self_attn.q_proj.weight) in of_muon
    assert of_adamw >= {id(model.embed_tokens.weight), id(model.norm.weight)}
    assert not of_muon & of_adamw
    assert id(model.lm_head.weight) not in of_muon | of_adamw  # frozen


def test_scheduler_reaches_both_parts():
    optimizer = MuonAdamW(make_eagle3(make_verifier()), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    rates = {group["lr"] for part in optimizer.parts for group in part.param_groups}
    assert rates == {5e-3} and scheduler.get_last_lr()[0] == 5e-3


def test_resumed_state_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(0)
    model = make_eagle3(make_verifier())
    optimizer = MuonAdamW(model, 1e-2)
    trained(optimizer, model, 2)
    weights, state = model.state_dict(), optimizer.state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    state = torch.load(_saved(state), weights_only=True)
    expected = trained(optimizer, model, 2)

    again = make_eagle3(make_verifier())
    again.load_state_dict(weights)
    resumed = MuonAdamW(again, 1e-2)
    resumed.load_state_dict(state)
    for ours, theirs in zip(trained(resumed, again, 2), expected, strict=True):
        assert torch.equal(ours, theirs)


def _saved(state):
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_every_draft_has_an_optimizer_for_all_that_trains(name):
    model = make_draft(name, make_verifier())
    optimizer = MuonAdamW(model, 1e-2)
    in_groups = {id(w) for group in optimizer.param_groups for w in group["params"]}
    assert in_groups == {id(w) for w in model.parameters() if w.requires_grad}


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_pytorchs_does_in_either_type(monkeypatch, shape, dtype):
    monkeypatch.setattr(optimizers, "product_dtype", lambda device: dtype)
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    mine, its = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step(), its.step()
    bound = 1e-6 if dtype == torch.bfloat16 else 0.02 * 3 * 0.1 * 0.2 * max(shape) ** 0.5
    assert (ours - theirs).abs().max() < bound
    assert mine.state_dict()["state"].keys() == its.state_dict()["state"].keys()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({torch.float32: 1.0, torch.bfloat16: 0.3}, torch.bfloat16),
        ({torch.float32: 1.0, torch.bfloat16: 1.5}, torch.bfloat16),
        ({torch.float32: 1.0, torch.bfloat16: 50.0}, torch.float32),
    ],
)
def test_products_run_in_bfloat16_where_that_is_not_slow(monkeypatch, seconds, expected):
    monkeypatch.setattr(device, "_product_s", seconds.get)
    assert device.product_dtype.__wrapped__(torch.device("cpu")) is expected
    assert device.product_dtype.__wrapped__(torch.device("cuda")) is torch.bfloat16
