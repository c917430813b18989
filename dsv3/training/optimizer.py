"""AdamW and Muon in one optimizer.

AdamW divides every single number's gradient by its own recent size. Muon instead looks at a weight matrix as the map
it is: it replaces the momentum by the nearest (semi-)orthogonal matrix, so that every direction of the map is changed
by the same amount, however small its gradient. The orthogonal factor comes from a Newton-Schulz iteration: five
rounds of an odd quintic polynomial that push all singular values towards 1, made of matrix products only, which is
what devices are fast at. The exact factor (an SVD) is slower and no better.

An orthogonal n x m matrix has root mean square 1 / sqrt(max(n, m)); AdamW's update has about 0.2. Scaling by
0.2 * sqrt(max(n, m)) makes the two equal in size, so that one learning rate and one weight decay serve both.

Muon takes the matrices and the stacks of experts' matrices. Embeddings, head, router and vectors stay with AdamW:
their rows are looked up or compared one by one and are no map of one space onto another. The experts' gate and up
projections are stored as one stack of shape (E, 2F, D) and are orthogonalized apart, for they are two maps.

What we give up: every process of a distributed run orthogonalizes every matrix, where sharding them would save time.

Letters: E n_routed_experts, F intermediate_size, D hidden_size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dsv3.params.optimizers import MAX_BATCH_NUMBERS
from dsv3.params.train import TrainParams
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x³ and x⁵: the steepest rise from zero whose fixed band (0.7 to 1.2) lies close enough around 1."""

UPDATE_RMS = 0.2
"""Root mean square of AdamW's update in practice, which Muon's is scaled to."""

NOT_DECAYED = "adamw_not_decayed"
"""The group that AdamW updates without weight decay."""


def parameter_groups(model: DeepseekV3ForCausalLM, params: TrainParams) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices, and what is never decayed (norms, biases, embeddings; report, 4.2).

    The output head and the router are matrices of AdamW, whatever `optim` is. A head that is tied to the
    embedding counts as the embedding.
    """
    embeddings = {id(parameter) for m in model.modules() if isinstance(m, nn.Embedding) for parameter in m.parameters()}
    by_adamw = {id(parameter) for parameter in model.lm_head.parameters()}
    by_adamw |= {id(parameter) for _, router in model.routers() for parameter in router.parameters()}
    members: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            members[NOT_DECAYED].append((name, parameter))
        else:
            members["adamw" if id(parameter) in by_adamw else params.optim].append((name, parameter))
    return [
        {
            "name": group,
            "params": [parameter for _, parameter in members[group]],
            "num_parts": [2 if name.endswith("gate_up_proj") else 1 for name, _ in members[group]],
            "weight_decay": 0.0 if group == NOT_DECAYED else params.weight_decay,
        }
        for group in dict.fromkeys((NOT_DECAYED, "adamw", params.optim))
        if members[group]
    ]


@dataclass(frozen=True)
class Settings:
    """What an update needs besides its group."""

    params: TrainParams
    moments_dtype: torch.dtype
    """fp32 or, with `adam_moments_dtype: bf16`, bf16; the arithmetic is fp32 in both cases."""
    newton_schulz_dtype: torch.dtype
    """Of Muon's matrix products: bf16 where the device multiplies it natively."""

    def zeros(self, parameter: Tensor) -> Tensor:
        """Return a moment of `parameter` before the first step."""
        return torch.zeros_like(parameter, dtype=self.moments_dtype, memory_format=torch.preserve_format)


