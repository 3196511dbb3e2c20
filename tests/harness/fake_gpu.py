"""A fake GPU for hosts without one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensorMode


@contextmanager
def moved_to_fake_gpu(module: torch.nn.Module) -> Iterator[None]:
    """Move a module to a fake GPU: its tensors have a device and a shape, but no values.

    Inside the context this is also true for new tensors. Operations on them work, except backward passes.
    """
    with FakeTensorMode():
        moved: dict[torch.Tensor, torch.Tensor] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in moved:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        moved[tensor] = (
                            torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                        )
                    tensors[name] = moved[tensor]
        yield
