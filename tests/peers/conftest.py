"""What the tests against other people's models need in common."""

import pytest
import torch


@pytest.fixture(scope="session")
def torchvision_ops():
    """Makes torchvision importable where its binary was built for another device than torch: transformers and open_clip import it.

    Only the names of two operations are missing then, and none of our peers calls them.
    """
    library = None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pass
    yield
    del library  # kept until here: the names go with it
