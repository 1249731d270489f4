"""What other implementations got wrong and no other test here asks for: docs/peers.md has the whole list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flatmin import SAM, ops
from models import backward, batches, same_bits, sgd, small_net, step_closure, weights


def test_a_loss_of_exactly_zero_is_a_loss() -> None:
    """Composer asks ``if loss:`` and takes 0.0 for a pass that failed."""
    nets = [small_net(), small_net()]
    (batch,) = batches(1)
    step_closure(nets[0], SAM(sgd(nets[0].parameters()), rho=0.1), batch)
    opt = SAM(sgd(nets[1].parameters()), rho=0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        return backward(nets[1], batch) * 0.0

    assert float(opt.step(closure).detach()) == 0.0
    assert same_bits(weights(nets[0]), weights(nets[1]))


def test_the_norm_of_float16_gradients_may_exceed_float16() -> None:
    grads = [torch.full((63,), 1e4, dtype=torch.float16)]
    assert float(ops.norm(grads)) == pytest.approx(1e4 * 63**0.5, rel=1e-6)  # 79373
    weight = nn.Parameter(torch.zeros(63, dtype=torch.float16))
    weight.grad = grads[0]
    opt = SAM(sgd([weight]), rho=1.0)
    opt.ascend()
    assert float(weight.detach().double().norm()) == pytest.approx(1.0, rel=1e-3)


def test_a_gradient_in_the_second_pass_only_is_stepped_with() -> None:
    """davda54/sam looks for a backup that was never made."""
    always, late = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    opt = SAM(sgd([always, late]), rho=0.5)
    always.sum().backward()
    with opt.perturb():
        assert (always.item(), late.item()) == (1.5, 2.0)
        (always + 3.0 * late).sum().backward()
    opt.step()
    assert (always.item(), late.item()) == (pytest.approx(0.9), pytest.approx(1.7))


@pytest.mark.parametrize("adaptive", [False, True, "davda54", "big_vision"])
def test_the_ascent_reads_the_gradients_and_leaves_them(adaptive: bool | str) -> None:
    """ASAM of SamsungLabs multiplies them by the weights, in place."""
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1, adaptive=adaptive)
    backward(net, batches(1)[0])
    before = [p.grad.clone() for p in net.parameters()]
    opt.ascend()
    assert same_bits([p.grad for p in net.parameters()], before)
