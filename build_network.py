"""The networks by name, and the place where a user adds one.

To add a network, write a function `(in_channels, num_classes) -> nn.Module` and decorate it with `@network()`;
`ann2snn.py <function name>` then converts it. A network in a file of your own needs no edit here: `networks/file.py`.
"""

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

from networks.checkpoint import load_weights
from networks.file import FORMS, TIMM, TORCHVISION, as_shape, check_outside, is_outside, outside_network, outside_shape
from runtime.cli import did_you_mean
from runtime.user_code import names_in

TORCHVISION_IMAGE_SIZE = 224  # pixels: torchvision's classifiers were trained at 224x224, most of them
PRETRAINED = "pretrained"  # as --ann_weight: the weights that torchvision or timm has
CHECKPOINTS = (".pt", ".pth", ".th", ".ckpt", ".safetensors", ".tar")
NETWORKS = {}  # name -> builder with an attribute `image_size`, the side of its square input in pixels


def network(image_size=32, has_weights=False):
    """Register a builder under its function name. has_weights: it sets its weights, so it needs no training."""

    def register(builder):
        builder.image_size, builder.has_weights = image_size, has_weights
        NETWORKS[builder.__name__] = builder
        return builder

    return register


def check_net_name(name):
    """Raise ValueError unless `name` is a network."""
    if name.startswith(TORCHVISION):
        from torchvision import models

        known = models.list_models(module=models)
        if name.removeprefix(TORCHVISION) not in known:
            raise ValueError(f"torchvision has no image classifier '{name.removeprefix(TORCHVISION)}', see its list")
    elif is_outside(name):
        check_outside(name)
    elif name.endswith(".py"):
        raise ValueError(f"{name} is a file, name the class or function in it, {name}:NAME{names_in(name)}")
    elif name.endswith(CHECKPOINTS):
        raise ValueError(f"{name} is a checkpoint, name its network and give the file with --ann_weight")
    elif name not in NETWORKS:
        raise ValueError(
            f"unknown network '{name}', choose one of {', '.join(NETWORKS)}, {FORMS}{did_you_mean(name, NETWORKS)}"
        )


def get_net_by_name(name, in_channels=1, num_classes=10, pretrained=False, net_args=None):
    """A new network for images with `in_channels` channels and for `num_classes` classes.

    `torchvision:NAME` is an image classifier of torchvision; `pretrained` loads torchvision's weights. Other forms of
    `name` stand in `networks/file.py`. net_args: more keyword arguments, for networks from outside. Raises ValueError
    for an unknown name, and for `pretrained` or `net_args` with a network that takes none.
    """
    check_net_name(name)
    if is_outside(name):
        return outside_network(name, in_channels, num_classes, pretrained, net_args)
    if net_args:
        raise ValueError(f"--net_args are for networks of your own and timm:NAME, {name} takes none")
    if name.startswith(TORCHVISION):
        return torchvision_net(name.removeprefix(TORCHVISION), in_channels, num_classes, pretrained)
    if pretrained:
        raise ValueError(
            f"pretrained weights are for torchvision:NAME, name the file of those of {name} with --ann_weight"
        )
    return NETWORKS[name](in_channels, num_classes)


def torchvision_net(name, in_channels, num_classes, pretrained=False):
    """A classifier of torchvision. Raises ValueError where channels or classes differ from those of its training."""
    from torchvision import models

    if in_channels != 3:
        raise ValueError(f"torchvision:{name} takes colour images, use a --dataset with 3 channels, not {in_channels}")
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if not pretrained:
        return models.get_model(name, weights=None, num_classes=num_classes, **options)
    weights = models.get_model_weights(name).DEFAULT
    if len(weights.meta["categories"]) != num_classes:
        raise ValueError(
            f"the weights of torchvision:{name} know {len(weights.meta['categories'])} classes, the data set has "
            f"{num_classes}: train the network, or use the data set they are for"
        )
    try:
        return models.get_model(name, weights=weights)
    except OSError as error:
        raise OSError(
            f"the weights {weights.url} cannot be downloaded ({type(error).__name__}), put the file into "
            f"{os.path.join(torch.hub.get_dir(), 'checkpoints')}"
        ) from error


def input_shape(name):
    """(C, H, W) of the images of network `name`, with None for what only the data set or the user knows."""
    check_net_name(name)
    if is_outside(name):
        return outside_shape(name)
    if name.startswith(TORCHVISION):
        return 3, TORCHVISION_IMAGE_SIZE, TORCHVISION_IMAGE_SIZE
    return as_shape(NETWORKS[name].image_size)