class Optimizer(torch.optim.Optimizer):
    """Updates each group by the optimizer that it is named after; one flat state_dict, which resumes bit-exactly."""

    def __init__(self, groups: list[dict[str, Any]], params: TrainParams, newton_schulz_dtype: torch.dtype) -> None:
        moments_dtype = torch.bfloat16 if params.adam_moments_dtype == "bf16" else torch.float32
        self._settings = Settings(params, moments_dtype, newton_schulz_dtype)
        super().__init__(groups, {"lr": params.learning_rate})

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next step, in all groups."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change every parameter that has a gradient, at its group's `lr`."""
        assert closure is None, "the gradients are computed once, before the step"
        for group in self.param_groups:
            UPDATES[group["name"]](group, self.state, self._settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; torch turns every tensor into its parameter's type, and moments back into theirs here."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(self._settings.moments_dtype)


States = MutableMapping[Tensor, dict[str, Tensor]]
"""The state of each parameter, empty before its first step."""


def update_by_adamw(group: dict[str, Any], states: States, settings: Settings) -> None:
    """Apply AdamW, by torch's fused kernel."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        if not (state := states[parameter]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = settings.zeros(parameter), settings.zeros(parameter)
    apply = _fused_adamw if settings.moments_dtype == torch.float32 else _adamw_with_bf16_moments
    apply(group, parameters, [states[parameter] for parameter in parameters], settings.params)


def _fused_adamw(
    group: dict[str, Any], parameters: list[Any], states: list[dict[str, Tensor]], params: TrainParams
) -> None:
    """Apply torch's fused AdamW: one kernel for the whole group on CUDA, one loop per tensor on a CPU."""
    adamw(
        parameters,
        [parameter.grad for parameter in parameters],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=params.adam_beta1,
        beta2=params.adam_beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=params.adam_epsilon,
        maximize=False,
    )


def _adamw_with_bf16_moments(
    group: dict[str, Any], parameters: list[Any], states: list[dict[str, Tensor]], params: TrainParams
) -> None:
    """Apply the same parameter by parameter: moments are widened to fp32, used, and rounded back.

    A step changes the second moment by up to 5 % (1 - beta2), far above bf16's 0.4 %, so rounding to nearest
    does not stall it. torch's kernel takes no moments of another type than the parameters (2.11 on an H100).
    """
    for parameter, state in zip(parameters, states, strict=True):
        wide = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
        _fused_adamw(group, [parameter], [state | wide], params)
        for name, moment in wide.items():
            state[name].copy_(moment)


def update_by_muon(group: dict[str, Any], states: States, settings: Settings) -> None:
    """Apply Muon: Nesterov momentum, orthogonalized in batches of matrices of one shape."""
    momentum = settings.params.muon_momentum
    matrices: list[Matrices] = []
    for parameter, num_parts in zip(group["params"], group["num_parts"], strict=True):
        if parameter.grad is None:
            continue
        state = states[parameter]
        if not state:
            state["momentum_buffer"] = settings.zeros(parameter)
        average = torch.lerp(state["momentum_buffer"].float(), parameter.grad, 1 - momentum)
        state["momentum_buffer"].copy_(average)
        ahead = torch.lerp(parameter.grad, average, momentum)
        matrices.append(Matrices.of(parameter, ahead.to(settings.newton_schulz_dtype), num_parts))
    for batch in same_shape_batches(matrices):
        orthogonal = orthogonalized(torch.cat([item.update for item in batch]))
        for item, update in zip(batch, orthogonal.split([len(item.update) for item in batch]), strict=True):
            item.parameter.mul_(1 - group["lr"] * group["weight_decay"])
            item.parameter.add_(item.as_parameter(update), alpha=-group["lr"] * item.scale)


UPDATES: dict[str, Callable[[dict[str, Any], States, Settings], None]] = {
    NOT_DECAYED: update_by_adamw,
    "adamw": update_by_adamw,
    "muon": update_by_muon,
}
"""How each group is changed; the names but the first are those of `dsv3.params.optimizers.OPTIMIZERS`."""


@dataclass(frozen=True)
class Matrices:
    """A parameter's update as a batch of wide matrices (rows <= columns), and the way back."""

    parameter: Tensor
    update: Tensor
    is_transposed: bool

    @classmethod
    def of(cls, parameter: Tensor, update: Tensor, num_parts: int) -> "Matrices":
        """Cut `update` into its matrices: experts apart, and the `num_parts` maps stacked along the rows apart."""
        rows, columns = update.shape[-2] // num_parts, update.shape[-1]
        batch = update.reshape(-1, rows, columns)
        is_transposed = rows > columns
        return cls(parameter, batch.mT if is_transposed else batch, is_transposed)

    @property
    def scale(self) -> float:
        """Return the factor that gives an orthogonal matrix of this shape AdamW's root mean square."""
        return UPDATE_RMS * max(self.update.shape[-2:]) ** 0.5

    def as_parameter(self, update: Tensor) -> Tensor:
        """Return `update`, shaped like `self.update`, in the parameter's shape and type."""
        matrices = update.mT if self.is_transposed else update
        return matrices.reshape(self.parameter.shape).to(self.parameter.dtype)


def same_shape_batches(matrices: Iterable[Matrices]) -> Iterator[list[Matrices]]:
    """Yield lists of equally shaped matrices, none much larger than `MAX_BATCH_NUMBERS`."""
    by_shape: dict[torch.Size, list[Matrices]] = defaultdict(list)
    for item in matrices:
        by_shape[item.update.shape[-2:]].append(item)
    for items in by_shape.values():
        batch: list[Matrices] = []
        for item in items:
            if batch and sum(other.update.numel() for other in batch) + item.update.numel() > MAX_BATCH_NUMBERS:
                yield batch
                batch = []
            batch.append(item)
        yield batch


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return the orthogonal factor of each matrix of a batch (..., n, m), n <= m, singular values within 0.7 to 1.2.

    The iteration needs singular values of at most 1; dividing by the Frobenius norm sees to that.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
