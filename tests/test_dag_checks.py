"""Images of another size than the traced one: both sizes are named."""

import copy

import pytest
from torch import nn
from tracing import Call, SmallNet, image, largest_difference

from ann_parser import parse_ann_model


def adaptive(pooling):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pooling, nn.Conv2d(4, 5, 1)).eval()


SIZES = {
    "adaptive to 1": nn.AdaptiveAvgPool2d(1),
    "adaptive to 2": nn.AdaptiveAvgPool2d(2),
    "adaptive to the size": nn.AdaptiveAvgPool2d(8),
    "adaptive to the width": nn.AdaptiveAvgPool2d((1, None)),
    "mean": Call(lambda x: x.mean([2, 3], keepdim=True)),
    "ceil_mode": nn.AvgPool2d(2, ceil_mode=True),
}


@pytest.mark.parametrize("pooling", SIZES.values(), ids=SIZES)
def test_an_image_of_another_size_is_refused_by_both_sizes(pooling):
    net = adaptive(pooling)
    dag = parse_ann_model(net, (image(),))
    for graph in (dag, copy.deepcopy(dag)):
        x = image()
        assert largest_difference(graph(x), net(x)) <= 1e-5
        for size in (4, 9, 16):
            with pytest.raises(ValueError, match=rf"8\D+8.* gets .*{size}\D+{size}"):
                graph(image(size=size))


def test_windows_of_one_size_take_every_image():
    dag = parse_ann_model(adaptive(nn.AvgPool2d(2)), (image(),))
    assert dag(image(size=16)).shape == (2, 5, 8, 8)


def test_a_view_names_both_sizes():
    dag = parse_ann_model(SmallNet(), (image(),))
    with pytest.raises(ValueError, match=r"a view to \[64\] gets \[4, 8, 8\]"):
        dag(image(size=16))
