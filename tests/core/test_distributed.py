"""Two processes: the mean of their losses and gradients is the loss and gradient of one that has the whole batch."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from vlp_fast import losses, reference
from vlp_fast.distributed import gather_features, world

BATCH, DIM, SIZE = 3, 5, 2


LOSSES = {
    "softmax": losses.contrastive_loss,
    "sigmoid": lambda image, text, scale: losses.sigmoid_contrastive_loss(image, text, scale, -scale / 2),
}


def features(weight, inputs):
    return [F.normalize(x @ w, dim=1) for x, w in zip(inputs, weight, strict=True)]


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
    image, text = features(weight, [x[rank * BATCH : (rank + 1) * BATCH] for x in inputs])
    found = {}
    for name, function in LOSSES.items():
        loss = function(image, text, scale)
        found[name] = loss.detach(), torch.autograd.grad(loss, [*weight, scale], retain_graph=True)
    drawn = losses.hard_negatives(image, text, scale, all_processes=True, generator=torch.Generator().manual_seed(rank))
    try:
        gather_features(torch.zeros(2 + rank, DIM))
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save({"losses": found, "drawn": drawn, "world": world(), "refused": refused}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], cwd=folder) for rank in range(SIZE)]
    assert [process.wait(timeout=60) for process in processes] == [0] * SIZE
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


@pytest.mark.parametrize("name", LOSSES)
def test_contrastive_losses_of_two_processes_are_those_of_one(results, name):
    weight, scale, inputs = make()
    expected = LOSSES[name](*features(weight, inputs), scale)
    torch.testing.assert_close(sum(r["losses"][name][0] for r in results) / SIZE, expected.detach())
    grads = torch.autograd.grad(expected, [*weight, scale])
    for i, exact in enumerate(grads):
        torch.testing.assert_close(sum(r["losses"][name][1][i] for r in results) / SIZE, exact)


def test_hard_negatives_of_two_processes_are_drawn_from_both(results):
    weight, scale, inputs = make()
    image, text = (x.detach() for x in features(weight, inputs))
    for rank in range(SIZE):
        uniform = torch.rand(BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        rows = slice(rank * BATCH, (rank + 1) * BATCH)
        expected = reference.hard_negatives(image[rows], text, scale.detach(), uniform, first=rank * BATCH)
        assert torch.equal(results[rank]["drawn"], expected)
    assert any((r["drawn"] // BATCH != rank).any() for rank, r in enumerate(results))


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
