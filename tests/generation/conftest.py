"""Small models that write, and what their own forwards say of the next word."""

import pytest
import torch

from vlp_fast.generation import Beit3Decoder, BlipAnswerDecoder, BlipDecoder, CocaDecoder, CocaPalmDecoder, Questions
from vlp_fast.models import Blip, BlipVqa, Coca, CocaExperts, beit3_preset, blip_preset, coca_preset
from vlp_fast.models.beit3 import Beit3MaskedModel
from vlp_fast.models.beit3_tasks import Beit3Captioner
from vlp_fast.models.blip import BlipCaptioner
from vlp_fast.models.coca_open_clip import OpenClipCoca, open_clip_coca_preset
from vlp_fast.models.coca_palm import CocaPalm, coca_palm_preset
from vlp_fast.segments import Segments

START, EOS, MASK, VOCAB = 1, 2, 3, 97
SMALL = {"image_size": 32, "vocab_size": VOCAB}
BLIP = {**SMALL, "dec_id": START, "enc_id": 4}


def _blip(kind=Blip):
    return kind(blip_preset("tiny", **BLIP))


def _coca():
    return Coca(coca_preset("tiny", **SMALL, caption_queries=5))


def _open_clip_coca():
    return OpenClipCoca(open_clip_coca_preset("tiny", **SMALL, patch_size=16, decoder_heads=2, decoder_hidden_dim=96))


def _coca_experts():
    return CocaExperts(coca_preset("tiny", **SMALL, caption_queries=5, experts=True))


def _coca_palm():
    return CocaPalm(coca_palm_preset("tiny", **SMALL, caption_queries=5))


def _beit3(**changes):
    return Beit3Captioner(beit3_preset("tiny", **SMALL, **changes))


MODELS = {
    "blip": _blip,
    "blip_captioner": lambda: _blip(BlipCaptioner),
    "blip_vqa": lambda: _blip(BlipVqa),
    "coca": _coca,
    "coca_experts": _coca_experts,
    "coca_palm": _coca_palm,
    "open_clip_coca": _open_clip_coca,
    "beit3": _beit3,
    "beit3_masked": lambda: Beit3MaskedModel(beit3_preset("tiny", **SMALL)),
    "beit3_shared_attention": lambda: _beit3(share_attention=True, vl_experts_from_layer=1),
    "beit3_no_last_norm": lambda: _beit3(normalize_output=False),
}
COCAS = (Coca, CocaExperts, CocaPalm, OpenClipCoca)


@pytest.fixture(params=MODELS)
def name(request):
    """Every model in turn, but where a test names some."""
    return request.param


def _model(name, dtype=torch.float32, scale=3.0):
    """Random weights, widened so that next words depend on image and text."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _images(n, dtype=torch.float32, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _pack(texts):
    return torch.tensor([word for text in texts for word in text]), Segments([len(text) for text in texts])


def _questions(images):
    """Questions of different lengths, one about each image; of an image alone, the one that it has in a batch."""
    texts = [[4, *range(20, 23 + 2 * i), EOS] for i in images]
    return Questions(*_pack(texts))


def _decoder(model, images):
    if isinstance(model, BlipVqa):
        return BlipAnswerDecoder(model, _questions(images))
    if isinstance(model, Blip | BlipCaptioner):
        return BlipDecoder(model)
    if isinstance(model, CocaPalm):
        return CocaPalmDecoder(model)
    return CocaDecoder(model) if isinstance(model, COCAS) else Beit3Decoder(model, MASK)


def _ids(model, images):
    """What `generate` needs to be told: ids, and the questions about these images."""
    if isinstance(model, BlipVqa):
        return {"eos_id": EOS, "questions": _questions(images)}
    if isinstance(model, Blip | BlipCaptioner):
        return {"eos_id": EOS}
    return {"eos_id": EOS, "start_id": START, **({} if isinstance(model, COCAS) else {"mask_id": MASK})}


def _next_logits(model, images, texts, about):
    """What the model's own forward says of the word after each text, image i (the one numbered ``about[i]``) with text i."""
    index = list(range(len(texts)))
    if isinstance(model, BlipVqa):
        ids, segments = _pack(texts)
        questions = _questions(about)
        context = model.encode_questions(questions.token_ids, questions.segments, model.encode_image(images), index)
        (hidden,) = model.text_tower([model.answer_pass(ids, segments, index)], context, questions.segments)
        return model.word_logits(hidden)[segments.last_rows()]
    if isinstance(model, Blip | BlipCaptioner):
        ids, segments = _pack(texts)
        rows = model.encode_image(images)
        (hidden,) = model.text_tower([model.captioning_pass(ids, segments, index)], rows.rows, rows.segments)
        return model.word_logits(hidden)[segments.last_rows()]
    if isinstance(model, COCAS):
        ids, segments = _pack([[*text, 0] for text in texts])  # the last word has no next: one that is not looked at
        logits, kept = model.word_logits(model.encode_text(ids, segments), model.encode_image(images))
        return logits[torch.searchsorted(kept, segments.last_rows() - 1)]
    ids, segments = _pack([[*text, MASK] for text in texts])
    return model.word_head(model.encode_captioned(images, ids, segments).text[segments.last_rows()])


@pytest.fixture(scope="session")
def make_model():
    """make_model(name, dtype=float32, scale=3.0) -> that model in eval mode."""
    return _model


@pytest.fixture(scope="session")
def make_images():
    """make_images(n, dtype=float32, seed=0) -> ``[n, 3, 32, 32]``."""
    return _images


@pytest.fixture(scope="session")
def pack():
    """pack(texts) -> their token ids, packed, and `Segments`."""
    return _pack


@pytest.fixture(scope="session")
def make_questions():
    """make_questions(images) -> `Questions`, one about each."""
    return _questions


@pytest.fixture(scope="session")
def make_decoder():
    """make_decoder(model, images) -> the model's `Decoder`."""
    return _decoder


@pytest.fixture(scope="session")
def ids_of():
    """ids_of(model, images) -> what `generate` needs to be told."""
    return _ids


@pytest.fixture(scope="session")
def next_logits():
    """next_logits(model, images, texts, about) -> ``[texts, vocabulary]``."""
    return _next_logits
