"""Laws about training and counting: gradients, freezing, dtypes, FLOPs, bytes, building and saving."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from model.core import detach, state_bytes
from model.registry import BLOCKS

from .harness import Case, assert_close, gradients, law, weights_like


@law
def gradcheck_with_initial_state(case: Case) -> None:
    """Analytic gradients equal numeric ones in fp64: input, every parameter, initial state."""
    block = case.build()
    x, warm = case.input(1, 5), case.input(1, 4, seed=3)
    state = block(warm, block.init_state(1, x, capacity=16)).state
    leaves, spec = tree_flatten(None if state is None else detach(state))
    floats = [i for i, t in enumerate(leaves) if torch.is_tensor(t) and t.is_floating_point()]
    names = [n for n, _ in block.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in block.parameters()]
    given = [leaves[i].clone().requires_grad_() for i in floats]

    def run(x_, *rest):
        values = dict(zip(names, rest))
        now = list(leaves)
        for i, t in zip(floats, rest[len(names) :]):
            now[i] = t
        start = None if state is None else tree_unflatten(now, spec)
        step = torch.func.functional_call(block, values, (x_, start))
        ends = [t for t in tree_flatten(step.state)[0] if torch.is_tensor(t) and t.is_floating_point()]
        return (step.y, *ends)

    torch.manual_seed(0)
    assert gradcheck(run, (x.requires_grad_(), *params, *given), fast_mode=True, atol=1e-6, rtol=1e-4)


@law
def frozen_stays_frozen(case: Case) -> None:
    """A frozen parameter gets no gradient, and all others get the one they would have had."""
    block = case.build()
    x = case.input(2, case.T).requires_grad_()
    names = [n for n, _ in block.named_parameters()]
    w = weights_like(x)
    (block(x).y * w).sum().backward()
    want = {n: p.grad for n, p in block.named_parameters()}
    want_x = x.grad.clone()
    for start in (0, 1):
        frozen = set(names[start::2]) if start < 2 else set(names)
        for n, p in block.named_parameters():
            p.grad = None
            p.requires_grad_(n not in frozen)
        x.grad = None
        (block(x).y * w).sum().backward()
        for n, p in block.named_parameters():
            if n in frozen:
                assert p.grad is None, f"frozen {n} got a gradient"
            elif want[n] is not None:
                assert p.grad is not None, f"{n} no longer learns when others are frozen"
                assert_close(p.grad, want[n], f"gradient of {n} with others frozen")
        assert_close(x.grad, want_x, "gradient of x through a partly frozen block")


@law
def every_parameter_learns(case: Case) -> None:
    """No parameter is dead weight: each one gets a gradient that is not zero."""
    block = case.build()
    y = block(case.input(2, case.T)).y
    grads = gradients((y * weights_like(y)).sum(), list(block.parameters()))
    dead = [n for (n, _), g in zip(block.named_parameters(), grads) if not g.any()]
    assert not dead, f"no gradient reaches {dead}"


@law
def bf16_stays_close(case: Case) -> None:
    """bf16 in, bf16 out, finite and near fp64, in a bf16 block and in an fp32 block under autocast."""
    exact = case.build(torch.bfloat16).double()
    x = case.input(2, case.T).to(torch.bfloat16)
    want = exact(x.double()).y
    block = case.build(torch.bfloat16)
    with torch.no_grad():
        steps = {"bf16 block": block(x), "with a state": block(x, block.init_state(2, x, capacity=case.T))}
    for how, step in steps.items():
        assert step.y.dtype == torch.bfloat16, f"{how}: returned {step.y.dtype}"
        assert_near(step.y.double(), want, how)
    single = case.build(torch.bfloat16).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for how, given in (("autocast, fp32 x", x.float()), ("autocast, bf16 x", x)):
            assert_near(single(given).y.double(), want, how)


def assert_near(got: torch.Tensor, want: torch.Tensor, what: str, rel: float = 0.03) -> None:
    assert torch.isfinite(got).all(), f"{what}: not finite"
    off = ((got - want).norm() / want.norm()).item()
    assert off <= rel, f"{what}: relative error {off:.4f}, allowed {rel}"


@law
def fp32_stays_exact(case: Case) -> None:
    """fp32 equals fp64 to 1e-5 of the norm; huge inputs stay finite, gradients too."""
    exact, block = case.build(torch.float32).double(), case.build(torch.float32)
    x = case.input(2, case.T, torch.float32)
    assert_near(block(x).y.double(), exact(x.double()).y, "fp32 against fp64", rel=1e-5)
    for scale in (1e-4, 100.0):
        big = (x * scale).requires_grad_()
        y = block(big).y
        grads = gradients(y.sum(), [big, *block.parameters()])
        assert torch.isfinite(y).all(), f"y is not finite for inputs of scale {scale}"
        assert all(torch.isfinite(g).all() for g in grads), f"a gradient is not finite at scale {scale}"


@law
def training_equals_eval(case: Case) -> None:
    """train() and eval() compute the same, and a second call gives the same bits."""
    block = case.build()
    x = case.input(2, case.T)
    want = block(x).y
    assert torch.equal(block(x).y, want), "a second call gives other bits"
    assert_close(block.train()(x).y, want, "train() against eval()")


@law
def flops_equal_the_counter(case: Case) -> None:
    """cost(T).flops plus the Linears' matmuls is what torch's counter sees."""
    block = case.build(torch.float32)
    for T in (1, case.T, 64):
        x = case.input(2, T, torch.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(x)
        linears = sum(2 * m.weight.numel() * T for m in block.modules() if isinstance(m, nn.Linear))
        said = 2 * (block.cost(T).flops + linears)
        seen = counter.get_total_flops()
        assert said == seen, f"T={T}: cost and Linears say {said:,.0f}, the counter saw {seen:,}"


@law
def state_bytes_are_true(case: Case) -> None:
    """cost's state bytes per row are those of a state made for T tokens."""
    block = case.build(torch.float32)
    for T in (1, case.T, 64):
        x = case.input(3, T, torch.float32)
        cost = block.cost(T)
        step = block(x, block.init_state(3, x, capacity=T))
        said = 3 * (cost.state_fixed + T * cost.state_per_token)
        assert said == state_bytes(step.state), f"T={T}: {said} said, {state_bytes(step.state)} measured"


