"""A small discrete visual tokenizer: the targets of masked image modelling where no trained one is at hand."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["PatchCodebook"]

FORMAT = "vlp_fast.PatchCodebook.v1"
MAX_DISTANCES = 2**24  # held at a time: 64 MiB


class PatchCodebook:
    """Codes of image patches: the nearest of `num_codes` centroids that k-means found among patches of transformed images.

    What it is not: BEiT v2's tokenizer, which BEiT-3 is published with. That one is a trained network (VQ-KD) whose 8,192 codes
    carry what CLIP sees; these centroids are mean patches and carry colour, brightness and edges. They make masked image
    modelling a real task to train and to measure, with the same tensors, shapes and costs; they do not make the published
    accuracy.

    Args:
        centroids: float ``[num_codes, 3 * patch_size ** 2]``, pixels of a patch by channel, row, column.
        patch_size: side of a patch, in pixels.

    Raises:
        ValueError: centroids of another shape.
    """

    def __init__(self, centroids: Tensor, patch_size: int) -> None:
        if patch_size < 1 or centroids.dim() != 2 or centroids.shape[1] != 3 * patch_size**2 or not len(centroids):
            raise ValueError(
                f"centroids must be [num_codes, {3 * patch_size**2}] for patch_size={patch_size}; received "
                f"{list(centroids.shape)}."
            )
        self.centroids, self.patch_size = centroids.float(), patch_size

    @classmethod
    def fit(
        cls,
        images: Tensor,
        patch_size: int,
        num_codes: int,
        iterations: int = 5,
        generator: torch.Generator | None = None,
    ) -> PatchCodebook:
        """Centroids of the patches of `images`, by k-means from randomly drawn patches.

        A centroid that loses all its patches moves to one of the patches farthest from theirs. Images with fewer different
        patches than codes leave some codes unused. Memory: the patches once, and a bounded block of distances.

        Args:
            images: float ``[n, 3, height, width]``, normalised as the model will see them.
            patch_size: side of a patch; must divide height and width.
            num_codes: centroids to find.
            iterations: rounds of k-means.
            generator: on the CPU. The same generator state gives the same centroids on a CPU.

        Raises:
            ValueError: images of another shape, or fewer patches than codes.
        """
        patches = _patches(images, patch_size).flatten(0, 1).float()
        if not 1 <= num_codes <= len(patches):
            raise ValueError(f"num_codes must lie between 1 and the number of patches, {len(patches)}; received {num_codes}.")
        chosen = torch.randperm(len(patches), generator=generator)[:num_codes]
        centroids = patches[chosen.to(patches.device)]
        for _ in range(iterations):
            codes, distances = _nearest(patches, centroids)
            counts = torch.bincount(codes, minlength=num_codes)
            sums = torch.zeros_like(centroids).index_add_(0, codes, patches)
            centroids = sums / counts.clamp(min=1)[:, None]
            empty = torch.nonzero(counts == 0).flatten()
            centroids[empty] = patches[distances.topk(len(empty)).indices]
        return cls(centroids, patch_size)

    @property
    def num_codes(self) -> int:
        return len(self.centroids)

    def encode(self, images: Tensor) -> Tensor:
        """The code of every patch: int64 ``[n, patches]``, patches row by row, from float ``[n, 3, height, width]``.

        Memory beyond the result is bounded whatever the number of images.

        Raises:
            ValueError: images of another shape.
        """
        per_image = max(images.shape[-2:].numel() // self.patch_size**2, 1)
        chunks = images.split(max(MAX_DISTANCES // (per_image * self.num_codes), 1))
        return torch.cat([self._encode(chunk) for chunk in chunks])

    def _encode(self, images: Tensor) -> Tensor:
        patches = _patches(images, self.patch_size)
        codes, _ = _nearest(patches.flatten(0, 1).float(), self.centroids)
        return codes.view(patches.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """The centroids of codes: int64 ``[...]`` -> float32 ``[..., 3, patch_size, patch_size]``."""
        return self.centroids[codes].unflatten(-1, (3, self.patch_size, self.patch_size))

    def to(self, device: torch.device | str) -> PatchCodebook:
        """The same codebook on `device`."""
        return PatchCodebook(self.centroids.to(device), self.patch_size)

    def save(self, path: str | Path) -> None:
        """Write the codebook as a safetensors file."""
        metadata = {"format": FORMAT, "patch_size": str(self.patch_size)}
        save_file({"centroids": self.centroids.contiguous().cpu()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> PatchCodebook:
        """Read what `save` has written.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a codebook.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no codebook file {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a patch codebook; its format is {metadata.get('format')!r}.")
                return cls(file.get_tensor("centroids"), int(metadata["patch_size"]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a patch codebook: {error}.") from error

    def __repr__(self) -> str:
        return f"PatchCodebook(num_codes={self.num_codes}, patch_size={self.patch_size})"


def _patches(images: Tensor, patch_size: int) -> Tensor:
    """``[n, 3, height, width]`` -> ``[n, patches, 3 * patch_size ** 2]``."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"images must be [n, 3, height, width] with height and width multiples of patch_size={patch_size}; received "
            f"{list(images.shape)}."
        )
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def _nearest(patches: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the nearest centroid, squared distance to it) of each patch, in blocks of bounded size."""
    norms = centroids.square().sum(1)
    found = []
    for block in patches.split(max(MAX_DISTANCES // len(centroids), 1)):
        distances = torch.addmm(norms, block, centroids.T, alpha=-2)
        nearest = distances.min(1)
        found.append((nearest.indices, nearest.values + block.square().sum(1)))
    codes, distances = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, distances
