"""Check in 2 processes of `accelerate launch` that buffers equal the main process's after synchronising."""

import copy

import torch
from torch import Tensor, nn

from detr_dist.distributed import HostGroup, build_accelerator
from detr_dist.training.strategy import Replicated


class Network(nn.Module):
    """Network of one trained batch norm, called like a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.trial_edge, self.denoising = 8, None

    def forward(
        self, images: Tensor, sizes_hw: Tensor, is_padded: bool = True, denoising: None = None
    ) -> dict[str, Tensor]:
        return {"features": self.norm(self.convolution(images.float()))}


def main() -> None:
    accelerator = build_accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    host = HostGroup(accelerator)
    assert host.num_processes == 2
    alone = Network()
    alone.load_state_dict(host.broadcast(alone.state_dict()))
    trained = copy.deepcopy(alone)
    model, _ = Replicated().prepare(accelerator, trained, torch.optim.SGD(trained.parameters()))
    torch.manual_seed(accelerator.process_index)
    for _ in range(2):
        images = torch.rand(2, 3, 8, 8)
        model(images, torch.tensor([[8, 8]] * 2))["features"].sum().backward()
        alone(images, torch.tensor([[8, 8]] * 2))
    norm = trained.norm
    before = host.all_gather_objects(norm.running_mean.clone())
    assert not torch.equal(before[0], before[1])
    assert torch.equal(norm.running_mean, alone.norm.running_mean)  # no process sends its buffers in a forward pass
    host.synchronise_buffers(trained)
    after = host.all_gather_objects(norm.running_mean)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[0])
    assert host.gather_rows([host.process_index, 2.5]) == [[0.0, 2.5], [1.0, 2.5]]
    assert host.broadcast(host.process_index) == 0
    assert host.gather_objects(host.process_index) == ([0, 1] if host.process_index == 0 else [])
    try:
        with host.failing_together():
            if host.is_main_process:
                raise ZeroDivisionError("by zero")
    except Exception as error:
        assert "by zero" in str(error)
    else:
        raise AssertionError("an error of the main process must reach all")
    accelerator.end_training()
    print(f"process {host.process_index} agrees")


if __name__ == "__main__":
    main()
