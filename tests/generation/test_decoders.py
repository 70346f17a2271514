"""Steps of every model: they equal full forwards in float64, stay near in bfloat16, and beams share images."""

import dataclasses

import pytest
import torch

from vlp_fast.generation import Texts, generate
from vlp_fast.models.coca_palm import CocaPalm
from vlp_fast.ops import packed_weights

START, EOS, VOCAB = 1, 2, 97  # of conftest.py's models


@pytest.mark.parametrize("copies", [1, 3])
@torch.no_grad()
def test_steps_equal_full_forwards(make_model, make_images, pack, make_decoder, next_logits, name, copies):
    model, images = make_model(name, torch.float64), make_images(3, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for prompts in ([[START], [START], [START]], [[START, 9, 8], [START], [START, 7, 6, 5, 4]]):
        texts = [list(prompt) for prompt in prompts for _ in range(copies)]
        writing = make_decoder(model, range(3)).start(images, Texts(*pack(prompts)), copies, 6)
        logits, about = writing.logits, [i for i in range(3) for _ in range(copies)]
        for step in range(6):
            expected = next_logits(model, images[about], texts, about)
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
            if step % 2:
                # within each image: parents in any order, some twice
                local = torch.randint(copies, (3, copies), generator=generator)
                index = (local + torch.arange(3)[:, None] * copies).flatten()
                writing.reorder(index)
                texts = [list(texts[i]) for i in index.tolist()]
            words = torch.randint(VOCAB, (3 * copies,), generator=generator)
            for text, word in zip(texts, words.tolist(), strict=True):
                text.append(word)
            logits = writing.step(words)


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "coca", "coca_experts", "coca_palm", "beit3"])
def test_beams_share_their_image(make_model, make_images, pack, make_decoder, name, monkeypatch):
    """Keys and values of images are as many for ten beams as for one; only the texts' slots grow."""
    model, images, prompts = make_model(name), make_images(2), Texts(*pack([[START]] * 2))
    held = {}
    with torch.no_grad():
        for copies in (1, 10):
            writing = make_decoder(model, range(2)).start(images, prompts, copies, 5)
            cache, contexts = writing._cache, getattr(writing, "_contexts", {})
            held[copies] = cache.shared_rows + sum(len(k) for k, _ in contexts.values())
            for buffer in cache._buffers.values():
                assert buffer.shape[2] == cache.shared_rows + 2 * copies * cache.capacity
                assert buffer.untyped_storage().nbytes() == buffer.numel() * 4
            for k, v in contexts.values():
                for x in (k, v):
                    assert x.untyped_storage().nbytes() == x.numel() * 4
                    assert x.stride(0) == x.shape[2], "the rows of a head follow one another"
    assert held[1] == held[10] > 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_packed_weights_write_the_same(make_model, make_images, ids_of, name):
    model, images = make_model(name), make_images(3)
    expected = generate(model, images, **ids_of(model, range(3)), num_beams=3, max_length=9)
    with packed_weights(model):
        found = generate(model, images, **ids_of(model, range(3)), num_beams=3, max_length=9)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("name", ["blip", "blip_vqa", "coca", "coca_experts", "coca_palm", "open_clip_coca", "beit3"])
@torch.no_grad()
def test_bfloat16_steps_stay_near_float32(make_model, make_images, pack, make_decoder, next_logits, name):
    """As near as the model's own forward in bfloat16, which rounds as often."""
    words = torch.randint(5, VOCAB, (4, 3), generator=torch.Generator().manual_seed(3))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, images = make_model(name, scale=1.5).to(dtype), make_images(3, dtype)
        writing = make_decoder(model, range(3)).start(images, Texts(*pack([[START], [START, 9], [START]])), 1, 4)
        steps = [writing.logits, *(writing.step(word) for word in words)]
        assert all(step.dtype == dtype for step in steps)
        logits[dtype] = torch.stack(steps).float()
        texts = [[*prompt, *words[:, i].tolist()] for i, prompt in enumerate(([START], [START, 9], [START]))]
        logits[dtype, "forward"] = next_logits(model, images, texts, range(3)).float()
    bound = 2 * (logits[torch.bfloat16, "forward"] - logits[torch.float32, "forward"]).abs().max()
    assert (logits[torch.bfloat16] - logits[torch.float32]).abs().max() <= bound


def test_palm_writes_as_far_as_it_is_told(make_model, make_images):
    """Rotary positions have no last, whatever the captions it was trained on; tokens may be given in place of images."""
    model = make_model("coca_palm")
    assert len(generate(model, make_images(1), eos_id=EOS, start_id=START, min_length=200, max_length=200).token_ids) == 200
    given = CocaPalm(dataclasses.replace(model.config, image_encoder="given")).eval()
    given.load_state_dict({name: x for name, x in model.state_dict().items() if name in given.state_dict()})
    tokens = model.image_encoder.encoder(make_images(2)).unflatten(0, (2, -1))
    options = {"eos_id": EOS, "start_id": START, "num_beams": 2, "max_length": 9}
    assert generate(given, tokens, **options).lists() == generate(model, make_images(2), **options).lists()