def input_size(name):
    """The height, in pixels, of the images of network `name`; None if it does not say."""
    return input_shape(name)[1]


def choose_input(args):
    """Set `args.channels` and `args.image_size` (a side, (H, W) or None) by --input_shape or by what the network says.

    None leaves the choice to the data set.
    """
    args.channels, height, width = getattr(args, "input_shape", None) or input_shape(args.net_name)
    args.image_size = height if height == width else (height, width)


class ExampleNet(nn.Module):
    """Three convolutions and a linear layer without biases, for images of 32x32 pixels."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 5, bias=False)
        self.conv2 = nn.Conv2d(8, 16, 3, bias=False)
        self.conv3 = nn.Conv2d(16, 32, 3, bias=False)
        self.fc = nn.Linear(512, num_classes, bias=False)

    def forward(self, x):  # [B, in_channels, 32, 32]
        x = F.relu(self.conv1(x))  # [B, 8, 28, 28]
        x = F.avg_pool2d(x, 2)  # [B, 8, 14, 14]
        x = F.relu(self.conv2(x))  # [B, 16, 12, 12]
        x = F.avg_pool2d(x, 2)  # [B, 16, 6, 6]
        x = F.relu(self.conv3(x))  # [B, 32, 4, 4]
        x = torch.flatten(x, 1)  # [B, 512]
        return self.fc(x)


@network(image_size=32)
def example_net(in_channels, num_classes):
    """The specification's example network."""
    return ExampleNet(in_channels, num_classes)


# Networks for CIFAR: images of 32x32 pixels.


def conv_bn(in_channels, out_channels, kernel_size=3, stride=1, groups=1):
    """A convolution without bias that keeps the size at stride 1, and its BatchNorm."""
    padding = (kernel_size - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


@network(image_size=32)
def vgg9_bn(in_channels, num_classes):
    """Eight 3x3 convolutions with BatchNorm in four stages with average poolings, and a linear layer (VGG form)."""
    layers, channels = [], in_channels
    for stage in ((32, 48), (96, 96), (192, 192), (256, 256)):
        for width in stage:
            layers += [*conv_bn(channels, width), nn.ReLU()]
            channels = width
        layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(256 * 2 * 2, num_classes))


class BasicBlock(nn.Module):
    """relu(conv(relu(conv(x))) + shortcut(x)); where the size changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = conv_bn(in_channels, out_channels, stride=stride)
        self.relu1 = nn.ReLU()
        self.conv2 = conv_bn(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, out_channels, kernel_size=1, stride=stride)
        self.relu2 = nn.ReLU()

    def forward(self, x):
        return self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))


@network(image_size=32)
def resnet20(in_channels, num_classes):
    """ResNet-20 for CIFAR: 3 stages of 3 blocks with 16, 32, 64 channels (He et al., CVPR 2016)."""
    layers, channels = [*conv_bn(in_channels, 16), nn.ReLU()], 16
    for width in (16, 32, 64):
        for i in range(3):
            layers.append(BasicBlock(channels, width, stride=2 if width > 16 and i == 0 else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def separable(in_channels, out_channels, stride):
    """A depthwise 3x3 and a 1x1 convolution, each with BatchNorm and ReLU6 (Howard et al., MobileNets, 2017)."""
    return [
        *conv_bn(in_channels, in_channels, stride=stride, groups=in_channels),
        nn.ReLU6(),
        *conv_bn(in_channels, out_channels, kernel_size=1),
        nn.ReLU6(),
    ]


@network(image_size=32)
def mobilenet_small(in_channels, num_classes):
    """Depthwise separable convolutions with ReLU6."""
    layers, channels = [*conv_bn(in_channels, 16), nn.ReLU6()], 16
    for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2)):
        layers += separable(channels, width, stride)
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def conv_bn_relu(in_channels, out_channels, kernel_size=3):
    """A convolution that keeps the size, BatchNorm, ReLU."""
    return nn.Sequential(*conv_bn(in_channels, out_channels, kernel_size), nn.ReLU())


class Inception(nn.Module):
    """1x1, 3x3 and 5x5 convolutions and a pooling side by side (Szegedy et al., CVPR 2015)."""

    def __init__(self, in_channels, width):
        super().__init__()
        self.branch1 = conv_bn_relu(in_channels, width, 1)
        self.branch3 = nn.Sequential(conv_bn_relu(in_channels, width, 1), conv_bn_relu(width, 2 * width, 3))
        self.branch5 = nn.Sequential(conv_bn_relu(in_channels, width // 2, 1), conv_bn_relu(width // 2, width, 5))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), conv_bn_relu(in_channels, width, 1))

    def forward(self, x):  # [B, in_channels, H, W] -> [B, 5 * width, H, W]
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pooled(x)], dim=1)


@network(image_size=32)
def inception_small(in_channels, num_classes):
    """Two inception blocks with concatenated branches."""
    return nn.Sequential(
        conv_bn_relu(in_channels, 16),
        nn.AvgPool2d(2),
        Inception(16, 8),
        nn.AvgPool2d(2),
        Inception(40, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(80, num_classes),
    )


class UNet(nn.Module):
    """Two poolings down, two transposed convolutions up with concatenated skips, and a linear classifier."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.down1 = conv_bn_relu(in_channels, 16)
        self.down2 = conv_bn_relu(16, 32)
        self.bottom = conv_bn_relu(32, 64)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.merge2 = conv_bn_relu(64, 32)
        self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge1 = conv_bn_relu(32, 16)
        self.classify = nn.Linear(16 * 8 * 8, num_classes)

    def forward(self, x):  # [B, in_channels, 32, 32]
        full = self.down1(x)  # [B, 16, 32, 32]
        half = self.down2(F.avg_pool2d(full, 2))  # [B, 32, 16, 16]
        x = self.bottom(F.avg_pool2d(half, 2))  # [B, 64, 8, 8]
        x = self.merge2(torch.cat([half, F.relu(self.up2(x))], 1))  # [B, 32, 16, 16]
        x = self.merge1(torch.cat([full, F.relu(self.up1(x))], 1))  # [B, 16, 32, 32]
        return self.classify(F.avg_pool2d(x, 4).flatten(1))


