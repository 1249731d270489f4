"""Training under noise that is sized by each weight's own curvature, around any torch optimizer."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..._checks import check_size, plain
from ..._deprecated import renamed_arguments, renamed_value
from .. import _fused
from .._arguments import build_base, share_arguments
from .._model_buffers import CleanBuffers, ModelBuffers
from .._perturbing import accumulate, makes_the_state
from .._wrapper import Closure
from ._checkpoint import Checkpoint, check_noise, split, unpack_noise
from ._estimates import FROM_LOSS, learn_from_callable, learn_from_gnb
from ._noise_set import NoiseSet, NoiseStats, can_move
from ._options import check_options
from ._reading import Draw, LayerStats, ReadableNoise, WeightNoise
from ._results import mean_result
from ._settings import Settings
from ._sources import Forward, LossFn, closure_from

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Draw", "LayerStats", "NoiseStats", "PerturbedOPT", "WeightNoise"]


_OLD_NAMES = {"dist": "distribution", "hessian": "curvature", "draws": "samples"}
_OLD_NAMES["hessian_interval"] = "curvature_interval"


class PerturbedOPT(ReadableNoise):
    """Wraps an optimizer so that it steps with a gradient taken under noise, more of it along flat directions.

    One pass, and two lines more than a plain training loop::

        opt = PerturbedOPT(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), gamma=0.1)
        ...
        opt.zero_grad()
        with opt.perturb():                       # w + u
            loss_fn(model(x), y).backward()
        opt.step()                                # at w again: the base optimizer's step

    The noise is POPT-1, the project's own definition, after arXiv 1809.07402 (Wang, Keskar, Xiong, Socher 2018), whose
    own algorithm is not public line by line::

        N_i     = (gamma |w_i| + eps) decay(T)
        sigma_i = min(scale / sqrt(max(hhat_i + rho N_i, 0)), N_i),   hhat = h / (1 - beta1^t)
        u_i     = sigma_i xi_i,   xi of law `distribution`;   g = gradient at w + u;   w restored bit for bit
        h       <- beta1 h + (1 - beta1) g^2;   w <- base step with g
        rho     <- beta2 rho + (1 - beta2) max_i |hhat'_i - hhat_i| / |w'_i - w_i|

    ``t`` counts the updates of ``h``, for each parameter by itself. Before the first there is no noise: the first step
    is the bare optimizer's. ``opt.step(closure)`` perturbs, runs the closure and steps; it restores, steps and averages
    in one pass over memory where the base is exactly :class:`torch.optim.SGD`, :class:`~torch.optim.Adam` or
    :class:`~torch.optim.AdamW`.

    Warm-up: a step at learning rate 0 moves no weight and feeds ``h`` all the same (with ``start=1`` from unperturbed
    weights). It does not count as a step, so that an estimate is due at each.

    Promises:

    * The weights come back bit for bit, at the same address, whatever happened in between.
    * A curvature that is not finite moves no weight. It raises ``RuntimeError``: on a CPU at once, on a GPU, which is
      not waited for, a step or two later, and at the latest in :meth:`state_dict`.
    * ``param_groups``, ``state`` and ``defaults`` are the base's own. ``state_dict()`` is ``{"base": ..., "noise":
      ...}``: the first part loads into the bare optimizer, both resume a run to the last bit, and the checkpoint of a
      bare optimizer loads too and begins the noise anew.
    * No host synchronisation. Memory: a copy of the parameters for the way back, and ``h`` in float32 at least; one
      more for ``lipschitz="element"``, and for quotients that span several steps (``curvature`` other than
      "squared_gradient").

    Mixed precision: ``h`` has the scale of the loss squared, so it is fed after unscaling only. ``scaler.step(opt)``
    is as usual and a step that it skips changes nothing; it unscales for us, also if the base could by itself
    (``fused=True``). ``scaler.step(opt, closure)`` is not supported, since torch never unscales a closure's gradients.
    Gradients that are clipped before :meth:`step` are averaged as clipped.

    Several gradients in one step: a context for each micro-batch draws anew for each; one context around all of them
    draws once. Neither clears gradients.

    Under DistributedDataParallel gradients are averaged before ``h`` sees them, so ``h`` and the weights stay equal on
    all ranks to the last bit, without communication of our own. Of DTensors (FSDP2) each shard draws for itself.

    Args:
        optimizer_or_params: the optimizer to wrap, or parameters as an optimizer takes them; then give ``base``.
        base: class of the optimizer to build around parameters.
        distribution: of the noise: "uniform" on ``(-sigma, sigma)``; "truncated_normal", cut at ``N``; "normal", which
            alone can move a weight by more than ``N``.
        curvature: where ``h`` comes from. "squared_gradient": the squared gradients of the steps. Through
            :meth:`update_curvature`, "gnb" and "hutchinson": Gauss-Newton-Bartlett and Hutchinson estimates; "exact":
            the Hessian's diagonal itself, of at most 20,000 parameters; "fisher": the empirical Fisher matrix's, the
            mean of the squared gradients of single samples, a backward pass for each. Or a function that is called
            after every ``curvature_interval``-th step with the list of perturbed parameters, and returns one estimate
            of the diagonal for each, or None. Negative estimates count as 0 in ``sigma``.
        gamma, eps: the neighbourhood ``N``, >= 0. Per group: ``popt_gamma``, ``popt_eps``. Without noise (both 0, or
            ``scale`` 0) a group is left to the base, to the last bit.
        scale: >= 0, in units of sqrt(loss). The PAC-Bayes bound at the temperature ``eta`` (1 / loss) is smallest for
            ``sqrt(3 / eta)`` with uniform noise and ``1 / sqrt(eta)`` with truncated normal noise, both with ``rho
            sqrt(m) / 3`` for rho, m the number of weights. Per group: ``popt_scale``.
        beta1: decay of ``h``.
        beta2: decay of ``rho``.
        lipschitz: Hessian-Lipschitz constant ``rho``, in units of loss / weight^3. "max": the largest quotient;
            "element": one for each weight; or a constant >= 0.
        min_step: weights that moved by no more have no quotient. The default is the rounding unit of a float32 weight
            of 0.1: quotients of smaller steps are of rounding errors, and the global constant is their maximum.
        schedule: ``decay(T)`` of the epoch ``T``, see :attr:`epoch`. None is 1, "log" is ``1 / log(e - 1 + T)``, a
            function of the epoch gives its own.
        samples: how often :meth:`step` with a closure draws and runs it.
        sizing: "curvature", or noise of a size that needs none, as settings of the same machinery. Its size is then
            ``scale decay(T)`` times: 1 ("isotropic"); ``|w_i|`` ("magnitude"); the 2-norm of the weight's filter, or of
            the tensor where it has fewer than two dimensions ("filter": LPF-SGD, arXiv 2201.08025, RWP, arXiv
            2404.00357, with ``distribution="normal"``); ``||w|| / sqrt(n)`` of its tensor, so that the noise of a
            tensor has a size relative to it ("tensor", AWP's normalisation, arXiv 2004.05884). "truncated_normal" then
            cuts at ``sigma``.
        model: module whose buffers (BatchNorm's statistics) must not see the perturbed weights. With no other pass
            something else has to count: a forward before :meth:`perturb`, ``with torch.no_grad(): model(x)``, or
            :func:`torch.optim.swa_utils.update_bn` before an evaluation. Without ``model`` the statistics follow the
            perturbed passes.
        sync: "common": the same noise on every rank, given the same seed; "per_rank": each its own. A process group is
            "common", and averages estimates of ``curvature`` over it; squared gradients need that not.
        generator: of the CPU, to draw the seed from; by default it is :func:`torch.initial_seed`. torch's own
            generators are not touched: noise is a function of the seed and of counters that are in the checkpoint.
        curvature_interval: steps from one estimate to the next, where ``curvature`` is not "squared_gradient".
        start: index of the first step with noise, >= 0. ``h`` is averaged before, too.
        base_kwargs: arguments of ``base``.

    Attributes:
        base: the wrapped optimizer.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message names it.
    """

    _set: NoiseSet
    _buffers: CleanBuffers | None
    group_checks: ClassVar[Mapping[str, Callable[[str, Any], None]]] = {
        "popt_scale": check_size,
        "popt_gamma": check_size,
        "popt_eps": check_size,
    }
    _advice = "Compute the gradient within `with opt.perturb():`, or call opt.step(closure)"

    @renamed_arguments(**_OLD_NAMES, **{f"popt_{old}": f"popt_{new}" for old, new in _OLD_NAMES.items()})
    def __init__(
        self,
        optimizer_or_params: Any,
        base: Callable[..., torch.optim.Optimizer] | None = None,
        *,
        distribution: str = "uniform",
        curvature: str | Callable[[list[Tensor]], Sequence[Tensor | None]] = "squared_gradient",
        gamma: float = 0.1,
        eps: float = 1e-5,
        scale: float = 1.0,
        beta1: float = 0.999,
        beta2: float = 0.1,
        lipschitz: str | float = "max",
        min_step: float = 1e-8,
        schedule: str | Callable[[int], float] | None = None,
        samples: int = 1,
        sizing: str = "curvature",
        model: nn.Module | None = None,
        exempt_buffers: Sequence[str] = (),
        sync: str | ProcessGroup = "common",
        generator: torch.Generator | None = None,
        curvature_interval: int = 10,
        start: int = 0,
        **base_kwargs: Any,
    ) -> None:
        curvature = renamed_value("curvature", curvature, {"grad2": "squared_gradient"}, stacklevel=3)
        lipschitz = renamed_value("lipschitz", lipschitz, {"global": "max"}, stacklevel=3)
        own: dict[str, Any] = {"curvature": curvature, "lipschitz": lipschitz, "beta1": beta1, "beta2": beta2}
        own |= {"gamma": gamma, "eps": eps, "min_step": min_step, "curvature_interval": curvature_interval}
        own |= {"distribution": distribution, "sizing": sizing, "scale": scale, "schedule": schedule, "sync": sync}
        own |= {"samples": samples, "generator": generator, "start": start}
        own |= {"model": model, "exempt_buffers": exempt_buffers}
        init = inspect.unwrap(PerturbedOPT.__init__)
        share_arguments(init, "popt_", own, base, base_kwargs)
        check_options(init.__kwdefaults__ or {}, **own)
        own = {name: plain(value) for name, value in own.items()}
        optimizer = build_base(type(self).__name__, optimizer_or_params, base, base_kwargs)
        group_defaults = {"popt_scale": own["scale"]}
        if own["sizing"] == "curvature":
            group_defaults |= {"popt_gamma": own["gamma"], "popt_eps": own["eps"]}
        settings = Settings(own["distribution"], *(own[name] for name in Settings._fields[1:]))
        seed = torch.initial_seed()
        if own["generator"] is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=own["generator"]))
        buffers = CleanBuffers(own["model"], own["exempt_buffers"]) if own["model"] is not None else None
        super().__init__(optimizer, group_defaults, NoiseSet(settings, seed), buffers)
        self._set.keys = tuple(key for key in _fused.keys_of(self.base, ()) if key not in self._group_defaults)
        self._samples, self._start = own["samples"], own["start"]
        self._interval = own["curvature_interval"]
        self._warned = False

    # -- the pass ----------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether an ascent would move anything at this step: ``start`` allows it, some group has noise, and there is
        a curvature, which the first step has yet to find."""
        noise = self._set
        known = bool(noise.states) or not noise.settings.curved
        return known and noise.steps >= self._start and any(map(can_move, self._groups()))

    @contextlib.contextmanager
    def perturb(self) -> Iterator[None]:
        """Context for the pass: weights at ``w + u`` with a fresh draw on entry, ``w`` on exit, always. Gradients are
        not cleared: those of several draws add up.

        Where the optimizer is not :attr:`active`, the weights stay at ``w``.

        Raises:
            RuntimeError: the weights are perturbed already, or something is not finite (see the class).
        """
        self._refuse_unless_at_rest("ascend()")
        try:
            self.ascend()
            yield
            self.restore()
        except BaseException:  # it may come at any line, of restore() too
            self._abandon()
            raise

    def ascend(self) -> None:
        """Move the weights from ``w`` to ``w + u``. :meth:`perturb` is safer."""
        self._refuse_unless_at_rest("ascend()")
        self._refuse_what_is_not_finite()
        if not self.active:
            return
        groups = self._groups()
        self._check_groups(groups)
        if self._buffers is not None:
            self._buffers.see_step(self._set.steps)
            self._buffers.save()
        self._watch.ascended = self._set.ascend(groups)
        self._start_pass()
        self._refuse_what_is_not_finite()

    def step(self, closure: Closure | None = None) -> Any:
        """Restore the weights if they are perturbed, take the base's step, and update the curvature.

        Args:
            closure: clears the gradients, computes them and returns the loss. It is called ``samples`` times, each
                under its own noise, and the gradients are averaged; once where the optimizer is not :attr:`active`. If
                it raises, the weights are restored.

        Returns:
            What ``closure`` returned, or the mean over the draws: the loss under noise, for there is no clean pass.
            None without closure.
        """
        loss = None
        if closure is not None:
            self._refuse_unless_at_rest("step(closure)")
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = self._run_draws(closure)
            self._refuse_what_is_not_finite()
            self._base_step()
            self._refuse_what_is_not_finite()
        except BaseException:
            self._abandon()
            raise
        return loss

    def _base_scales(self) -> bool:
        """GradScaler shall unscale before every step, also for a base that does it in passing: for the curvature."""
        return False

    def _run_draws(self, closure: Closure) -> Any:
        passed, samples = self._watch.passed, self._samples if self.active else 1
        losses, total = [], dict[Tensor, Tensor]()
        for draw in range(samples):
            self.restore()  # but not after the last: the step may do that in passing
            self.ascend()
            loss, record = self._run_closure(closure, passed=passed, adds_up=samples == 1)
            if draw == 0 and record.untouched():  # the loop has computed the gradient: its noise is the last draw
                self.restore()
                self._set.take_back_draw()
                return loss
            if samples == 1:
                return loss
            losses.append(loss)
            accumulate(total, self._take_grads())
        with torch.no_grad():
            for grad in total.values():
                grad.div_(samples)
        self._put_grads(total)
        return mean_result(losses)

    def _take_step(self, counts: bool) -> None:
        noise, groups = self._set, self._groups()
        try:
            noise.refuse_sparse(groups)
        except BaseException:
            self.restore()
            raise
        stepping = noise.stepping()
        moved = noise.perturbed or (bool(stepping) and all(bucket.saved for bucket in stepping))
        learns = counts or not makes_the_state()  # a step at learning rate 0 warms the curvature up
        if learns and moved and self._fused_step(stepping):
            noise.learn_from_fused(stepping)
        else:
            self.restore()
            self.base.step()
            if learns:
                noise.learn_from_gradients(groups)
        if learns and callable(noise.settings.curvature) and self._estimate_is_due():
            with torch.enable_grad():
                learn_from_callable(noise, groups, noise.settings.curvature)
        if learns and not counts:
            noise.estimated = -1  # the step's number comes again, and so does an estimate

    def _count_step(self) -> None:
        noise = self._set
        noise.steps += 1
        waits = noise.settings.curved and not noise.settings.fed_by_steps and not noise.states
        if waits and not self._warned and noise.steps >= self._start + 2 and any(map(can_move, self._groups())):
            self._warned = True
            curvature = noise.settings.curvature
            advice = (
                "the function has returned None for every parameter; return its estimates of the curvature"
                if callable(curvature)
                else f"call opt.update_curvature(closure) in the loop, which curvature={curvature!r} is fed by"
            )
            warnings.warn(
                f"PerturbedOPT has trained {noise.steps} steps as the bare optimizer does, without noise, since no "
                f"curvature is known: {advice}",
                stacklevel=5,
            )

    # -- curvature and noise -----------------------------------------------------------------------------------------

    @renamed_arguments(closure="source")
    def update_curvature(
        self,
        source: Any,
        *,
        forward: Forward | None = None,
        loss_fn: LossFn | None = None,
        class_dim: int | None = None,
    ) -> bool:
        """Average a new estimate of the curvature at the present weights, at every ``curvature_interval``-th step.

        In a loop it can be called at every step, before or after the gradient::

            opt.update_curvature(lambda: model(x))              # curvature="gnb": logits
            opt.update_curvature(lambda: loss_fn(model(x), y))  # curvature="hutchinson" or "exact": the loss
            opt.update_curvature(batch, forward=lambda _, b: (model(**b).logits, b["labels"]), loss_fn=loss_fn)

        ``.grad`` is not touched. Under DistributedDataParallel, whose own hooks expect a backward pass, call the module
        itself (``ddp.module(x)``), and give PerturbedOPT the process group as ``sync``.

        Args:
            source: a closure, or a batch that the model is called with, where something is due. A closure of "gnb"
                returns logits of shape (predictions, classes), whose softmax labels are drawn from, or a pair (logits,
                targets); of "hutchinson" and "exact" the loss, of a model that can be differentiated twice; of
                "fisher" the loss of each sample.
            forward: as of :class:`flatmin.curvature.Batches`: ``forward(model, batch)`` returns ``(outputs, targets)``,
                model being that of the constructor. None: ``inputs, targets = batch``, and ``(model(inputs),
                targets)``.
            loss_fn: with a batch: ``loss_fn(outputs, targets)``, the mean loss. Of "gnb", it only says which label is
                ignored (``ignore_index``, -100 by default) and that torch's criteria have their classes in dimension 1.
            class_dim: of "gnb": dimension of the logits that holds the classes. None: the one that fits the targets.

        Returns:
            Whether an estimate was made: not if nothing was due, or all labels are ignored.

        Raises:
            RuntimeError: ``curvature`` is another one, the weights are perturbed, or parameters are sharded.
            TypeError: what a closure returns is none of that, or a batch needs another argument.
            ValueError: logits and targets do not fit, or "exact" has too many parameters.
        """
        noise, groups = self._set, self._groups()
        kind = noise.settings.curvature
        if not isinstance(kind, str) or kind not in ("gnb", *FROM_LOSS):
            raise RuntimeError(
                f"update_curvature(): it is for curvature='gnb', {', '.join(map(repr, FROM_LOSS))}, not {kind!r}, "
                "which step() looks after"
            )
        model = None if self._buffers is None else self._buffers.model
        closure = closure_from(source, kind, model, forward, loss_fn, self._params()[0].device)
        self._refuse_unless_at_rest("update_curvature()")
        if not self._estimate_is_due() or not any(map(can_move, groups)):
            return False
        statistics = None if self._buffers is None else ModelBuffers(self._buffers.model)
        if statistics is not None:
            statistics.save()
        try:
            with torch.enable_grad():
                if kind == "gnb":
                    made = learn_from_gnb(noise, groups, closure, loss_fn, class_dim)
                else:
                    made = FROM_LOSS[kind](noise, groups, closure)
        finally:
            if statistics is not None:
                statistics.restore()
        self._refuse_what_is_not_finite()
        return made

    def _estimate_is_due(self) -> bool:
        return self._set.steps % self._interval == 0 and self._set.estimated != self._set.steps

    def _refuse_what_is_not_finite(self, wait: bool = False) -> None:
        if self._set.nonfinite.poll(wait):
            self.restore()
            raise RuntimeError(self._set.diagnosis(self._groups()))

    # -- checkpoints, groups -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``{"base": the base's state_dict(), "noise": what the noise adds}``.

        Raises:
            RuntimeError: the weights are perturbed, or something is not finite (see the class).
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the checkpoint of a bare optimizer: then the noise begins anew, with a
        step that has none.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError: it is no such checkpoint, or another model's; nothing has changed.
        """
        super().load_state_dict(state_dict)

    def _params(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.base.param_groups))

    def _pack(self) -> dict[str, Any]:
        self._refuse_what_is_not_finite(wait=True)
        return Checkpoint.of(super()._pack(), self._set, self._params())

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        base, noise = split(state_dict)
        if noise is not None:
            check_noise(noise, self._params())
        super()._unpack(base)
        unpack_noise(self._set, self._params(), noise)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's ``add_param_group()``; the group may have its own ``popt_gamma``, ``popt_eps``, ``popt_scale``.
        Its first step is without noise."""
        super().add_param_group(param_group)
