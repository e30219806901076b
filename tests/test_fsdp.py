"""FSDP2 shards quantized weights by rows and gathers their parts, on two gloo ranks of this machine."""

import subprocess
import sys

import pytest

_PROGRAM = """
import os, sys, warnings
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import lowbit
from lowbit.tensor import LowbitFallbackWarning

def run(rank, spec, file):
    warnings.simplefilter("error", LowbitFallbackWarning)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{file}")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    lowbit.quantize_(model, spec)
    x = torch.randn(4, 256)
    expected = model(x)
    whole = model[0].weight.nbytes_stored()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = model[0].weight.to_local()
    assert isinstance(local, lowbit.QuantizedTensor), type(local)
    assert local.nbytes_stored() <= whole // 2 + 4096, "the shard is half of the weight, in few bits"
    for _ in range(2):
        assert torch.equal(model(x), expected)
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(run, tuple(sys.argv[1:]), nprocs=2)
    print("sharded and equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["fp8_e4m3(granularity=row)", "nvfp4", "awq_w4a16", "int8(granularity=block,block_size=32x64)"]
)
def test_two_ranks_hold_half_the_rows_and_compute_the_same(spec, tmp_path):
    """Each rank holds half of the packed rows, nothing is dequantized, and outputs are bit-equal to one process."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)

    done = subprocess.run(
        [sys.executable, program, spec, tmp_path / "rendezvous"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert "sharded and equal" in done.stdout, done.stderr[-3000:]
