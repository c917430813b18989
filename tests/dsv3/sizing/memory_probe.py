"""What torch really keeps and really allocates, in bytes: the measure of the sizing package's estimates."""

import time
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

    FSDP empties and refills storages behind torch's dispatcher, by `resize_`, which is watched. A view returns no
    storage of its own; what a collective's library copies for itself is so left out.
    """

    def __init__(self, known):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {}
        for tensor in known:
            self.add(tensor)

    def add(self, tensor):
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.elem
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            weakref.finalize(storage, self.resize, id(storage), None)
            self.sizes[id(storage)] = 0
            self.resize(id(storage), storage.nbytes())

    def resize(self, key, num_bytes):
        self.live += (num_bytes or 0) - self.sizes[key]
        if num_bytes is None:
            del self.sizes[key]
        else:
            self.sizes[key] = num_bytes
        if self.live > self.peak:
            time.sleep(0.002)  # threads of the collectives may hold what they have sent a little longer
            self.peak = max(self.peak, self.live)

    def __enter__(self):
        resize = self.torchs_resize = torch.UntypedStorage.resize_

        def watched(storage, num_bytes):
            resize(storage, num_bytes)
            if id(storage) in self.sizes:
                self.resize(id(storage), storage.nbytes())
            return storage

        torch.UntypedStorage.resize_ = watched
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.torchs_resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in tree_iter(out):
                if isinstance(tensor, torch.Tensor):
                    self.add(tensor)
        return out
