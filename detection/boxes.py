"""Boxes: from a detector's maps, its loss, and mean average precision, for ANN and SNN alike.

A detector returns a map for each of its scales, [B, 4 + classes, S / stride, S / stride]: of every cell the distances
from its centre to the box's left, top, right and bottom side, and a score for each class (Tian et al., FCOS, ICCV
2019). Boxes are (left, top, right, bottom) in pixels of the square image of side S.
"""

import contextlib
import io

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss
from tqdm import tqdm

from spike_tensor import firing_ratios, record_firing_ratios
from validate import mean_of, measured_on

LARGEST_IN_STRIDES = 5  # boxes with a longer side belong to the next coarser scale
CENTRE_IN_STRIDES = 1.5  # cells this near to a box's centre, and inside of it, are to find it
LEAST_SCORE, NMS_OVERLAP, MOST_CANDIDATES, MOST_BOXES = 0.01, 0.6, 300, 100


def cells(maps, image_size):
    """Of every cell of all maps, the centre [P, 2] (x, y) and the stride [P], in pixels."""
    centres, strides = [], []
    for each in maps:
        H, W = each.shape[-2:]
        stride = image_size / W
        y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        centres.append((torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride)  # [H*W, 2]
        strides.append(torch.full((H * W,), stride))
    return torch.cat(centres).to(maps[0].device), torch.cat(strides).to(maps[0].device)


def flatten_maps(maps):
    """A list of [B, 4 + C, H, W] as `sides [B, P, 4], scores [B, P, C]`, both raw."""
    rows = torch.cat([each.flatten(2) for each in maps], 2).transpose(1, 2)  # [B, P, 4 + C]
    return rows[..., :4], rows[..., 4:]


def to_boxes(sides, centres, strides):
    """Boxes [B, P, 4] of raw sides: softplus keeps the distances positive, two strides are their unit."""
    distance = F.softplus(sides) * (2 * strides[:, None])  # [B, P, 4]
    return torch.cat([centres - distance[..., :2], centres + distance[..., 2:]], -1)


def assign(targets, centres, strides):
    """Index of the target that each cell is to find, [B, P], -1 for none. targets: [B, M, 5], class -1 for none.

    A box belongs to the finest scale on which its longer side is at most `LARGEST_IN_STRIDES` strides, else to the
    coarsest one. There the cell that its centre is in, and the cells near it and inside of the box, are to find it; of
    several boxes a cell finds the smallest.
    """
    boxes = targets[:, None, :, 1:]  # [B, 1, M, 4]
    middle, extent = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    points, stride = centres[:, None], strides[:, None]  # [P, 1, 2], [P, 1]
    away = (points - middle).abs().amax(-1)  # [B, P, M]
    inside = ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(-1)
    near = (away <= stride / 2) | (inside & (away < CENTRE_IN_STRIDES * stride))
    is_found = near & (stride == scale_of(extent.amax(-1), strides)) & (targets[:, None, :, 0] >= 0)
    area = torch.where(is_found, extent.prod(-1), torch.inf)
    least, index = area.min(-1)  # [B, P]
    return torch.where(least < torch.inf, index, -1)


def scale_of(side, strides):
    """The stride at which a box with this longer side is to be found."""
    best = torch.full_like(side, strides.max().item())
    for stride in strides.unique().flip(0):
        best = torch.where(side <= LARGEST_IN_STRIDES * stride, stride, best)
    return best


class DetectionLoss(nn.Module):
    """Focal loss of the scores (Lin et al., ICCV 2017) and GIoU loss of the boxes (Rezatofighi et al., CVPR 2019).

    `loss(maps, targets)`: both summed over the batch and divided by the number of cells that are to find a box.
    """

    def __init__(self, image_size):
        super().__init__()
        self.image_size = image_size

    def forward(self, maps, targets):
        sides, scores = flatten_maps(maps)
        centres, strides = cells(maps, self.image_size)
        index = assign(targets, centres, strides)  # [B, P]
        found = index >= 0
        wanted = targets.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, 5))  # [B, P, 5]
        labels = F.one_hot(wanted[..., 0].long().clamp_min(0), scores.shape[-1]) * found[..., None]
        boxes = to_boxes(sides, centres, strides)
        score_loss = sigmoid_focal_loss(scores, labels.to(scores.dtype), reduction="sum")
        box_loss = generalized_box_iou_loss(boxes[found], wanted[found][:, 1:], reduction="sum")
        return (score_loss + box_loss) / found.sum().clamp_min(1)