@law
def state_dict_round_trip(case: Case) -> None:
    """A strict state_dict carries everything: another seed's block computes the same after loading."""
    block, other = case.build(seed=0), case.build(seed=1)
    x = case.input(2, case.T)
    if list(block.parameters()):
        assert not torch.equal(other(x).y, block(x).y), "another seed gives the same block"
    other.load_state_dict(block.state_dict(), strict=True)
    assert torch.equal(other(x).y, block(x).y), "the state_dict does not carry everything"


@law
def builds_from_dim_alone(case: Case) -> None:
    """dim is enough; every parameter has a default and a plain type; no_decay names own parameters."""
    block = BLOCKS.get(case.name)(64)
    block = case.around(block) if case.around else block
    y = block(torch.randn(2, 5, 64)).y
    assert y.shape == (2, 5, 64) and torch.isfinite(y).all()
    for name, param in BLOCKS.params(case.name).items():
        assert is_plain(param.default), f"the default of {name!r} is no YAML value: {param.default!r}"
    own = dict(case.build().named_parameters())
    for name in case.build().no_decay:
        assert name in own, f"no_decay names {name!r}, which is no parameter"


def is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


@law
def backends_agree(case: Case) -> None:
    """A block that can choose its backend computes the same, gradients too, with the reference."""
    if "backend" not in BLOCKS.params(case.name):
        return
    ours = case.build()
    reference = replace(case, params={**case.params, "backend": "reference"}).build()
    reference.load_state_dict(ours.state_dict())
    x = case.input(2, case.T).requires_grad_()
    want = reference(x).y
    got = ours(x).y
    assert_close(got, want, "y")
    w = weights_like(want)
    pairs = zip(
        gradients((got * w).sum(), [x, *ours.parameters()]),
        gradients((want * w).sum(), [x, *reference.parameters()]),
    )
    for name, (g, ref) in zip(["x", *dict(ours.named_parameters())], pairs):
        assert_close(g, ref, f"gradient of {name}")
