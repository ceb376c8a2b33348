import math
import time

import pytest
import torch
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.errors import CheckpointError
from bittrue.model.inventory import inventory
from bittrue.model.presets import preset_config
from bittrue.train.muon import UPDATE_SCALE, newton_schulz
from bittrue.train.optim import (
    AdamW,
    Optimiser,
    OptimSettings,
    clip_gradients,
    first_bad_gradient,
    rule_of,
)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0) -> dict[str, Tensor]:
    """Parameters of every rule, with gradients."""
    shapes = {
        "embed.weight": (32, 16),
        "head.weight": (32, 16),
        "norm.weight": (16,),
        "layers.0.attn.wq_a.weight": (8, 16),
        "layers.0.attn.wq_b.weight": (24, 8),
        "layers.0.attn.attn_sink": (4,),
        "layers.0.attn.compressor.ape": (4, 8),
        "layers.0.ffn.experts.w1": (3, 8, 16),
        "layers.0.ffn.experts.w2": (3, 16, 8),
        "layers.0.hc_attn_fn": (24, 64),
    }
    named = {}
    for i, (name, shape) in enumerate(shapes.items()):
        named[name] = noise(seed + i, *shape).requires_grad_()
        named[name].grad = noise(seed + 100 + i, *shape)
    return named


def test_every_parameter_of_a_model_has_the_published_rule() -> None:
    config = ModelConfig.from_dict(preset_config("tiny", "f32", draft="mtp"))
    rules: dict[str, set[str]] = {}
    for spec in inventory(config, draft="mtp"):
        if not spec.name.endswith(("gate.bias", "tid2eid")):
            rules.setdefault(rule_of(spec.name, spec.shape), set()).add(spec.name)
    assert rules["adamw"] == {"embed.weight", "head.weight"}
    ends = ("norm.weight", "_base", "_scale", "attn_sink", ".ape")
    assert all(name.endswith(ends) for name in rules["adamw_no_decay"])
    assert not any(name.endswith(ends) for name in rules["muon"])
    assert {"mtp.0.e_proj.weight", "layers.3.ffn.gate.weight", "layers.2.hc_ffn_fn"} <= rules["muon"]


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (8, 40), (1, 7), (64, 64)])
def test_newton_schulz_brings_singular_values_near_one(rows: int, cols: int) -> None:
    x = noise(0, 5, rows, cols) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).view(5, 1, 1)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert float((values - 1).abs().max()) < 0.02


def test_newton_schulz_keeps_the_singular_vectors() -> None:
    x = noise(1, 2, 12, 20)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert float((newton_schulz(x) - left @ right).abs().max()) < 0.01


def test_newton_schulz_of_a_matrix_alone_and_in_a_stack_is_the_same() -> None:
    x = noise(2, 40, 64, 96)
    together = newton_schulz(x)
    assert torch.allclose(together[7:8], newton_schulz(x[7:8]), atol=1e-5)


def test_newton_schulz_in_bf16_is_coarser_but_right() -> None:
    values = torch.linalg.svdvals(newton_schulz(noise(3, 4, 32, 48), torch.bfloat16))
    assert float((values - 1).abs().max()) < 0.05


def test_newton_schulz_of_zeros_is_zeros() -> None:
    assert not bool(newton_schulz(torch.zeros(2, 4, 8)).any())


def test_a_muon_update_has_the_size_of_adamws() -> None:
    """An orthogonal R x C matrix has a root mean square of 1 / sqrt(max): the factor makes it 0.18."""
    for shape in ((64, 64), (16, 64), (64, 16), (3, 16, 48)):
        p = torch.zeros(*shape, requires_grad=True)
        p.grad = noise(4, *shape)
        Optimiser({"layers.0.attn.wkv.weight": p}, OptimSettings()).step(0.01)
        rms = float(p.detach().square().mean().sqrt())
        assert rms == pytest.approx(0.01 * UPDATE_SCALE, rel=0.02), shape


def test_a_muon_step_is_momentum_nesterov_decay_and_scale() -> None:
    """Against the formula written out, for two steps of a matrix with more rows than columns."""
    p = noise(5, 12, 8).requires_grad_()
    expected, momentum = p.detach().clone(), torch.zeros(12, 8)
    optimiser = Optimiser({"layers.0.attn.wo_b.weight": p}, OptimSettings())
    for seed in (6, 7):
        p.grad = noise(seed, 12, 8)
        optimiser.step(0.02)
        momentum = 0.95 * momentum + p.grad
        left, _, right = torch.linalg.svd(0.95 * momentum + p.grad, full_matrices=False)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.18 * math.sqrt(12) * (left @ right)
        assert float((p.detach() - expected).abs().max()) < 1e-4


def test_experts_of_a_stack_move_as_matrices_of_their_own() -> None:
    stack = noise(8, 3, 8, 16).requires_grad_()
    stack.grad = noise(9, 3, 8, 16)
    alone = stack.detach()[1].clone().requires_grad_()
    alone.grad = stack.grad[1].clone()
    Optimiser({"layers.0.ffn.experts.w1": stack}, OptimSettings()).step(0.02)
    Optimiser({"layers.0.attn.wkv.weight": alone}, OptimSettings()).step(0.02)
    assert torch.allclose(stack.detach()[1], alone.detach(), atol=1e-6)


