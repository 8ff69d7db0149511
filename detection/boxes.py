"""Boxes from a detector's maps, the detection loss and mean average precision, for ANN and SNN alike.

A detector returns one map per scale, [B, 4 + classes, S / stride, S / stride]. Each cell holds the distances from its
centre to the left, top, right and bottom side of a box, and a score for each class (Tian et al., FCOS, ICCV 2019).
Boxes are (left, top, right, bottom) in pixels of the square image of side S.
"""

import contextlib
import io

import torch
import torch.nn.functional as F
from torch import nn

from runtime.processes import count, exchange, rank
from validate import validate

# A box with a longer side belongs to the next coarser scale. FCOS uses 8 for its five scales; with yolo_tiny's two, at
# 96 pixels, 8 would leave the coarse one only boxes above 64 pixels.
LARGEST_IN_STRIDES = 5
CENTRE_IN_STRIDES = 1.5  # cells this near to a box's centre learn to find it: FCOS's radius of centre sampling
LEAST_SCORE = 0.01  # what an untrained head gives every cell (build_network.YoloTiny): less says nothing
NMS_OVERLAP = 0.6  # IoU above which the lower-scored of two boxes of one class is dropped, as in FCOS
MOST_BOXES = 100  # per image: COCO's average precision counts no more
MOST_CANDIDATES = 3 * MOST_BOXES  # per image, before the suppression, which drops most neighbours of a good box


def cells(maps, image_size):
    """The centre [P, 2] (x, y) and the stride [P] of every cell of all maps, in pixels."""
    centres, strides = [], []
    for each in maps:
        H, W = each.shape[-2:]
        stride = image_size / W
        y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        centres.append((torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride)  # [H*W, 2]
        strides.append(torch.full((H * W,), stride))
    return torch.cat(centres).to(maps[0].device), torch.cat(strides).to(maps[0].device)


def flatten_maps(maps):
    """Maps [B, 4 + C, H, W] as `sides [B, P, 4], scores [B, P, C]`, both raw outputs of the network."""
    rows = torch.cat([each.flatten(2) for each in maps], 2).transpose(1, 2)  # [B, P, 4 + C]
    return rows[..., :4], rows[..., 4:]


def to_boxes(sides, centres, strides):
    """Boxes [B, P, 4] from raw sides: softplus makes them positive distances, in units of two strides."""
    distance = F.softplus(sides) * (2 * strides[:, None])  # [B, P, 4]
    return torch.cat([centres - distance[..., :2], centres + distance[..., 2:]], -1)


def assign(targets, centres, strides):
    """Index of the target that each cell should find, [B, P], -1 for none. targets: [B, M, 5], class -1 for none.

    A box belongs to the finest scale on which its longer side is at most `LARGEST_IN_STRIDES` strides, else to the
    coarsest scale. On this scale, the box is assigned to the cell that contains its centre, and to the nearby cells
    inside the box. A cell with several boxes gets the smallest.
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
    """The stride of the scale to which a box with this longer side belongs."""
    best = torch.full_like(side, strides.max().item())
    for stride in strides.unique().flip(0):
        best = torch.where(side <= LARGEST_IN_STRIDES * stride, stride, best)
    return best


class DetectionLoss(nn.Module):
    """Focal loss of the scores (Lin et al., ICCV 2017) and GIoU loss of the boxes (Rezatofighi et al., CVPR 2019).

    `loss(maps, targets)`: both are summed over the batch and divided by the number of cells with an assigned box.
    """

    def __init__(self, image_size):
        super().__init__()
        self.image_size = image_size

    def forward(self, maps, targets):
        # Every script imports this file; torchvision takes seconds, and only detectors need it.
        from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

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
    """`boxes [N, 4], scores [N], labels [N]` of each image, best first, after non-maximum suppression."""
    sides, scores = flatten_maps(maps)
    boxes = to_boxes(sides, *cells(maps, image_size))
    return [best_boxes(*image) for image in zip(boxes, scores.sigmoid())]


def best_boxes(boxes, scores):
    """`boxes [N, 4], scores [N], labels [N]` from one image's cells, boxes [P, 4] and scores [P, C]."""
    from torchvision.ops import batched_nms

    cell, label = (scores > LEAST_SCORE).nonzero(as_tuple=True)
    score = scores[cell, label]
    best = score.argsort(descending=True)[:MOST_CANDIDATES]
    boxes, score, label = boxes[cell[best]], score[best], label[best]
    kept = batched_nms(boxes, score, label, NMS_OVERLAP)[:MOST_BOXES]
    return boxes[kept], score[kept], label[kept]


def evaluate_detector(net, loader, device, criterion, timesteps=None, every_step=False):
    """Mean average precision of a detector on all images of `loader`, which must not shuffle.

    `timesteps` is given for a spiking detector. `every_step` changes nothing: precision is measured after the last
    timestep. Returns a dict: map (mean average precision over the overlaps 0.50 to 0.95, COCO's first number) and map50
    (at 0.50), from 0 to 1, loss, samples; for a spiking network also firing_rate, spikes per neuron and step by layer.
    Raises ValueError where the loader is empty or the loss is not a number.
    """
    metric = MeanAveragePrecision(loader.dataset, criterion, getattr(loader, "batch_size", None))
    return validate(net, loader, device, metric, timesteps)


class MeanAveragePrecision:
    """The metric of detectors (see `validate.validate`): COCO's mean average precision.

    Batches must come in the order of `dataset`, a CocoImages. Of several processes each measures every `count()`-th
    batch, of `batch_size` images.
    """

    every_step = False

    def __init__(self, dataset, criterion, batch_size=None):
        self.dataset, self.criterion, self.results = dataset, criterion, []
        self.samples, self.skipped = (0, 0) if count() == 1 else (rank() * batch_size, (count() - 1) * batch_size)

    def measure_batch(self, inputs, outputs, targets):
        maps = tuple(x[-1] for x in outputs)
        found = find_boxes(maps, inputs[0].shape[-1])
        self.results += describe(self.dataset, self.samples, found)
        self.samples += len(inputs[0]) + self.skipped
        return {"loss": self.criterion(maps, targets).item()}

    def summary(self):
        return mean_average_precision(self.dataset, [row for rows in exchange(self.results) for row in rows])


def describe(dataset, start, found):
    """Rows in COCO's result format for the images from position `start` on, boxes in pixels of the original images."""
    rows = []
    for position, (boxes, scores, labels) in enumerate(found, start):
        index = dataset.indices[position]
        boxes = dataset.split.letterbox(index).to_image(boxes.cpu())
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
            category = dataset.split.categories[label]
            rows.append({"image_id": dataset.split.ids[index], "category_id": category, "bbox": box, "score": score})
    return rows


def mean_average_precision(dataset, results):
    """`map` and `map50` of rows in COCO's result format, computed by pycocotools; 0 where nothing was found."""
    from pycocotools.cocoeval import COCOeval

    if not results:
        return {"map": 0.0, "map50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on stdout
        truth = dataset.split.coco
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.params.imgIds = [dataset.split.ids[index] for index in dataset.indices]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {"map": max(0.0, float(judge.stats[0])), "map50": max(0.0, float(judge.stats[1]))}
