"""FSDP2 and DTensor shard quantized weights by rows and gather their parts, on gloo ranks of this machine."""

import subprocess
import sys

import pytest

_PROGRAM = """
import os, sys, time, warnings
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
import lowbit
from lowbit.tensor import LowbitFallbackWarning

def linears(n):
    return [torch.nn.Linear(128, n), torch.nn.ReLU(), torch.nn.Linear(n, 64)], torch.randn(4, 128)

def convolutions(n):
    return [torch.nn.Conv2d(32, n, 2), torch.nn.ReLU(), torch.nn.Conv2d(n, 64, 1)], torch.randn(2, 32, 3, 3)

def fsdp(spec, world, layers):
    model = torch.nn.Sequential(*layers[0])
    lowbit.quantize_(model[0], spec, layout="plain")  # as shards are: packed ones add up in another order
    x = layers[1].requires_grad_()
    expected = model(x)
    expected.square().sum().backward()
    gradient, whole = x.grad.clone(), model[0].weight.nbytes_stored()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = model[0].weight.to_local()
    assert isinstance(local, lowbit.QuantizedTensor), type(local)
    assert local.nbytes_stored() <= whole // world + 8192, "a shard is its part of the weight, in few bits"
    for _ in range(2):
        x.grad = None
        found = model(x)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        torch.testing.assert_close(x.grad, gradient)

def dtensor(spec, world, n):
    torch.manual_seed(1)
    w = lowbit.QuantizedTensor.quantize(torch.randn(n, 128), spec)
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(w, mesh, [Shard(0)])
    local, whole = sharded.to_local(), sharded.full_tensor()
    assert isinstance(local, lowbit.QuantizedTensor) and isinstance(whole, lowbit.QuantizedTensor)
    assert torch.equal(whole.qdata.view(torch.uint8), w.qdata.view(torch.uint8))
    x = torch.randn(3, 128)
    expected = torch.nn.functional.linear(x, w)
    torch.testing.assert_close(torch.nn.functional.linear(x, whole), expected, rtol=1e-4, atol=1e-4)
    product = torch.nn.functional.linear(distribute_tensor(x, mesh, [Replicate()]), sharded).full_tensor()
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
    copied = distribute_tensor(w, mesh, [Replicate()]).to_local()
    assert torch.equal(copied, w)

def run(rank, world, file, specs):
    warnings.simplefilter("error", LowbitFallbackWarning)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{file}")
    torch.manual_seed(0)
    for spec in specs:
        for n in (128, 70, 33):
            fsdp(spec, world, linears(n))
            dtensor(spec, world, n)
        fsdp(spec, world, convolutions(70))
    leave_together(rank, world, file)

def leave_together(rank, world, file):
    # gloo aborts a rank whose peer closes its connections while it still waits for the last message of a barrier
    open(f"{file}.done{rank}", "w").close()
    for _ in range(600):
        if all(os.path.exists(f"{file}.done{other}") for other in range(world)):
            os._exit(0)
        time.sleep(0.1)
    raise TimeoutError("another rank never finished")

if __name__ == "__main__":
    world, file, *specs = sys.argv[1:]
    torch.multiprocessing.spawn(run, (int(world), file, specs), nprocs=int(world))
    print("sharded and equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "specs"),
    [
        (2, ["fp8_e4m3(granularity=row)", "awq_w4a16", "svdquant_w4a4(rank=4)"]),
        (3, ["nvfp4", "int8(granularity=block,block_size=32x64)"]),
    ],
)
def test_ranks_hold_their_rows_and_compute_the_same(world, specs, tmp_path):
    """Each rank holds its packed rows, even and ragged; outputs are bit-equal to one process, gradients equal.

    DTensor scatters, multiplies and gathers the same weights; nothing is dequantized anywhere.
    """
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)

    done = subprocess.run(
        [sys.executable, program, str(world), tmp_path / "rendezvous", *specs],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert "sharded and equal" in done.stdout, done.stderr[-3000:]