def test_an_adamw_step_by_hand() -> None:
    p = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    adamw = AdamW({"p": p}, OptimSettings(), decay=0.1)
    p.grad = torch.tensor([0.5, -0.25, 0.0])
    adamw.step(0.1)
    # The first step moves by the sign of the gradient: m / (1 - beta1) = g and sqrt(v / (1 - beta2)) = |g|.
    assert p.tolist() == pytest.approx([0.99 - 0.1, -1.98 + 0.1, 0.495])
    p.grad = torch.tensor([1.0, 0.25, 0.0])
    adamw.step(0.1)
    m, v = 0.9 * 0.05 + 0.1 * 1.0, 0.95 * 0.05 * 0.25 + 0.05 * 1.0
    step = (m / (1 - 0.81)) / math.sqrt(v / (1 - 0.9025))
    assert p[0].item() == pytest.approx(0.89 * 0.99 - 0.1 * step, rel=1e-6)
    assert p[2].item() == pytest.approx(0.5 * 0.99**2)


def test_norms_and_biases_are_not_decayed() -> None:
    named = model()
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    Optimiser(named, OptimSettings(weight_decay=0.5)).step(0.1)
    kept = {name for name, p in named.items() if torch.equal(p.detach(), before[name])}
    assert kept == {"norm.weight", "layers.0.attn.attn_sink", "layers.0.attn.compressor.ape"}
    assert torch.allclose(named["embed.weight"].detach(), before["embed.weight"] * 0.95)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    named = model()
    named["layers.0.ffn.experts.w1"].grad = None
    named["embed.weight"].grad = None
    before = {name: p.detach().clone() for name, p in named.items()}
    Optimiser(named, OptimSettings()).step(0.1)
    kept = {name for name, p in named.items() if torch.equal(p.detach(), before[name])}
    assert kept == {"layers.0.ffn.experts.w1", "embed.weight"}


def run(steps: int, *, restart_at: int = -1) -> dict[str, Tensor]:
    named = model()
    optimiser = Optimiser(named, OptimSettings())
    for step in range(steps):
        if step == restart_at:
            state = {name: tensor.clone() for name, tensor in optimiser.state().items()}
            optimiser = Optimiser(named, OptimSettings())
            optimiser.load_state(state)
        for i, p in enumerate(named.values()):
            p.grad = noise(1000 * step + i, *p.shape)
        clip_gradients(named, 1.0)
        optimiser.step(0.01)
    return {name: p.detach() for name, p in named.items()}


def test_the_same_steps_give_the_same_bits() -> None:
    first, second = run(4), run(4)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_carries_everything_the_next_step_depends_on() -> None:
    whole, resumed = run(5), run(5, restart_at=3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_state_of_another_model_is_refused_with_the_name() -> None:
    optimiser = Optimiser(model(), OptimSettings())
    state = optimiser.state()
    with pytest.raises(CheckpointError, match="momentum.layers.0.attn.wq_a.weight"):
        optimiser.load_state({n: t for n, t in state.items() if n != "momentum.layers.0.attn.wq_a.weight"})
    with pytest.raises(CheckpointError, match="v.norm.weight"):
        optimiser.load_state({**state, "v.norm.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="m.extra"):
        optimiser.load_state({**state, "m.extra": torch.zeros(3)})


def test_clipping_scales_all_gradients_to_the_common_norm() -> None:
    named = model()
    whole = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    norm = clip_gradients(named, 2.0)
    assert norm == pytest.approx(float(whole.double().norm()))
    clipped = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    assert torch.allclose(clipped, whole * (2.0 / norm))
    assert clip_gradients(named, 0.0) == pytest.approx(2.0)
    assert clip_gradients(named, 3.0) == pytest.approx(2.0)
    assert torch.equal(torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None]), clipped)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_is_found_by_name(bad: float) -> None:
    named = model()
    assert first_bad_gradient(named) is None
    grad = named["layers.0.attn.wq_b.weight"].grad
    assert grad is not None
    grad[3, 4] = bad
    assert first_bad_gradient(named) == "layers.0.attn.wq_b.weight"


@pytest.mark.slow
def test_newton_schulz_of_a_small_models_matrices_is_quick() -> None:
    """168 matrices of 128 x 128, as many as seven layers of eight experts have."""
    x = noise(0, 168, 128, 128)
    newton_schulz(x)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        newton_schulz(x)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.6  # 0.13 on two idle cores; the rest is for a busy machine


def test_matrices_may_move_by_adamw_as_everything_else() -> None:
    parameters, others = model(), model()
    Optimiser(parameters, OptimSettings(matrices="adamw")).step(0.1)
    Optimiser(others, OptimSettings()).step(0.1)
    plain = AdamW(model(), OptimSettings(), decay=0.1)
    plain.step(0.1)
    for name, moved in plain._parameters.items():
        rule = rule_of(name, tuple(moved.shape))
        assert torch.equal(parameters[name], others[name]) == (rule != "muon"), name
        assert torch.equal(parameters[name], moved) or rule == "adamw_no_decay", name
    assert any(name.startswith("momentum.") for name in Optimiser(others, OptimSettings()).state())
    state = Optimiser(parameters, OptimSettings(matrices="adamw")).state()
    assert not any(name.startswith("momentum.") for name in state)
