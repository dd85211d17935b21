"""What a CUDA graph asks of a function, asked on a CPU: operations recorded once and repeated on the very same memory."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Numbers go to the host, sizes depend on numbers, or Python's data becomes a tensor: none of it can be in a graph.
FORBIDDEN = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
}


class NotCapturable(Exception):
    pass


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class NoData(TorchFunctionMode):
    """Refuses tensors made of what the host holds, which the operations below do not show."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            raise NotCapturable(f"{func.__name__} in a loop")
        return func(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Refuses operations that a graph cannot hold; keeps the others."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.no_data = NoData()

    def __enter__(self):
        self.no_data.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.no_data.__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in FORBIDDEN or by_mask or len({tensor.device for tensor in tensors(args)}) > 1:
            raise NotCapturable(f"{name} in a loop")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def memory(tensor):
    """Where a tensor's numbers are; weights in blocks of oneDNN's have no such place, and never change."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None


class Recording:
    """In place of `core.graphs.Replayed`: once it was prepared one call is recorded, and later ones only repeat it."""

    n_repeated = 0

    def __init__(self, function, side):
        self.function, self.n_calls, self.prepared, self.calls = function, 0, False, None

    def prepare(self):
        self.prepared = self.n_calls > 0
        return self.prepared and self.calls is None

    def __call__(self):
        self.n_calls += 1
        if self.calls is None and not self.prepared:
            self.function()
        elif self.calls is None:
            with OnDevice() as recorded:
                self.function()
            self.calls = recorded.calls
        else:
            Recording.n_repeated += 1
            for call in self.calls:
                repeat(*call)


def repeat(func, args, kwargs, out):
    """An operation once more, its result where it was the first time; a view shows what it shows."""
    given = {memory(tensor) for tensor in tensors((args, kwargs))}
    if func._schema.is_mutable:
        func(*args, **kwargs)
    elif not any(memory(tensor) in given for tensor in tensors(out)):
        for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
            old.copy_(new)