@network(image_size=32)
def unet_small(in_channels, num_classes):
    """A small U-Net (Ronneberger et al., MICCAI 2015) with a linear layer, to classify."""
    return UNet(in_channels, num_classes)


# A detector, for --dataset COCO.


class DetectorBackbone(nn.Module):
    """Strided convolutions down to S/16, and a transposed convolution back up to S/8, concatenated with that scale."""

    def __init__(self, in_channels):
        super().__init__()
        self.down2 = nn.Sequential(*conv_bn(in_channels, 16, stride=2), nn.ReLU())
        self.down4 = nn.Sequential(*conv_bn(16, 32, stride=2), nn.ReLU(), conv_bn_relu(32, 32))
        self.down8 = nn.Sequential(*conv_bn(32, 48, stride=2), nn.ReLU(), conv_bn_relu(48, 48))
        self.down16 = nn.Sequential(*conv_bn(48, 64, stride=2), nn.ReLU(), conv_bn_relu(64, 64))
        self.up = nn.Sequential(nn.ConvTranspose2d(64, 32, 2, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.merge = conv_bn_relu(48 + 32, 64)

    def forward(self, x):  # [B, in_channels, S, S]
        fine = self.down8(self.down4(self.down2(x)))  # [B, 48, S/8, S/8]
        coarse = self.down16(fine)  # [B, 64, S/16, S/16]
        return self.merge(torch.cat([fine, self.up(coarse)], 1)), coarse  # [B, 64, S/8, S/8], [B, 64, S/16, S/16]


class YoloTiny(nn.Module):
    """A backbone, and a head for each of its two scales: 4 sides of a box and a score per class for each cell."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.backbone = DetectorBackbone(in_channels)
        self.fine_head = nn.Conv2d(64, 4 + num_classes, 1)
        self.coarse_head = nn.Conv2d(64, 4 + num_classes, 1)
        for head in (self.fine_head, self.coarse_head):
            # sigmoid(-4.6) = 0.01: low scores at the start, so that the many empty cells do not dominate the loss
            # (Lin et al., ICCV 2017)
            head.bias.data = torch.tensor([0.0] * 4 + [-4.6] * num_classes)

    def forward(self, x):  # [B, in_channels, S, S]
        fine, coarse = self.backbone(x)
        return self.fine_head(fine), self.coarse_head(coarse)  # [B, 4 + classes, S/8, S/8] and the same at S/16


@network(image_size=96)
def yolo_tiny(in_channels, num_classes):
    """A one-stage detector without anchors, as FCOS (Tian et al., ICCV 2019), and without max pooling."""
    return YoloTiny(in_channels, num_classes)


# The weights of the debug networks are set by hand to -1, 0 and 1: quantization to 2 bits or more is exact, and every
# spike can be computed on paper. Their last layer only sums.


def edge_conv():
    """Two 3x3 filters on one channel: left column minus right column, and its negative."""
    conv = nn.Conv2d(1, 2, 3, bias=False)
    edge = torch.tensor([1.0, 0.0, -1.0]).expand(3, 3)
    conv.weight.data = torch.stack([edge, -edge])[:, None]
    return conv


def sum_per_channel(channels, pixels, num_classes):
    """A linear layer whose class k sums the pixels of channel k."""
    fc = nn.Linear(channels * pixels, num_classes, bias=False)
    fc.weight.data.zero_()
    for k in range(min(channels, num_classes)):
        fc.weight.data[k, k * pixels : (k + 1) * pixels] = 1
    return fc


@network(image_size=6, has_weights=True)
def debug_net0(in_channels, num_classes):
    """A single convolution (for debug0)."""
    return nn.Sequential(edge_conv(), nn.ReLU(), nn.Flatten(), sum_per_channel(2, 16, num_classes))


@network(image_size=6, has_weights=True)
def debug_net1(in_channels, num_classes):
    """A chain of two average poolings, then each channel minus the other (for debug0)."""
    difference = nn.Conv2d(2, 2, 1, bias=False)
    difference.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[:, :, None, None]
    return nn.Sequential(
        edge_conv(),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.AvgPool2d(2),
        difference,
        nn.ReLU(),
        nn.Flatten(),
        sum_per_channel(2, 1, num_classes),
    )


class DebugResidual(nn.Module):
    """relu(conv2(r) + r) with r = relu(conv1(x)): each channel minus the other, then a vote among four neighbours."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 1, bias=False)
        self.conv1.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[:, :, None, None]
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        self.conv2.weight.data = self.conv1.weight.data * cross
        self.fc = sum_per_channel(2, 16, num_classes)

    def forward(self, x):  # [B, 2, 4, 4]
        r = F.relu(self.conv1(x))
        x = self.conv2(r)
        x += r
        return self.fc(F.relu(x).flatten(1))


@network(image_size=4, has_weights=True)
def debug_net2(in_channels, num_classes):
    """A residual add before the ReLU (for debug1)."""
    return DebugResidual(num_classes)


class DebugConcat(nn.Module):
    """Horizontal and vertical edges, concatenated and compared with each other in a 3x3 window."""

    def __init__(self, num_classes):
        super().__init__()
        self.columns = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False)
        self.columns.weight.data = torch.tensor([-1.0, 1.0, 0.0]).view(1, 1, 1, 3)
        self.rows = nn.Conv2d(1, 1, (3, 1), padding=(1, 0), bias=False)
        self.rows.weight.data = torch.tensor([-1.0, 1.0, 0.0]).view(1, 1, 3, 1)
        self.compare = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.compare.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[:, :, None, None].repeat(1, 1, 3, 3)
        self.fc = sum_per_channel(2, 36, num_classes)

    def forward(self, x):  # [B, 1, 6, 6]
        x = torch.cat([F.relu(self.columns(x)), F.relu(self.rows(x))], dim=1)  # [B, 2, 6, 6]
        return self.fc(F.relu(self.compare(x)).flatten(1))


@network(image_size=6, has_weights=True)
def debug_net3(in_channels, num_classes):
    """A concatenation of two convolutions (for debug2)."""
    return DebugConcat(num_classes)


def build_trained_net(name, in_channels, num_classes, ann_weight=None, net_args=None):
    """Network `name` with the weights in the file `ann_weight`; warns about an untrained network.

    ann_weight: "pretrained" stands for the weights that torchvision or timm has. net_args: as in `get_net_by_name`.
    """
    net = get_net_by_name(name, in_channels, num_classes, ann_weight == PRETRAINED, net_args)
    if ann_weight is None and is_outside(name) and not name.startswith(TIMM):
        print(f"no --ann_weight: {name} keeps the weights that it is built with", file=sys.stderr)
    elif ann_weight is None and not getattr(NETWORKS.get(name), "has_weights", False):
        print(f"warning: no --ann_weight, {name} starts from random weights", file=sys.stderr)
    return net if ann_weight in (None, PRETRAINED) else load_weights(net, ann_weight)


@torch.no_grad()
def check_runs(net, name, image):
    """Raise ValueError unless network `name` runs on an image [C, H, W]."""
    try:
        net.eval()(image[None])
    except RuntimeError as error:
        shape, reason = list(image.shape), str(error).splitlines()[0]
        raise ValueError(f"{name} cannot run on images of {shape}, use another --dataset: {reason}") from error
