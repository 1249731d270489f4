"""The base line: logistic regression on the features of the pretrained network, which is not trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from _common.errors import UsageError

from .data import Part, View, loader
from .models import moments
from .place import Place

#: Inverse strengths of the L2 penalty, of which a held-out fifth of the training images chooses one.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


@torch.no_grad()
def outputs(
    model: nn.Module, part: Part, size: int, batch: int, place: Place, features: bool = False, title: str = ""
) -> Tensor:
    """Logits, or features before the last layer, of all images: float32 [N, K] on the CPU. Ranks share the work."""
    model.eval()
    mean, std = moments(model, place.device)
    mine = torch.arange(len(part.labels))[place.rank :: place.world]
    found: Tensor | None = None
    batches = loader(View(part, size), mine.split(batch), place.workers)
    for images, _, rows in tqdm(batches, desc=title, unit="batch", leave=False, **place.bar):
        x = ((images.to(place.device) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        y = model.forward_head(model.forward_features(x), pre_logits=True) if features else model(x)
        if found is None:
            found = torch.zeros(len(part.labels), y.shape[1], device=place.device)
        found[rows.to(place.device)] = y.float()
    if found is None:
        raise UsageError(f"{len(part.labels)} images cannot be shared among {place.world} processes")
    if place.world > 1:
        torch.distributed.all_reduce(found)
    return found.cpu()


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> dict[str, Any]:
    """Test accuracy in percent of logistic regression on features [N, K] with (possibly wrong) ``labels``."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UsageError(f"the linear probe is scikit-learn's ({error}); pip install scikit-learn") from error
    if not (bool(train.isfinite().all()) and bool(test.isfinite().all())):
        raise UsageError("the features of the network are not all finite; are the --weights?")
    if len(labels.unique()) < 2:
        raise UsageError(f"the {len(labels)} training images are all of one class; give images of two classes or more")
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = ((train - mean) / std).double().numpy(), labels.numpy()
    held_out = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: max(1, len(x) // 5)].numpy()
    kept = np.setdiff1d(np.arange(len(x)), held_out)

    def fit(strength: float, rows: Any) -> Any:
        return LogisticRegression(C=strength, max_iter=300).fit(x[rows], y[rows])

    best = STRENGTHS[0]
    if len(set(y[kept])) > 1:  # else there are too few images to choose by
        best = max(STRENGTHS, key=lambda strength: fit(strength, kept).score(x[held_out], y[held_out]))
    model = fit(best, slice(None))
    return {
        "accuracy": 100.0 * float(model.score(((test - mean) / std).double().numpy(), truth.numpy())),
        "strength": best,
        "features": train.shape[1],
    }
