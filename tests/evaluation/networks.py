"""A small extractor for tests: random weights whose features do not collapse, in a fraction of a millisecond."""

import torch
import torch.nn.functional as F

from maetok_hf.evaluation import weights_digest


class TinyExtractor(torch.nn.Module):
    """Two convolutions: 12 pooled features, 8 spatial ones and 5 logits of images of any size."""

    name, resize = "tiny", "none"

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(8, 3, 3, 3, generator=generator) / 3)
        self.second = torch.nn.Parameter(torch.randn(12, 8, 3, 3, generator=generator) / 6)
        self.head = torch.nn.Parameter(torch.randn(5, 12, generator=generator) * 8)
        self.digest = weights_digest(self)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.relu(F.conv2d(images.float() / 127.5 - 1, self.first, stride=2))
        pool = F.relu(F.conv2d(hidden, self.second)).mean(dim=(2, 3))
        return {"pool": pool, "spatial": hidden[:, 0, :2, :4].flatten(1), "logits": pool @ self.head.T}


def random_images(count: int, seed: int = 0, size: int = 12) -> torch.Tensor:
    """Smooth 8-bit images that differ in color and contrast, of shape `(count, 3, size, size)`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)
    return (F.interpolate(coarse, size, mode="bilinear") * 255).round().to(torch.uint8)
