"""LoRA-FA: A stays as it began, and B follows the gradient that the whole update would (Zhang et al. 2023,
https://arxiv.org/abs/2308.03303).

Of all steps that B alone can take, the one nearest to the gradient of W in s·BA is g_B (A Aᵀ)⁻¹ / s². AdamW gets
that in place of g_B. With A frozen, the input of a layer need not be kept for the backward pass, and (A Aᵀ)⁻¹ is
computed once.

Shapes: I in, O out, R rank, N layers of one shape. Factors of more dimensions, a convolution's, are matrices of R
columns (B) and R rows (A) here.
"""

# torch's own optimizers are made of its _foreach functions, which have no public name.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import AdapterNameError, ConfigError, bullet_list
from veneer.layers.adapter import Adapter
from veneer.layers.sharded import local, whole
from veneer.model.overlay import overlay_of
from veneer.optimizers.trained import adapters_in_training, check_numbers, name_of, without_decay

MOMENTS = ("exp_avg", "exp_avg_sq")


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> "LoraFAOptimizer":
    """Freeze the A of the adapters that train, and return the optimizer of all else that trains.

    r, lora_alpha, use_rslora  must be those of the adapter's config. They are there for PEFT's callers: each layer's
                               own scale is used, whatever its rank_pattern, alpha_pattern and use_rslora

    DoRA magnitudes, biases (`lora_bias` too) and modules trained in full take plain AdamW steps; biases and norms have
    no weight decay.
    Raises ConfigError if an argument cannot be right, an A is zero as an embedding's is at the start (frozen, it would
    leave nothing to learn) or an update is not one product B A, and AdapterNameError if no adapter trains. Then nothing
    has changed.
    """
    check_numbers({"lr": lr, "weight_decay": weight_decay}, above_zero={"r": r, "lora_alpha": lora_alpha})
    adapters = adapters_in_training(model)
    _check_config(model, {name_of(path) for path in adapters}, r=r, lora_alpha=lora_alpha, use_rslora=use_rslora)
    _check_factors(adapters)
    factors = [factor for adapter in adapters.values() for factor in (adapter.lora_A, adapter.lora_B)]
    done, undecayed = {id(factor) for factor in factors}, without_decay(model)
    beside = [p for p in model.parameters() if p.requires_grad and id(p) not in done]
    optimizer = LoraFAOptimizer(
        [
            {"params": factors, "scales": [float(adapter.scale) for adapter in adapters.values()]},
            {"params": [p for p in beside if id(p) not in undecayed]},
            {"params": [p for p in beside if id(p) in undecayed], "weight_decay": 0.0},
        ],
        lr=lr,
        weight_decay=weight_decay,
    )
    freeze_A(model)
    return optimizer


def freeze_A(model: nn.Module) -> None:
    """Freeze the A of the adapters that train. Raises AdapterNameError if none does."""
    for adapter in adapters_in_training(model).values():
        adapter.lora_A.requires_grad_(False)


def _check_config(model: nn.Module, names: set[str], *, r: int, lora_alpha: float, use_rslora: bool | None) -> None:
    """ConfigError if what the caller says of the adapters is not what their configs say."""
    overlays = [overlay for module in model.modules() if (overlay := overlay_of(module)) is not None]
    configs = {name: overlay.configs[name] for overlay in overlays for name in sorted(names & overlay.configs.keys())}
    told = {"r": r, "lora_alpha": lora_alpha} | ({} if use_rslora is None else {"use_rslora": use_rslora})
    problems = [
        f"{key}={value} was said, and adapter {name!r} has {key}={getattr(config, key)}"
        for name, config in configs.items()
        for key, value in told.items()
        if value != getattr(config, key)
    ]
    if problems:
        advice = "Say what the adapter has: its own scale is used, layer by layer."
        raise ConfigError(bullet_list("LoRA-FA was told of another adapter.", [*problems, advice]))


def _check_factors(adapters: dict[str, Adapter]) -> None:
    """ConfigError for factors that LoRA-FA cannot train, AdapterNameError if no B trains."""
    if not any(adapter.lora_B.requires_grad for adapter in adapters.values()):
        raise AdapterNameError("LoRA-FA trains B, and every lora_B of the model is frozen. Call set_requires_grad.")
    other = [f"{path} ({adapter.kind.name})" for path, adapter in adapters.items() if adapter.kind.delta is not None]
    if other:
        raise ConfigError(
            bullet_list(
                f"LoRA-FA needs updates that are one product B A; those of {len(other)} adapters are made otherwise.",
                [*other, "Leave them out of the target names."],
            )
        )
    zero = [path for path, adapter in adapters.items() if not whole(adapter.lora_A).any()]
    if zero:
        raise ConfigError(
            bullet_list(
                f"LoRA-FA keeps A as it is, and {len(zero)} of {len(adapters)} adapters have an A of zeros: "
                "they would learn nothing.",
                [*zero, "An embedding's A starts at zero: leave it out, or start with init_lora_weights=False."],
            )
        )


