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

Where the training is sharded (`dsv3.training.sharding`), AdamW and the experts' matrices need nothing of the others:
each process has its own numbers, and whole matrices. Of any other matrix it has some rows. Those go to one process,
the matrix's owner, which orthogonalizes and sends them back: one exchange each way for all matrices, about as many
multiplications for each process.

The moments may lie in the CPU's memory (`runtime.cpu_offload: optimizer`): for the update they are copied to the device
and back, one parameter's at a time. The numbers are the same; the alternative, to update on the CPU, would move as much
(weights and gradients) and multiply Muon's matrices there.

What we give up: replicas (`runtime.sharding: none`) each orthogonalize every matrix.

Letters: E n_routed_experts, F intermediate_size, D hidden_size, R rows, W columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from dsv3.params.optimizers import MAX_BATCH_NUMBERS
from dsv3.params.train import TrainParams
from dsv3.training.sharding import local, shard_like
from mini_model.modeling_deepseek import DeepseekV3ForCausalLM

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x³ and x⁵: the steepest rise from zero whose fixed band (0.7 to 1.2) lies close enough around 1."""

UPDATE_RMS = 0.2
"""Root mean square of AdamW's update in practice, which Muon's is scaled to."""

NOT_DECAYED = "adamw_not_decayed"
"""The group that AdamW updates without weight decay."""

AVERAGE = "average"
"""In a parameter's state: its exponential moving average (`dsv3.training.averaging`)."""


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
    offloads: bool = False
    """Whether moments lie in the CPU's memory, wherever their parameters are."""

    def stored(self, moment: Tensor, parameter: Tensor) -> Tensor:
        """Return `moment` as it lies between two steps: in its type and place."""
        return self.placed(moment.to(self.moments_dtype), parameter)

    def placed(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Return a tensor of the state in its place between two steps, pinned where a device fetches it."""
        tensor = tensor.to(torch.device("cpu") if self.offloads else parameter.device)
        return tensor.pin_memory() if self.offloads and parameter.is_cuda and not tensor.is_pinned() else tensor

    def zeros(self, parameter: Tensor) -> Tensor:
        """Return a moment of `parameter` before the first step."""
        dtype, device = self.moments_dtype, torch.device("cpu") if self.offloads else None
        zeros = torch.zeros_like(parameter, dtype=dtype, device=device, memory_format=torch.preserve_format)
        return self.stored(zeros, parameter)


class Optimizer(torch.optim.Optimizer):
    """Updates each group by the optimizer that it is named after; one flat state_dict, which resumes bit-exactly."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: TrainParams,
        newton_schulz_dtype: torch.dtype,
        offloads: bool = False,
    ) -> None:
        moments_dtype = torch.bfloat16 if params.adam_moments_dtype == "bf16" else torch.float32
        self._settings = Settings(params, moments_dtype, newton_schulz_dtype, offloads)
        super().__init__(groups, {"lr": params.learning_rate})
        self._ema_decay = params.ema_decay

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next step, in all groups."""
        for group in self.param_groups:
            group["lr"] = learning_rate

    def set_ema_decay(self, ema_decay: float) -> None:
        """Set how much of the averages the next step keeps; 0: there are none."""
        self._ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change every parameter that has a gradient, at its group's `lr`."""
        assert closure is None, "the gradients are computed once, before the step"
        for group in self.param_groups:
            UPDATES[group["name"]](group, self.state, self._settings)
            if self._ema_decay:
                average_weights(group, self.state, self._settings, self._ema_decay)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and cut it as the parameters are where they are sharded.

        torch would make every moment of its parameter's type, put all of them where the parameters are, and go on with
        the weight decay of the training that wrote them.
        """
        own_decays = [group["weight_decay"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})  # says what differs
        for group, weight_decay in zip(self.param_groups, own_decays, strict=True):
            group["weight_decay"] = weight_decay
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name == AVERAGE and not self._settings.params.ema_decay:
                    continue
                own = shard_like(value, parameter)
                if name == "step":
                    kept = own.to(parameter.device)
                else:
                    is_moment = name != AVERAGE
                    kept = self._settings.stored(own, parameter) if is_moment else self._settings.placed(own, parameter)
                self.state[parameter][name] = kept


States = MutableMapping[Tensor, dict[str, Tensor]]
"""The state of each parameter, empty before its first step."""


def update_by_adamw(group: dict[str, Any], states: States, settings: Settings) -> None:
    """Apply AdamW, by torch's fused kernel."""
    own: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        if "exp_avg" not in (state := states[parameter]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = settings.zeros(parameter), settings.zeros(parameter)
        own.append((local(parameter), local(parameter.grad), {name: local(value) for name, value in state.items()}))
    if own:
        parameters, gradients, moments = (list(column) for column in zip(*own, strict=True))
        is_fused = settings.moments_dtype == torch.float32 or fuses_bf16_moments(parameters[0].device)
        if is_fused and not settings.offloads:
            _fused_adamw(group, parameters, gradients, moments, settings.params)
        else:
            dtype = settings.moments_dtype if is_fused else torch.float32
            _adamw_one_by_one(group, parameters, gradients, moments, settings.params, dtype)


@cache
def fuses_bf16_moments(device: torch.device) -> bool:
    """Return whether torch's fused AdamW takes bf16 moments of fp32 parameters there: CUDA, from some version on."""
    parameter, gradient, step = torch.zeros(3, 1, device=device)
    mean, square = torch.zeros(2, 1, device=device, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.state[parameter] = {"step": step[0], "exp_avg": mean, "exp_avg_sq": square}
    parameter.grad = gradient
    try:
        optimizer.step()
    except RuntimeError:
        return False
    return True


def _fused_adamw(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    params: TrainParams,
) -> None:
    """Apply torch's fused AdamW: one kernel for the whole group on CUDA, one loop per tensor on a CPU."""
    adamw(
        parameters,
        gradients,
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


def _adamw_one_by_one(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    params: TrainParams,
    dtype: torch.dtype,
) -> None:
    """Apply the same parameter by parameter: moments are brought to the device and widened to `dtype`, and back.

    For moments that lie elsewhere, and for devices where torch's kernel takes none of another type than the parameters
    (CPUs; torch 2.11 on an H100). A step changes the second moment by up to 5 % (1 - beta2), far above bf16's 0.4 %, so
    rounding to nearest does not stall it.
    """
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        here = {name: state[name].to(parameter.device, dtype) for name in ("exp_avg", "exp_avg_sq")}
        _fused_adamw(group, [parameter], [gradient], [state | here], params)
        for name, moment in here.items():
            state[name].copy_(moment)


def update_by_muon(group: dict[str, Any], states: States, settings: Settings) -> None:
    """Apply Muon: Nesterov momentum, orthogonalized in batches of matrices of one shape."""
    momentum = settings.params.muon_momentum
    whole: list[Matrices] = []
    some_rows: list[RowsOfMatrix] = []
    for parameter, num_parts in zip(group["params"], group["num_parts"], strict=True):
        if parameter.grad is None:
            continue
        state = states[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = settings.zeros(parameter)
        gradient, buffer = local(parameter.grad), local(state["momentum_buffer"])
        average = torch.lerp(buffer.to(gradient.device, torch.float32), gradient, 1 - momentum)
        buffer.copy_(average)
        ahead = torch.lerp(gradient, average, momentum).to(settings.newton_schulz_dtype)
        if isinstance(parameter, DTensor) and parameter.ndim == 2:
            some_rows.append(RowsOfMatrix(parameter, ahead, num_parts))
        elif ahead.numel():
            whole.append(Matrices.of(local(parameter), ahead, num_parts))
    for matrices, update in orthogonal_updates(whole):
        apply_update(group, matrices.parameter, matrices.as_parameter(update), matrices.scale)
    for rows, update in zip(some_rows, orthogonalize_rows(some_rows), strict=True):
        apply_update(group, local(rows.parameter), update.to(rows.parameter.dtype), rows.scale)


def apply_update(group: dict[str, Any], parameter: Tensor, update: Tensor, scale: float) -> None:
    """Decay a parameter, and subtract `update` times the learning rate and `scale`."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"] * scale)


UPDATES: dict[str, Callable[[dict[str, Any], States, Settings], None]] = {
    NOT_DECAYED: update_by_adamw,
    "adamw": update_by_adamw,
    "muon": update_by_muon,
}
"""How each group is changed; the names but the first are those of `dsv3.params.optimizers.OPTIMIZERS`."""


def average_weights(group: dict[str, Any], states: States, settings: Settings, ema_decay: float) -> None:
    """Move the group's averages towards its parameters; before the first step they are where the parameters are."""
    for parameter in group["params"]:
        state = states[parameter]
        if AVERAGE not in state:
            state[AVERAGE] = settings.placed(parameter.detach().clone(), parameter)
        weights, average = local(parameter), local(state[AVERAGE])
        average.copy_(average.to(weights.device).lerp_(weights, 1 - ema_decay))


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


def orthogonal_updates(matrices: Iterable[Matrices]) -> Iterator[tuple[Matrices, Tensor]]:
    """Yield each of `matrices` with its orthogonalized update, those of one shape together."""
    for batch in same_shape_batches(matrices):
        orthogonal = orthogonalized(torch.cat([item.update for item in batch]))
        yield from zip(batch, orthogonal.split([len(item.update) for item in batch]), strict=True)


@dataclass(frozen=True)
class RowsOfMatrix:
    """This process's rows of a sharded matrix's update."""

    parameter: DTensor
    update: Tensor
    num_parts: int

    @property
    def scale(self) -> float:
        """Return the factor of `Matrices.scale`, of the whole matrix."""
        num_rows, num_columns = self.parameter.shape
        return UPDATE_RMS * max(num_rows // self.num_parts, num_columns) ** 0.5


def orthogonalize_rows(matrices: Sequence[RowsOfMatrix]) -> list[Tensor]:
    """Orthogonalize each matrix's update on the matrix's owner; return this process's rows of it. A collective."""
    if not matrices:
        return []
    group: Any = matrices[0].parameter.device_mesh.get_group("shard")
    processes = range(dist.get_world_size(group))
    owners = balanced_owners([rows.parameter.shape for rows in matrices], len(processes))
    by_owner = [[rows for rows, owner in zip(matrices, owners, strict=True) if owner == r] for r in processes]
    owned = by_owner[dist.get_rank(group)]
    cuts = [rows_per_process(len(rows.parameter), len(processes)) for rows in owned]
    incoming = exchange(
        [[rows.update for rows in theirs] for theirs in by_owner],
        [[(cut[r], rows.parameter.shape[1]) for rows, cut in zip(owned, cuts, strict=True)] for r in processes],
        matrices[0].update,
        group,
    )
    pieces_of = zip(*incoming, strict=True)
    whole = [
        Matrices.of(rows.parameter, torch.cat(pieces), rows.num_parts)
        for rows, pieces in zip(owned, pieces_of, strict=True)
    ]
    updates = {id(item): item.as_parameter(update) for item, update in orthogonal_updates(whole)}
    outgoing = [updates[id(item)].split(cut) for item, cut in zip(whole, cuts, strict=True)]
    returned = exchange(
        [[pieces[r] for pieces in outgoing] for r in processes],
        [[tuple(rows.update.shape) for rows in theirs] for theirs in by_owner],
        local(matrices[0].parameter),
        group,
    )
    from_owner = [iter(pieces) for pieces in returned]
    return [next(from_owner[owner]) for owner in owners]


def balanced_owners(shapes: Sequence[tuple[int, ...]], num_processes: int) -> list[int]:
    """Return which process orthogonalizes each matrix: the costliest first, each to the process with the least work."""
    costs = [math.prod(shape) * min(shape) for shape in shapes]  # multiplications of one Newton-Schulz product
    owners, loads = [0] * len(shapes), [0] * num_processes
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def rows_per_process(num_rows: int, num_processes: int) -> list[int]:
    """Return how many rows of a sharded matrix each process has: torch gives all but the last ones as many."""
    most = -(-num_rows // num_processes)
    return [min(most, max(0, num_rows - r * most)) for r in range(num_processes)]


def exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Tensor, group: Any
) -> list[list[Tensor]]:
    """Send the tensors `sent[r]` to process r of the group; return those of `shapes[r]` that process r sends here.

    All have the type and device of `like`.
    """
    flat = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensors in sent for tensor in tensors)])
    sizes = [[math.prod(shape) for shape in theirs] for theirs in shapes]
    received = like.new_empty(sum(map(sum, sizes)))
    splits = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    dist.all_to_all_single(received, flat, [sum(theirs) for theirs in sizes], splits, group=group)
    pieces = iter(received.split([size for theirs in sizes for size in theirs]))
    return [[next(pieces).view(shape) for shape in theirs] for theirs in shapes]


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
