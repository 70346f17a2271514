"""`vlp_fast.profile` on models that know nothing of it: towers found, calls counted, losses traced, waste booked."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlp_fast
from vlp_fast.passes import PassInfo
from vlp_fast.profiling import chrome_trace, profile_model
from vlp_fast.profiling.towers import default_towers

DIM, BATCH, LENGTH = 16, 3, 5


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Tower(nn.Module):
    """A stack of layers on embedded tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, DIM)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class ImageTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 4, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


class Pair(nn.Module):
    """Two towers, a head on each, and a slow copy of the text tower."""

    def __init__(self):
        super().__init__()
        self.image, self.text, self.slow = ImageTower(), Tower(), Tower()
        self.head = nn.Linear(DIM, 2)

    def step(self, images, ids, mask):
        image, text = self.image(images), self.text(ids, attention_mask=mask)
        with torch.no_grad():
            target = self.slow(ids, attention_mask=mask).mean((0, 1))
        match = self.head(text[:, 0] * image.mean(1)).logsumexp(1).mean()
        return {"match": match, "copy": (text.mean((0, 1)) - target).pow(2).mean()}


def inputs():
    ids = torch.randint(1, 20, (BATCH, LENGTH))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    return torch.randn(BATCH, 3, 8, 8), ids, mask


def by_row(rows):
    return {(row.loss, row.module): row for row in rows}


def test_calls_losses_padding_and_calls_without_gradient():
    model = Pair()
    with vlp_fast.profile(model) as p:
        losses = model.step(*inputs())
        p.attribute(losses)
        sum(losses.values()).backward()
    rows = by_row(p.rows)
    calls = {key: (row.passes, row.grad, row.sequences, row.tokens, row.serves) for key, row in rows.items() if row.passes}
    assert calls == {
        ("match", "image"): (1, True, BATCH, 4 * BATCH, ["match"]),
        ("match", "text"): (1, True, BATCH, 10, ["match", "copy"]),
        ("copy", "slow"): (1, False, BATCH, 10, ["copy"]),  # no graph leads there: its values do
    }
    assert rows["match", "text"].padding == pytest.approx(1 / 3)
    products = 2 * 2 * DIM * DIM / 1e9  # of one token: two layers
    assert rows["match", "text"].gflops_forward == pytest.approx(15 * products)
    assert rows["match", "text"].gflops_padding == pytest.approx((15 + 30) * products / 3)
    assert rows["match", "text"].waste == rows["match", "text"].gflops_padding
    assert rows["copy", "slow"].gflops_backward == 0.0
    assert rows["match", "heads and loss"].gflops_forward == pytest.approx(2 * BATCH * DIM * 2 / 1e9)
    assert p.totals["passes"] == 3
    assert p.totals["without_gradient"] == {"image": 0, "text": 1, "pair": 0, "other": 0}


def test_attribute_works_after_the_backward_and_after_the_block():
    model, given = Pair(), inputs()
    seen = []
    for late in (False, True):
        with vlp_fast.profile(model) as p:
            losses = model.step(*given)
            if not late:
                p.attribute(losses)
            sum(losses.values()).backward()
        if late:
            p.attribute(losses)
        seen.append([(row.loss, row.module, row.serves, row.gflops_forward, row.gflops_backward) for row in p.rows])
    assert seen[0] == seen[1]


def test_one_loss_and_a_step_without_backward():
    model = Pair()
    with vlp_fast.profile(model, ["text"]) as p:
        loss = model.step(*inputs())["copy"]
    p.attribute(loss)
    (row,) = [row for row in p.rows if row.passes]
    assert (row.loss, row.module, row.gflops_backward, row.unread) == ("loss", "text", None, None)
    assert "text" in p.table()
    assert json.loads(json.dumps(p.to_json()))["model"] == "Pair"


