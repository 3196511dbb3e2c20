"""Run under `accelerate launch` with 2 processes: buffers that differ are the main process's after synchronising."""

import torch

from detr_dist.distributed import HostGroup, build_accelerator


def main() -> None:
    accelerator = build_accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    host = HostGroup(accelerator)
    assert host.num_processes == 2
    model = accelerator.prepare(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)))
    torch.manual_seed(accelerator.process_index)
    for _ in range(2):
        model(torch.rand(2, 3, 8, 8)).sum().backward()
    norm = accelerator.unwrap_model(model)[1]
    before = host.all_gather_objects(norm.running_mean.clone())
    assert not torch.equal(before[0], before[1])
    host.synchronise_buffers(accelerator.unwrap_model(model))
    after = host.all_gather_objects(norm.running_mean)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[0])
    assert host.gather_rows([host.process_index, 2.5]) == [[0.0, 2.5], [1.0, 2.5]]
    assert host.broadcast(host.process_index) == 0
    assert host.gather_objects(host.process_index) == ([0, 1] if host.process_index == 0 else [])
    try:
        host.on_main_process(lambda: 1 / 0)
    except Exception as error:
        assert "ZeroDivisionError" in str(error)
    else:
        raise AssertionError("an error of the main process must reach all")
    accelerator.end_training()
    print(f"process {host.process_index} agrees")


if __name__ == "__main__":
    main()
