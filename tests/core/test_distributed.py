"""Two processes: the mean of their losses and gradients is the loss and gradient of one that has the whole batch."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlp_fast import losses
from vlp_fast.distributed import gather_features, world

BATCH, DIM, SIZE = 3, 5, 2


def loss_of(weight, scale, inputs):
    image, text = (F.normalize(x @ w, dim=1) for x, w in zip(inputs, weight, strict=True))
    return losses.contrastive_loss(image, text, scale)


def make():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (
        [torch.randn(n, DIM, generator=generator, dtype=torch.float64) for _ in range(2)] for n in (DIM, SIZE * BATCH)
    )
    return [w.requires_grad_() for w in weight], torch.tensor(7.0, dtype=torch.float64, requires_grad=True), inputs


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE)
    weight, scale, inputs = make()
    loss = loss_of(weight, scale, [x[rank * BATCH : (rank + 1) * BATCH] for x in inputs])
    grads = torch.autograd.grad(loss, [*weight, scale])
    try:
        gather_features(torch.zeros(2 + rank, DIM))
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save({"loss": loss.detach(), "grads": grads, "world": world(), "refused": refused}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], cwd=folder) for rank in range(SIZE)]
    assert [process.wait(timeout=60) for process in processes] == [0] * SIZE
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def test_contrastive_loss_of_two_processes_is_that_of_one(results):
    weight, scale, inputs = make()
    expected = loss_of(weight, scale, inputs)
    torch.testing.assert_close(sum(r["loss"] for r in results) / SIZE, expected.detach())
    grads = torch.autograd.grad(expected, [*weight, scale])
    for i, exact in enumerate(grads):
        torch.testing.assert_close(sum(r["grads"][i] for r in results) / SIZE, exact)


def test_processes_know_their_place(results):
    assert [tuple(r["world"]) for r in results] == [(0, 2), (1, 2)]
    assert world() == (0, 1)


def test_gather_features_refuses_uneven_batches_on_every_process(results):
    assert all("equally many rows on every process; received [2, 3] by rank" in r["refused"] for r in results)


def test_gather_features_of_one_process_is_itself():
    x = torch.randn(3, 4)
    assert gather_features(x) is x


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