def check_detects(net, net_name, images):
    """Raise ValueError unless the network's outputs are a detector's maps for the classes of the data set."""
    with torch.no_grad():
        maps = net(images[0][0][None])
    maps, wanted = maps if isinstance(maps, tuple) else (maps,), 4 + images.num_classes
    if any(each.dim() != 4 or each.shape[1] != wanted for each in maps):
        shapes = ", ".join(str(tuple(each.shape)) for each in maps)
        raise ValueError(
            f"{net_name} returns {shapes} for one image, a detector has to return maps [B, {wanted}, H, W], of 4 sides "
            f"and {images.num_classes} class scores, as yolo_tiny does"
        )


@torch.no_grad()
def find_boxes(maps, image_size):
    """For each image `boxes [N, 4], scores [N], labels [N]`, without those that overlap better ones, best first."""
    sides, scores = flatten_maps(maps)
    boxes = to_boxes(sides, *cells(maps, image_size))
    return [best_boxes(*image) for image in zip(boxes, scores.sigmoid())]


def best_boxes(boxes, scores):
    """`boxes [N, 4], scores [N], labels [N]` of one image's cells, [P, 4] and [P, C]."""
    cell, label = (scores > LEAST_SCORE).nonzero(as_tuple=True)
    score = scores[cell, label]
    best = score.argsort(descending=True)[:MOST_CANDIDATES]
    boxes, score, label = boxes[cell[best]], score[best], label[best]
    kept = batched_nms(boxes, score, label, NMS_OVERLAP)[:MOST_BOXES]
    return boxes[kept], score[kept], label[kept]


@torch.no_grad()
def evaluate_detector(net, loader, device, criterion, timesteps=None, every_step=False):
    """Measure a detector on all images of `loader`, which must not shuffle; a spiking one where `timesteps` is given.

    Returns a dict: map (mean average precision over the overlaps 0.50 to 0.95, COCO's first number) and map50 (at
    0.50), from 0 to 1, loss, samples; for a spiking network also firing_rate, spikes per neuron and step by layer.
    The precision is that after all timesteps, also with `every_step`. Raises ValueError where the loader is empty.
    """
    detections, totals, samples = [], {}, 0
    with measured_on(net, device):
        for images, targets in tqdm(loader, "validate", leave=False, delay=1):
            maps, means = run_detector(net, images.to(device), timesteps)
            means["loss"] = criterion(maps, targets.to(device)).item()
            for key, mean in means.items():
                totals[key] = totals.get(key, 0) + torch.as_tensor(mean, dtype=torch.float64) * len(images)
            detections += describe(loader.dataset, samples, find_boxes(maps, images.shape[-1]))
            samples += len(images)
    means = mean_of(totals, samples)
    result = {"samples": samples, **mean_average_precision(loader.dataset, detections), **means}
    if timesteps is not None:
        result["firing_rate"] = dict(zip(net.spiking_layers(), result["firing_rate"], strict=True))
    return result


def run_detector(net, images, timesteps):
    """The maps, and of a spiking network the firing rates."""
    if timesteps is None:
        return net(images), {}
    with record_firing_ratios():
        maps = net(images, timesteps=timesteps)
        return maps, {"firing_rate": list(firing_ratios)}


def describe(dataset, start, found):
    """What was found in the images from `start` on, as COCO's results: boxes in pixels of the original images."""
    rows = []
    for position, (boxes, scores, labels) in enumerate(found, start):
        index = dataset.indices[position]
        boxes = dataset.split.letterbox(index).to_image(boxes.cpu())
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
            category = dataset.split.categories[label]
            rows.append({"image_id": dataset.split.ids[index], "category_id": category, "bbox": box, "score": score})
    return rows


def mean_average_precision(dataset, detections):
    """`map` and `map50` of results in COCO's form, by pycocotools; 0 where nothing was found."""
    from pycocotools.cocoeval import COCOeval

    if not detections:
        return {"map": 0.0, "map50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on stdout
        truth = dataset.split.coco
        judge = COCOeval(truth, truth.loadRes(detections), "bbox")
        judge.params.imgIds = [dataset.split.ids[index] for index in dataset.indices]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"map": max(0.0, float(judge.stats[0])), "map50": max(0.0, float(judge.stats[1]))}
