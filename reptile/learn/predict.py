"""Predicting with adapted weights: the three modes of batch norm.

- transductive: all queries in one forward pass, with the statistics of them all.
- non_transductive: each query in a forward pass together with the whole support set.
- frozen: batch norm uses the support set's statistics; queries are independent of each other.
"""

import torch
from torch import Tensor

from reptile.models import Model, Params
from reptile.settings import BatchNormMode


def query_logits(
    model: Model, params: Params, support: Tensor, queries: Tensor, mode: BatchNormMode
) -> Tensor:
    """Return logits [Q, ways] of query images [Q, C, H, W], given the support images [S, …]."""
    if mode == "transductive":
        return model.forward(params, queries)
    if mode == "frozen":
        return model.forward(params, queries, model.statistics(params, support))
    alone = [model.forward(params, torch.cat([support, query[None]]))[-1] for query in queries]
    return torch.stack(alone)