class LoraFAOptimizer(Optimizer):
    """AdamW over groups of parameters; in a group with `scales`, over the B of pairs [A, B, A, B, …], one scale each.

    ε is added to the root of the uncorrected second moment, as in Adam's efficient form (Kingma & Ba 2015, section 2)
    and in PEFT. A group's `lr`, `betas`, `eps` and `weight_decay` may be changed at any time.

    State is kept for each parameter as torch keeps it, `step`, `exp_avg` and `exp_avg_sq`, in float32 also for
    half-precision parameters, whose steps are computed in float32 and rounded once.
    Of a sharded model each rank steps its own rows of B, which needs all of A, gathered once.
    An A that was set to train again (by set_adapter, say) is frozen again, and its gradient dropped, in each step.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        check_numbers({"lr": lr, "eps": eps, "weight_decay": weight_decay})
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas should be two numbers of at least 0 and below 1, got {betas!r}.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._inverses: dict[int, _Inverses] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverses": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_inverses": {}})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep their float32, which torch would round to the dtype of the parameter.

        The scales stay those of the model.
        """
        scales = [group.get("scales") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, scales, strict=True):
            group |= {} if own is None else {"scales": own}
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for key in MOMENTS:
                if key in state_dict["state"].get(saved_id, {}):
                    moment = state_dict["state"][saved_id][key]
                    self.state[parameter][key] = moment.to(parameter.device, _at_least_float32(parameter), copy=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            if "scales" in group:
                parameters, gradients = self._projected(number, group)
            else:
                parameters = [p for p in group["params"] if p.grad is not None]
                gradients = [local(p.grad).to(_at_least_float32(p)) for p in parameters]
            if parameters:
                states = [{key: local(value) for key, value in self._state_of(p).items()} for p in parameters]
                _adamw(group, [local(p) for p in parameters], gradients, states)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=_at_least_float32(parameter))
        return state

    def _projected(self, number: int, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The B that have gradients, and g_B (A Aᵀ)⁻¹ / s² for each."""
        factors_A, factors_B = group["params"][0::2], group["params"][1::2]
        for A in factors_A:
            if A.requires_grad:
                A.requires_grad_(False)
                A.grad = None
        stamps = [(local(A).data_ptr(), local(A)._version, A.device) for A in factors_A]
        if number not in self._inverses or self._inverses[number].stamps != stamps:
            batches = list(_inverse_batches([whole(A) for A in factors_A], factors_B, group["scales"]))
            self._inverses[number] = _Inverses(stamps, batches)
        parameters, gradients = [], []
        for batch, P_NRR in self._inverses[number].batches:
            live = [at for at, place in enumerate(batch) if factors_B[place].grad is not None]
            if not live:
                continue
            found = [factors_B[batch[at]] for at in live]
            g_NOR = torch.stack([local(B.grad) for B in found]).flatten(2).to(P_NRR.dtype)
            parameters += found
            with torch.autocast(P_NRR.device.type, enabled=False):
                projected_NOR = g_NOR @ (P_NRR if len(live) == len(batch) else P_NRR[live])
            gradients += projected_NOR.view(len(found), *local(found[0]).shape).unbind()
        return parameters, gradients


class _Inverses(NamedTuple):
    """(A Aᵀ)⁻¹ / s² of the pairs in batches of one shape, and by what is seen that an A is no longer what it was."""

    stamps: list[tuple[int, int, torch.device]]
    batches: list[tuple[list[int], Tensor]]


def _inverse_batches(
    factors_A: Sequence[Tensor], factors_B: Sequence[Tensor], scales: Sequence[float]
) -> Iterator[tuple[list[int], Tensor]]:
    """(places in the list, (N, R, R) inverses) for the pairs of each shape, dtype and device."""
    alike: dict[Any, list[int]] = {}
    for place, (A, B) in enumerate(zip(factors_A, factors_B, strict=True)):
        alike.setdefault((A.shape, B.shape, B.dtype, B.device), []).append(place)
    for places in alike.values():
        s_N = torch.tensor([scales[place] for place in places], dtype=torch.float64)
        P_NRR = torch.stack([gram_inverse(factors_A[place]) for place in places])
        P_NRR = P_NRR / s_N.square().to(P_NRR.device).view(-1, 1, 1)
        B = factors_B[places[0]]
        yield places, P_NRR.to(B.device, _at_least_float32(B))


def gram_inverse(A: Tensor) -> Tensor:
    """(A Aᵀ)⁻¹ in float64, for A of shape (R, …), a matrix of R rows; the pseudo-inverse where A has not full rank.

    A direction counts if its eigenvalue is above R·ε times the largest, ε that of the gradients (float32, or float64
    for such an A): in others a gradient holds rounding errors alone, and they get 0 instead of being blown up.
    """
    exact_RI = A.flatten(1).to("cpu" if A.device.type == "mps" else A.device, torch.float64)  # mps has no float64
    smallest = len(A) * torch.finfo(_at_least_float32(A)).eps
    return torch.linalg.pinv(exact_RI @ exact_RI.T, rtol=smallest, hermitian=True)


def _adamw(
    group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: Sequence[dict[str, Tensor]]
) -> None:
    """One AdamW step of all parameters at once; gradients and moments in float32 at least."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    steps, means, squares = ([state[key] for state in states] for key in ("step", *MOMENTS))
    torch._foreach_add_(steps, 1)
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, gradients, alpha=1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, group["eps"])
    taken = [step.item() for step in steps]
    sizes = [-lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) for t in taken]
    values = [p if p.dtype == mean.dtype else p.to(mean.dtype) for p, mean in zip(parameters, means, strict=True)]
    torch._foreach_addcdiv_(values, means, roots, sizes)
    if group["weight_decay"]:
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
    for parameter, value in zip(parameters, values, strict=True):
        if value is not parameter:
            parameter.copy_(value)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's gradients and moments are kept and computed."""
    return torch.promote_types(tensor.dtype, torch.float32)
