"""Runs a script or a module as if a GPU were there.

    python .ci/pretend_gpu.py train.py --rounds 2 …
    python .ci/pretend_gpu.py -m examples.adapt_folder RUN IMAGES --out DIR

Needs no GPU and no compiler. A tensor moved to "cuda" becomes an `OnGpu`: the same values on the
CPU, but it says that it lies on cuda:0, and, as with a real GPU, it is an error if one operation
takes tensors of both devices or a generator of the other device, or if `numpy()` is called. Numbers
(tensors without axes), indices and copies may be mixed, as on a real one. Only calls from Python
are seen. Speed, memory, rounding and the order of sums are the CPU's, and autocast of "cuda" is
that of "cpu". At the end stands how often the CPU would have waited for the GPU.
"""

import collections
import os
import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_}
READS = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__,
    Tensor.__index__, Tensor.nonzero, torch.nonzero, torch.equal}
waits = collections.Counter()


class OnGpu(Tensor):
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo: dict) -> "OnGpu":
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy.__dict__.update(vars(self))  # that it is a parameter
            memo[id(self)] = copy
        return memo[id(self)]


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        new = super().__new__(cls)
        new.place = torch.device(device).type
        return new

    device = property(lambda self: CUDA if self.place == "cuda" else CPU)


def leaves_of(value) -> list:
    """What tuples, lists and dictionaries within each other hold."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return [value]
    leaves = []
    for part in value:
        if isinstance(part, (tuple, list, dict)):
            leaves.extend(leaves_of(part))
        else:
            leaves.append(part)
    return leaves


def asks_for_gpu(value) -> bool | None:
    """Whether this argument asks for the GPU or for the CPU; None: it is no device."""
    if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"):
        value = torch.device(value)
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return None


def result_on_gpu(function, values: tuple, tensors: list) -> bool:
    """Where the result of a call lies."""
    if function in (Tensor.cpu, Tensor.cuda):
        return function is Tensor.cuda
    if function is Tensor.copy_:
        return isinstance(tensors[0], OnGpu)
    for value in values:
        asked = asks_for_gpu(value)
        if asked is not None:
            return asked
    if function is Tensor.to:  # like another tensor, or only to another type
        return isinstance(tensors[-1], OnGpu)
    return any(isinstance(tensor, OnGpu) for tensor in tensors)


def refuse_mixed(function, name: str, values: tuple) -> None:
    """Raise if the tensors of a call lie on two devices."""
    if function in MOVES:
        return
    if name in ("__getitem__", "__setitem__"):
        values = (values[0], *values[2:])  # an index may lie on the CPU
    places = set()
    for value in leaves_of(values):
        if isinstance(value, OnGpu):
            places.add("cuda")
        elif isinstance(value, Tensor) and value.dim():
            places.add("cpu")
    if len(places) > 1:
        raise RuntimeError(f"{name}: all tensors must lie on one device, not on two")


class PretendedGpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "?")
        if function is torch.device or name == "_has_compatible_shallow_copy_type":
            return function(*args, **kwargs)
        if name == "_parse_to":  # of module.to, for which a tensor may stand for its device
            device, *others = function(*args, **kwargs)
            if args and isinstance(args[0], OnGpu):
                device = CUDA
            return device, *others

        values = (*args, *kwargs.values())
        leaves = leaves_of(values)
        tensors = [value for value in leaves if isinstance(value, Tensor)]
        takes_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
        on_gpu = result_on_gpu(function, values, tensors)
        if takes_gpu:
            refuse_mixed(function, name, values)
        for value in leaves:
            if isinstance(value, torch.Generator):
                if (getattr(value, "place", "cpu") == "cuda") != on_gpu:
                    raise RuntimeError(f"{name}: the generator lies on the other device")
        if takes_gpu and name in ("numpy", "__array__"):
            raise TypeError("cannot convert a tensor on cuda:0 to numpy")
        if takes_gpu and (function in READS or function in MOVES and not on_gpu):
            waits[name] += 1

        if function is Tensor.cuda:
            function, args = Tensor.to, (args[0], CPU)
        args = [value if asks_for_gpu(value) is None else CPU for value in args]
        for key, value in kwargs.items():
            if asks_for_gpu(value) is not None:
                kwargs = kwargs | {key: CPU}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            if args and result is args[0]:  # a move to the other device is a copy
                if function in MOVES and isinstance(result, OnGpu) != on_gpu:
                    result = result.clone()
            return placed(result, on_gpu)


def placed(result, on_gpu: bool):
    """The result of a call with all its tensors on one device."""
    if isinstance(result, Tensor):
        if isinstance(result, OnGpu) == on_gpu:
            return result
        return result.as_subclass(OnGpu if on_gpu else Tensor)
    if not any(isinstance(leaf, Tensor) for leaf in leaves_of(result)):
        return result
    if isinstance(result, dict):
        return {key: placed(value, on_gpu) for key, value in result.items()}
    parts = [placed(value, on_gpu) for value in result]
    if hasattr(result, "_fields"):  # a NamedTuple
        return type(result)(*parts)
    return type(result)(parts)


real_vmap = torch.vmap


def vmap(function, *options, **more_options):
    """torch.vmap; within it no tensor says where it lies, so its inputs and results are checked."""
    mapped = real_vmap(function, *options, **more_options)

    def on_one_device(*inputs):
        refuse_mixed(real_vmap, "vmap", inputs)
        on_gpu = any(isinstance(leaf, OnGpu) for leaf in leaves_of(inputs))
        return placed(mapped(*inputs), on_gpu)

    return on_one_device


def pretend() -> None:
    """To be called before the script is imported."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to: new parameters
    torch.Generator = Generator
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        setattr(torch, name, lambda kind, real=real: real("cpu"))
    torch.vmap = vmap
    torch.func.vmap = vmap
    real_autocast = torch.autocast
    torch.autocast = lambda kind, *args, **kwargs: real_autocast("cpu", *args, **kwargs)
    answers = {
        "is_available": True, "get_device_name": "pretended GPU", "device_count": 1,
        "set_device": None, "max_memory_allocated": 0, "synchronize": None,
        "is_current_stream_capturing": False}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def main() -> None:
    pretend()
    del sys.argv[0]
    as_module = sys.argv[0] == "-m"
    if as_module:
        del sys.argv[0]
        sys.path.insert(0, os.getcwd())
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    with PretendedGpu():
        try:
            if as_module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print("the CPU waits for the GPU:", dict(waits))


if __name__ == "__main__":
    main()
