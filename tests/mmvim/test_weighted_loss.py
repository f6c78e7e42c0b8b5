import pytest
import torch
from torch.nn.functional import cross_entropy

from mmvim.models import ClassWeightedLoss

WEIGHTS = [0.5, 2.0, 4.0]


def example() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(3, (2, 5, 7))
    labels[0, :2] = 255
    return torch.randn(2, 3, 5, 7, requires_grad=True), labels


def test_ignored_pixels_count_for_nothing():
    scores, labels = example()
    loss = ClassWeightedLoss(WEIGHTS, loss_weight=0.4)(scores, labels)
    counts = labels != 255
    kept = scores.movedim(1, -1)[counts]  # (N, 3)
    expected = 0.4 * cross_entropy(kept, labels[counts], torch.tensor(WEIGHTS))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert not gradient[0, :, :2].any() and gradient[0, :, 2:].any()


def test_pixels_have_weights_of_their_own():
    scores, labels = example()
    weight = torch.zeros(2, 5, 7)
    weight[1, 3, 4], weight[0, 4, 1] = 1.0, 3.0
    loss = ClassWeightedLoss(WEIGHTS)(scores, labels, weight=weight)
    picked = torch.stack([scores[1, :, 3, 4], *[scores[0, :, 4, 1]] * 3])
    of_labels = torch.stack([labels[1, 3, 4], *[labels[0, 4, 1]] * 3])
    torch.testing.assert_close(loss, cross_entropy(picked, of_labels, torch.tensor(WEIGHTS)))


def test_an_image_without_labels_has_no_loss():
    scores, labels = example()
    loss = ClassWeightedLoss(WEIGHTS)(scores, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0 and not scores.grad.any()


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match='class_weight must be positive and finite, got 0'):
        ClassWeightedLoss([1.0, 0.0])
    scores, labels = example()
    with pytest.raises(ValueError, match='class_weight has 2 numbers, the scores have 3 classes'):
        ClassWeightedLoss([1.0, 2.0])(scores, labels)
