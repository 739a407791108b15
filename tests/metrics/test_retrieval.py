"""Ranks, recalls and shares of a class, by hand."""

from __future__ import annotations

import torch

from imagewright.metrics.retrieval import of_class, ranks, recalls

SIMILARITY = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.3, 0.3]])


def test_ranks_and_recalls() -> None:
    places = ranks(SIMILARITY)
    assert places.tolist() == [0, 1, 2]  # ties count against it
    assert recalls(places) == {"r1": 1 / 3, "r5": 1, "r10": 1}
    assert recalls(torch.tensor([0, 4, 5, 9, 10])) == {"r1": 0.2, "r5": 0.4, "r10": 0.8}


def test_first_ones_of_a_class() -> None:
    labels = torch.tensor([0, 0, 1])
    assert of_class(SIMILARITY[:2, :2], labels[:2], 10) == 1
    assert of_class(torch.eye(3), torch.tensor([0, 1, 2]), 1) == 1
    assert of_class(1 - torch.eye(3), torch.tensor([0, 1, 2]), 2) == 0
