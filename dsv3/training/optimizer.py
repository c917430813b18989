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
projections are stored as one (E, 2I, H) stack and are orthogonalised apart, for they are two maps.

What we give up: every process of a distributed run orthogonalises every matrix, where sharding them would save time.

Letters: E n_routed_experts, I moe_intermediate_size, H hidden_size.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dsv3.params.train import TrainParams
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x³ and x⁵: the steepest rise from zero whose fixed band (0.7 to 1.2) lies close enough around 1."""

UPDATE_RMS = 0.2
"""Root mean square of AdamW's update in practice, which Muon's is scaled to."""

MAX_BATCH_NUMBERS = 1 << 26
"""Most numbers orthogonalised in one call: 256 MiB in fp32, so that large models need little extra memory."""


def parameter_groups(model: DeepseekV3ForCausalLM, params: TrainParams) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices, and what is never decayed (norms, biases, embeddings; report, 4.2).

    The output head and the router are matrices of AdamW: decayed, not orthogonalised. A head that is tied to the
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
            members["adamw_not_decayed"].append((name, parameter))
        elif params.optim == "adamw" or id(parameter) in by_adamw:
            members["adamw"].append((name, parameter))
        else:
            members["muon"].append((name, parameter))
    return [
        {
            "name": group,
            "params": [parameter for _, parameter in members[group]],
            "num_parts": [2 if name.endswith("gate_up_proj") else 1 for name, _ in members[group]],
            "weight_decay": 0.0 if group == "adamw_not_decayed" else params.weight_decay,
        }
        for group in ("adamw_not_decayed", "adamw", "muon")
        if members[group]
    ]


class Optimizer(torch.optim.Optimizer):
    """AdamW for the groups named adamw*, Muon for the group muon; one flat state_dict, which resumes bit-exactly.

    Moments are kept in fp32 or, with `adam_moments_dtype: bf16`, in bf16; the arithmetic is fp32 in both cases.
    `newton_schulz_dtype` is the type of Muon's matrix products: bf16 where the device multiplies it natively.
    """

    def __init__(self, groups: list[dict[str, Any]], params: TrainParams, newton_schulz_dtype: torch.dtype) -> None:
        self._params = params
        self._moments_dtype = torch.bfloat16 if params.adam_moments_dtype == "bf16" else torch.float32
        self._newton_schulz_dtype = newton_schulz_dtype
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
            if group["name"] == "muon":
                self._muon(group)
            elif self._moments_dtype == torch.float32:
                self._adamw(group)
            else:
                self._adamw_with_bf16_moments(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; torch turns every tensor into its parameter's type, and moments back into theirs here."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if name in state:
                    state[name] = state[name].to(self._moments_dtype)

    def _zeros(self, parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter, dtype=self._moments_dtype, memory_format=torch.preserve_format)

    def _adam_state(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
        """Return the parameters that have gradients, the gradients, and their states."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = self._zeros(parameter), self._zeros(parameter)
        return parameters, [parameter.grad for parameter in parameters], [self.state[p] for p in parameters]

    def _adamw(self, group: dict[str, Any]) -> None:
        """Apply torch's fused AdamW: one kernel for the whole group on CUDA, one loop per tensor on a CPU."""
        parameters, gradients, states = self._adam_state(group)
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self._params.adam_beta1,
            beta2=self._params.adam_beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._params.adam_epsilon,
            maximize=False,
        )

    def _adamw_with_bf16_moments(self, group: dict[str, Any]) -> None:
        """Apply AdamW parameter by parameter: moments are widened to fp32, used, and rounded back.

        A step changes the second moment by up to 5 % (1 - beta2), far above bf16's 0.4 %, so rounding to nearest
        does not stall it.
        """
        beta1, beta2 = self._params.adam_beta1, self._params.adam_beta2
        for parameter, gradient, state in zip(*self._adam_state(group), strict=True):
            state["step"] += 1
            step = state["step"].item()
            mean = torch.lerp(state["exp_avg"].float(), gradient.float(), 1 - beta1)
            square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            state["exp_avg"].copy_(mean)
            state["exp_avg_sq"].copy_(square)
            denominator = square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(self._params.adam_epsilon)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))

    def _muon(self, group: dict[str, Any]) -> None:
        """Apply Muon: Nesterov momentum, orthogonalised in batches of matrices of one shape."""
        momentum = self._params.muon_momentum
        matrices: list[Matrices] = []
        for parameter, num_parts in zip(group["params"], group["num_parts"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = self._zeros(parameter)
            average = torch.lerp(state["momentum_buffer"].float(), parameter.grad, 1 - momentum)
            state["momentum_buffer"].copy_(average)
            ahead = torch.lerp(parameter.grad, average, momentum)
            matrices.append(Matrices.of(parameter, ahead.to(self._newton_schulz_dtype), num_parts))
        for batch in same_shape_batches(matrices):
            orthogonal = orthogonalized(torch.cat([item.update for item in batch]))
            for item, update in zip(batch, orthogonal.split([len(item.update) for item in batch]), strict=True):
                item.parameter.mul_(1 - group["lr"] * group["weight_decay"])
                item.parameter.add_(item.as_parameter(update), alpha=-group["lr"] * item.scale)


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
