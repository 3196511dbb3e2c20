"""Check in 2 processes of `accelerate launch` that compiled layers learn the same as others under DDP."""

import copy

import torch
from torch import Tensor, nn

from detr_dist.distributed import build_accelerator
from detr_dist.models.optimizations import compile_regions, num_compiled_graphs


class EncoderLayer(nn.Sequential):
    """A layer, as the library's by its name."""


class Network(nn.Module):
    """Network with the layout of the library's, reduced to the minimum because compiling C++ takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.backbone, self.model.encoder, self.model.decoder = nn.Module(), nn.Module(), nn.Module()
        self.model.backbone.model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU())
        self.model.encoder.layers = nn.ModuleList([EncoderLayer(nn.Linear(4, 4), nn.Sigmoid())])
        self.model.decoder.layers = nn.ModuleList()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.backbone.model(images).flatten(2).mT
        for layer in self.model.encoder.layers:
            features = layer(features)
        return features


def main() -> None:
    accelerator = build_accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    torch.manual_seed(0)
    plain = Network()
    compiled = copy.deepcopy(plain)
    compile_regions(compiled)
    torch.manual_seed(1 + accelerator.process_index)
    images = torch.rand(2, 3, 8, 8)
    for network in (plain, compiled):
        accelerator.prepare(network)(images).square().sum().backward()
    assert num_compiled_graphs() == 2
    gradients = [[each.grad for each in network.parameters()] for network in (plain, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0])  # of both processes' images
    accelerator.end_training()
    print(f"process {accelerator.process_index} learns the same")


if __name__ == "__main__":
    main()
