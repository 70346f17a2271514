import pytest
import torch
from safetensors.torch import save_file

import vlp_fast.data.codebook as codebook_module
from vlp_fast.data import PatchCodebook


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_patch_codebook_finds_separated_clusters():
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    labels = torch.randint(4, (6, 4, 4), generator=seeded(0))
    images = colors[labels].permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    images = images + 0.01 * torch.randn(images.shape, generator=seeded(1))
    codebook = PatchCodebook.fit(images, patch_size=2, num_codes=4, iterations=10, generator=seeded(2))
    codes = codebook.encode(images)
    assert codes.shape == (6, 16)
    assert codes.dtype == torch.int64
    assert len({(int(a), int(b)) for a, b in zip(labels.flatten(), codes.flatten(), strict=True)}) == 4
    torch.testing.assert_close(codebook.decode(codes[0, 0]).mean((1, 2)), colors[labels[0, 0, 0]], atol=0.02, rtol=0)


def test_patch_codebook_encode_is_the_nearest_centroid_in_patch_order():
    images = torch.randn(3, 3, 8, 12, generator=seeded(0))
    codebook = PatchCodebook(torch.randn(7, 3 * 16, generator=seeded(1)), 4)
    codes = codebook.encode(images)
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
            expected = torch.cdist(patch.double(), codebook.centroids.double()).argmin(1)
            assert torch.equal(codes[:, 3 * row + column], expected)


def test_patch_codebook_encode_is_chunked_without_changing_codes(monkeypatch):
    images = torch.randn(5, 3, 8, 8, generator=seeded(0))
    codebook = PatchCodebook.fit(images, 4, 6, generator=seeded(1))
    whole = codebook.encode(images)
    seen = []
    nearest = codebook_module._nearest
    monkeypatch.setattr(
        codebook_module, "_nearest", lambda patches, centroids: seen.append(len(patches)) or nearest(patches, centroids)
    )
    monkeypatch.setattr(codebook_module, "MAX_DISTANCES", 60)
    assert torch.equal(codebook.encode(images), whole)
    assert seen == [8, 8, 4]


def test_patch_codebook_fit_is_deterministic_and_reduces_the_error():
    images = torch.randn(8, 3, 16, 16, generator=seeded(0)).cumsum(2)

    def error(codebook):
        patches = codebook_module._patches(images, 4)
        return float((patches - codebook.centroids[codebook.encode(images)]).square().mean())

    drawn, fitted, again = (PatchCodebook.fit(images, 4, 16, steps, seeded(1)) for steps in (0, 8, 8))
    assert torch.equal(fitted.centroids, again.centroids)
    assert error(fitted) < 0.9 * error(drawn)


def test_patch_codebook_fit_moves_centroids_that_lost_all_patches():
    images = torch.zeros(4, 3, 8, 8)
    images[0, :, :4, :4], images[0, :, 4:, 4:] = 1.0, -1.0
    codebook = PatchCodebook.fit(images, 4, 3, iterations=5, generator=seeded(0))
    assert len(codebook.encode(images).unique()) == 3
    assert codebook.centroids.isfinite().all()


def test_patch_codebook_encode_of_no_images():
    codebook = PatchCodebook(torch.zeros(2, 12), 2)
    assert codebook.encode(torch.zeros(0, 3, 4, 6)).shape == (0, 6)


def test_patch_codebook_save_and_load(tmp_path):
    codebook = PatchCodebook.fit(torch.randn(2, 3, 8, 8, generator=seeded(0)), 4, 5, generator=seeded(0))
    codebook.save(tmp_path / "codes.safetensors")
    loaded = PatchCodebook.load(tmp_path / "codes.safetensors")
    assert torch.equal(loaded.centroids, codebook.centroids)
    assert (loaded.patch_size, loaded.num_codes) == (4, 5)
    assert loaded.to("meta").centroids.device.type == "meta"


def test_patch_codebook_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no codebook file .*none"):
        PatchCodebook.load(tmp_path / "none")
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match="text is not a patch codebook: "):
        PatchCodebook.load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other is not a patch codebook; its format is None"):
        PatchCodebook.load(tmp_path / "other")
    save_file({"weight": torch.zeros(2)}, tmp_path / "hollow", {"format": "vlp_fast.PatchCodebook.v1", "patch_size": "4"})
    with pytest.raises(ValueError, match="hollow is not a patch codebook: "):
        PatchCodebook.load(tmp_path / "hollow")
    with pytest.raises(ValueError, match=r"centroids must be \[num_codes, 48\] for patch_size=4; received \[5, 47\]"):
        PatchCodebook(torch.zeros(5, 47), 4)
    with pytest.raises(ValueError, match=r"images must be \[n, 3, height, width\] .* patch_size=4; received \[1, 3, 8, 9\]"):
        PatchCodebook.fit(torch.zeros(1, 3, 8, 9), 4, 2)
    with pytest.raises(ValueError, match="num_codes must lie between 1 and the number of patches, 4; received 5"):
        PatchCodebook.fit(torch.zeros(1, 3, 8, 8), 4, 5)
