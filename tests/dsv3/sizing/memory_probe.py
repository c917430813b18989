"""What torch really keeps and really allocates, in bytes: the measure of the sizing package's estimates."""

import weakref

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def saved_bytes(run, known):
    """Bytes of all storages that autograd keeps of `run()`, each once, without those of the tensors in `known`."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage  # held, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(storage.nbytes() for storage in storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, of the tensors in `known` and of all that operators return."""

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self.seen = weakref.WeakSet()
        for tensor in known:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, num_bytes):
        self.live -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


class HeldBytes(TorchDispatchMode):
    """Finds the most bytes that all storages hold together, of the tensors in `known` and of what operators return.

    It looks at each storage's size again after every operator, for FSDP empties and refills storages behind torch's
    dispatcher. A view returns no storage of its own; what a collective's library copies for itself is so left out.
    """

    def __init__(self, known):
        super().__init__()
        self.peak = 0
        self.storages = weakref.WeakSet()
        for tensor in known:
            self.add(tensor)

    def add(self, tensor):
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.elem
        self.storages.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return out