def test_profile_changes_nothing_and_leaves_no_hook():
    model, given = Pair(), inputs()
    plain = model.step(*given)
    sum(plain.values()).backward()
    gradients = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with vlp_fast.profile(model) as p:
        losses = model.step(*given)
        sum(losses.values()).backward()
    p.attribute(losses)
    assert all(torch.equal(plain[name], losses[name]) for name in plain)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_go_when_the_block_raises():
    model = Pair()
    ids = inputs()[1]
    with pytest.raises(IndexError), vlp_fast.profile(model):
        model.text(ids + 100)  # beyond the table
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_repeated_work_is_what_has_the_same_operands():
    """The second pass over the same ids repeats every product of the first; written weights and other ids repeat none."""
    tower, ids = Tower(), inputs()[1]
    products = 2 * BATCH * LENGTH * 2 * DIM * DIM / 1e9
    with vlp_fast.profile(tower) as p:
        loss = tower(ids).sum() + tower(ids).sum()
        p.attribute(loss)
    assert p.totals["gflops_repeated"] == pytest.approx(products)
    assert set(p.totals["repeated"]) == {"layers.0.fc", "layers.1.fc"}
    with vlp_fast.profile(tower) as p:
        tower(ids)
        with torch.no_grad():
            tower.layers[0].fc.weight.mul_(2)
        tower(ids)
        tower(ids.clone() + 1 - 1)  # equal, not by descent
    assert p.totals["gflops_repeated"] == 0.0


def test_repeated_work_is_found_with_tied_weights_and_not_behind_dropout():
    one, two, x = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), torch.randn(4, DIM)
    two.weight, two.bias = one.weight, one.bias
    both = nn.ModuleDict({"one": one, "two": two})
    with vlp_fast.profile(both, ["one", "two"]) as p:
        two(one(x) * 0 + one(x)), two(x)
    assert by_row(p.rows)["step", "two"].gflops_repeated == pytest.approx(2 * 4 * DIM * DIM / 1e9)
    with vlp_fast.profile(one) as p:
        for _ in range(2):
            one(F.dropout(x, 0.5, training=True))
    assert p.totals["gflops_repeated"] == 0.0


def test_rows_that_no_loss_reads_are_counted():
    tower = Tower()
    ids = torch.randint(1, 20, (BATCH, LENGTH))
    with vlp_fast.profile(tower) as p:
        loss = tower(ids)[:, 0].pow(2).sum()
        p.attribute({"cls": loss})
        loss.backward()
    assert by_row(p.rows)["cls", "model"].unread == pytest.approx(1 - 1 / LENGTH)


class Packed(nn.Module):
    """A tower that runs passes of two losses in one call and says so."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(DIM, DIM)

    def describe(self, rows):
        return PassInfo("text_tower", 5, len(rows), len(rows), (("itm", 2, 6), ("lm", 1, 3), ("itm", 2, 3)))

    def forward(self, rows):
        return self.fc(rows)


def test_a_packed_pass_is_split_over_its_losses_by_rows():
    tower = Packed()
    with vlp_fast.profile(tower, {"tower": tower}) as p:
        out = tower(torch.randn(12, DIM))
        losses = {"itm": out[:9].sum(), "lm": out[9:].sum()}
        p.attribute(losses)
        sum(losses.values()).backward()
    rows, whole = by_row(p.rows), 2 * 12 * DIM * DIM / 1e9
    itm, lm = rows["itm", "text_tower"], rows["lm", "text_tower"]
    assert (itm.passes, itm.shared, itm.sequences, itm.tokens, itm.serves) == (1, 1, 4, 9, ["itm"])
    assert (lm.passes, lm.shared, lm.sequences, lm.tokens, lm.serves) == (1, 1, 1, 3, ["lm"])
    assert itm.gflops_forward == pytest.approx(whole * 9 / 12)
    assert lm.gflops_forward == pytest.approx(whole * 3 / 12)
    assert itm.mb == pytest.approx(3 * lm.mb)
    assert itm.ms == pytest.approx(3 * lm.ms)
    assert p.totals["passes"] == 1
    assert p.totals["text_passes"] == 1


def test_packed_blip_shares_its_text_pass_and_repeats_nothing():
    published, packed = (profile_model("blip", "tiny", batch=4, schedule=name) for name in ("published", "packed"))
    rows = {row.loss: row for row in packed.rows if row.shared}
    assert set(rows) == {"itm", "lm"}
    assert rows["itm"].sequences == 12
    assert rows["lm"].sequences == 4
    assert packed.totals["passes"] < published.totals["passes"]
    assert packed.totals["gflops_repeated"] == 0.0
    assert published.totals["gflops_repeated"] > 0  # the images' keys and values, once per text pass


def test_a_module_list_is_a_tower_of_one_pass():
    model = nn.Module()
    model.blocks = nn.ModuleList([Layer(), nn.ModuleList([Layer(), Layer()])])
    with vlp_fast.profile(model, ["blocks"]) as p:
        for _ in range(2):
            x = torch.randn(BATCH, LENGTH, DIM)
            for block in (model.blocks[0], *model.blocks[1]):
                x = block(x)
    (row,) = [row for row in p.rows if row.passes]
    assert (row.passes, row.sequences, row.tokens) == (2, 2 * BATCH, 2 * BATCH * LENGTH)
    assert row.padding is None  # neither ids nor a mask
    assert row.gflops_forward == pytest.approx(2 * 3 * 2 * BATCH * LENGTH * DIM * DIM / 1e9)


def test_padding_by_id_reaches_the_tower_that_sees_no_ids():
    tower, top = Tower(), Tower()
    model = nn.ModuleDict({"embed": tower.embedding, "first": tower.layers, "second": top.layers})
    ids = torch.tensor([[5, 6, 7, 0, 0], [5, 0, 0, 0, 0]])
    with vlp_fast.profile(model, ["first", "second"], pad_id=0) as p:
        x = model["embed"](ids)
        for layer in (*model["first"], *model["second"]):
            x = layer(x)
    assert [(row.module, row.tokens, row.padding) for row in p.rows if row.passes] == [
        ("first", 4, pytest.approx(0.6)), ("second", 4, pytest.approx(0.6)),
    ]  # fmt: skip


def test_default_towers():
    wrapped = nn.ModuleDict({"module": Pair()})
    assert list(default_towers(wrapped)) == ["image", "text", "slow"]
    assert list(default_towers(Tower())) == ["model"]
    beside = nn.ModuleDict({"vision": ImageTower(), "layers": nn.ModuleList([Layer()])})
    assert list(default_towers(beside)) == ["layers", "vision"]
    assert list(default_towers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == ["0"]


def test_towers_that_never_ran_are_named():
    model = Pair()
    with vlp_fast.profile(model) as p:
        model.image(inputs()[0])
    assert p.report().towers_not_called == ["text", "slow"]


def test_wrong_use_ends_in_a_sentence():
    model = Pair()
    with pytest.raises(ValueError, match="towers must name submodules of the model; received 'txt'"):
        vlp_fast.profile(model, ["txt"])
    with pytest.raises(TypeError, match="received int for 'text'"):
        vlp_fast.profile(model, {"text": 3})
    with pytest.raises(ValueError, match="at least one module"):
        vlp_fast.profile(model, [])
    p = vlp_fast.profile(model)
    with pytest.raises(RuntimeError, match="when its with block has been left"):
        _ = p.rows
    with pytest.raises(RuntimeError, match="attribute needs a step that ran"):
        p.attribute({})
    with p:
        loss = model.step(*inputs())["match"]
    with pytest.raises(ValueError, match="'match' has none"):
        p.attribute({"match": loss.detach()})
    with pytest.raises(ValueError, match="at least one tensor"):
        p.attribute({"match": 3.0})
    with pytest.raises(RuntimeError, match="observes one block"), p:
        pass


def test_trace_has_an_event_per_forward_and_backward_of_a_call():
    report = profile_model("blip", "tiny", schedule="published", batch=3, device="cpu", backward=True)
    trace = json.loads(json.dumps(chrome_trace([report])))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert sum(event["cat"] == "forward" for event in events) == report.totals["passes"] == 7
    assert sum(event["cat"] == "backward" for event in events) == 5  # two momentum passes have none
    assert {event["name"] for event in events} >= {"image_encoder (itc)", "text_decoder (lm)"}
    assert all(event["dur"] > 0 for event in events)
    ends = max(event["ts"] + event["dur"] for event in events)
    assert ends <= report.totals["ms"] * 1e3 * 1.001
    with pytest.raises(ValueError, match="a trace needs times"):
        chrome_trace([profile_model("coca", "tiny", batch=2)])
