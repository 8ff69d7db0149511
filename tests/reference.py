"""An independent simulation of a converted network: NumPy, int64, one timestep after the other, one spike at a time.

It reads only the numbers of `SpikeDAGModule.to_dict()`: integer weights, thresholds, initial potentials. What the
real-valued image causes (the first layer's current, in float32) is given to it. A folded average pooling hands on how
many spikes each of its windows holds.
"""

import numpy as np


def simulate(snn, first_currents, timesteps, constants=None):
    """Spikes of every layer: op name -> uint8 [T, B, ...].

    first_currents: op name -> float32 [B, ...], the constant current of every layer that reads the image. Layer after
    layer: what a layer sends in its T firing steps is what the next one reads in its T steps of input. constants: node
    -> float32 [B, ...], real values that flow into a neuron as they are.
    """
    values, trains = {node: [value] * timesteps for node, value in (constants or {}).items()}, {}
    for op in snn.to_dict()["ops"]:
        if not op["spiking"]:
            continue
        counts, steps = {}, []
        for t in range(timesteps):
            if op["name"] in first_currents:
                value = first_currents[op["name"]]
            elif op["type"] == "SpikeMaxPool2d":
                value = pool_spikes(op, values[op["in_nodes"][0]][t], counts)
            else:
                value = compute(op, [values[node][t] for node in op["in_nodes"]])
            steps.append(value)
        if op["neuron"] is not None:
            steps = fire(op, steps)
            trains[op["name"]] = np.stack(steps).astype(np.uint8)
        (out,) = op["out_nodes"]
        values[out] = steps
    return trains


def quantized_ann(snn, first_trains, timesteps):
    """Spike counts of every layer of the network as an integer ANN, without timesteps: op name -> int64 [B, ...].

    first_trains: spikes of the layers that read the image. count = clip(floor((sum of currents + u[0]) / Vthr), 0, T).
    """
    values, counts = {}, {}
    for op in snn.to_dict()["ops"]:
        (out,), inputs = op["out_nodes"], [values.get(node) for node in op["in_nodes"]]
        if op["name"] in first_trains:
            values[out] = counts[op["name"]] = first_trains[op["name"]].astype(np.int64).sum(0)
            continue
        if not op["spiking"] or any(value is None for value in inputs):
            continue  # it stays ANN, or is on the way of the image's current
        if op["type"] == "SpikeMaxPool2d":
            values[out] = in_windows(inputs[0], op["config"])
            continue
        silent = compute(op, [np.zeros_like(value) for value in inputs])
        values[out] = compute(op, inputs) + (timesteps - 1) * silent
        if op["neuron"] is not None:
            Vthr, initial = (op["neuron"][name].numpy().astype(np.int64) for name in ("Vthr", "initial_potential"))
            values[out] = counts[op["name"]] = ((values[out] + initial) // Vthr).clip(0, timesteps)
    return counts


def compute(op, inputs):
    """One op on the int64 values of one timestep."""
    tensors = {name: tensor.numpy() for name, tensor in op["tensors"].items()}
    if op["type"] == "SpikeAvgPool2d" and op["config"]["folded"]:
        assert op["neuron"] is None
        return sum_windows(inputs[0], op["config"])
    if op["type"] in ("SpikeConv2d", "SpikeConvBN", "SpikeAvgPool2d", "SpikeConvTranspose2d", "SpikeLinear"):
        return weigh(op, inputs[0], tensors)
    if op["type"] == "SpikeAffine" and "weight_q" not in tensors:
        return inputs[0]  # it scales what the spikes stand for
    if op["type"] in ("SpikeBatchNorm", "SpikeAffine", "SpikeBiasMap"):
        kind = inputs[0].dtype  # float32 on the way of the image's current
        return inputs[0] * tensors["weight_q"].astype(kind) + tensors["bias_q"].astype(kind)
    if op["type"] in ("SignedReLU", "MergeSigns"):
        return compute_pairs(op, inputs[0], tensors)
    if op["type"] == "SpikeReLU":
        return inputs[0]
    if op["type"] in ("SpikeAdd", "SpikeSubtract"):
        weights = [tensors.get(f"branch_weight{i}", np.int64(1)) for i in range(2)]
        kind = np.float32 if any(value.dtype == np.float32 for value in inputs) else np.int64
        whole = [w if x.dtype == np.float32 else w.astype(np.int64) for x, w in zip(inputs, weights)]
        return sum((value * weight).astype(kind) for value, weight in zip(inputs, whole))
    return rearrange(op["type"], op["config"], inputs)


def weigh(op, x, tensors):
    """The sums of integer weights of a convolution, a pooling or a linear layer, and its bias."""
    kind, config, weight = op["type"], op["config"], tensors["weight_q"].astype(np.int64)
    if kind == "SpikeLinear":
        value = x @ weight.T
    elif kind == "SpikeConvTranspose2d":
        value = convolve_transposed(x, weight, config)
    else:
        value = convolve(x, weight, {**config, "groups": config["channels"]} if kind == "SpikeAvgPool2d" else config)
    bias = tensors["bias_q"].astype(np.int64) if "bias_q" in tensors else np.zeros(1, np.int64)
    return value + bias.reshape(-1, *[1] * (value.ndim - 2))


def rearrange(kind, config, inputs):
    """Values in other places."""
    if kind == "ConcatOp":
        dtype = np.float32 if any(value.dtype == np.float32 for value in inputs) else np.int64
        return np.concatenate([value.astype(dtype) for value in inputs], config["dim"])
    (x,) = inputs
    if kind == "SpikePad":
        return pad(x, config["pads"])
    if kind == "SliceOp":
        return x[(slice(None), *(slice(*bounds) for *bounds, _ in config["slices"]))]
    if kind == "SpikeRepeat":
        return np.kron(x, np.ones(config["factors"], x.dtype))
    if kind == "SpikeGather":
        return x[:, :, config["rows"]][..., config["columns"]]
    if kind == "IndexOp":
        return np.take(x, config["index"], config["dim"])
    if kind == "PermuteOp":
        return permute(x, config)
    if kind == "ViewOp":
        return x.reshape(len(x), *config["shape"])
    raise NotImplementedError(kind)


def pad(x, pads):
    """Zeros around a sample; pads from the last dimension on, negative ones crop."""
    before, after = [0] * x.ndim, [0] * x.ndim
    before[::-1], after[::-1] = ([*side, *[0] * (x.ndim - len(side))] for side in (pads[::2], pads[1::2]))
    y = np.zeros([b + extent + a for b, extent, a in zip(before, x.shape, after)], x.dtype)
    for place, value in np.ndenumerate(x):
        there = tuple(i + b for i, b in zip(place, before))
        if all(0 <= i < extent for i, extent in zip(there, y.shape)):
            y[there] = value
    return y


def permute(x, config):
    """The dimensions of a sample split, in another order, and merged."""
    if config["split"] is not None:
        sizes = []
        for extent, factors in zip(x.shape[1:], config["split"]):
            known = np.prod([factor for factor in factors if factor is not None], dtype=int)
            sizes += [extent // known if factor is None else factor for factor in factors]
        x = x.reshape(len(x), *sizes)
    y = x.transpose(0, *config["dims"])
    if config["merge"] is None:
        return y
    ends = np.cumsum(config["merge"])
    return y.reshape(len(y), *(np.prod(y.shape[1:][end - n : end]) for end, n in zip(ends, config["merge"])))


def compute_pairs(op, x, tensors):
    """x and -x in alternate channels, or first + sign * second of every pair of channels, or of blocks of features."""
    if op["type"] == "SignedReLU":
        heard = tensors.get("slope", np.ones(1)) != 0  # a neuron of slope 0 hears nothing
        second = -x * heard.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 2))
        return np.stack([x, second], 2).reshape(len(x), -1, *x.shape[2:])
    x, signs, sums = x * tensors["branch_weight0"].astype(np.int64), tensors["signs"].reshape(-1), []
    block = op["config"]["block"]
    for pair, start in enumerate(range(0, x.shape[1], 2 * block)):
        first, second = x[:, start : start + block], x[:, start + block : start + 2 * block]
        sums.append(first + int(signs[pair % len(signs)]) * second)
    return np.concatenate(sums, 1)


def convolve(x, weight, config):
    """int64 [B, C_in, H, W] * [C_out, C_in / groups, kh, kw], kernel position by kernel position."""
    (sh, sw), (ph, pw) = config["stride"], config["padding"]
    dh, dw = config.get("dilation", (1, 1))
    groups, (C_out, C_group, kh, kw) = config["groups"], weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    H = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    W = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    x = x.reshape(len(x), groups, C_group, *x.shape[2:])
    weight = weight.reshape(groups, C_out // groups, C_group, kh, kw)
    y = np.zeros((len(x), groups, C_out // groups, H, W), np.int64)
    for i in range(kh):
        for j in range(kw):
            window = x[..., i * dh : i * dh + (H - 1) * sh + 1 : sh, j * dw : j * dw + (W - 1) * sw + 1 : sw]
            y += np.einsum("bgchw,goc->bgohw", window, weight[..., i, j])
    return y.reshape(len(x), C_out, H, W)


def convolve_transposed(x, weight, config):
    """int64 [B, C_in, H, W], every input pixel adding its weighted kernel to the output."""
    (sh, sw), (ph, pw), (dh, dw) = config["stride"], config["padding"], config["dilation"]
    (oh, ow), groups, (C_in, C_group, kh, kw) = config["output_padding"], config["groups"], weight.shape
    B, _, H, W = x.shape
    full = np.zeros((B, groups, C_group, (H - 1) * sh + dh * (kh - 1) + 1 + oh, (W - 1) * sw + dw * (kw - 1) + 1 + ow))
    full = full.astype(np.int64)
    x = x.reshape(B, groups, C_in // groups, H, W)
    weight = weight.reshape(groups, C_in // groups, C_group, kh, kw)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + (H - 1) * sh + 1, sh)
            columns = slice(j * dw, j * dw + (W - 1) * sw + 1, sw)
            full[..., rows, columns] += np.einsum("bgchw,gco->bgohw", x, weight[..., i, j])
    full = full.reshape(B, groups * C_group, *full.shape[3:])
    return full[:, :, ph : full.shape[2] - ph, pw : full.shape[3] - pw]


def sum_windows(x, config):
    """The sum of every window of int64 [B, C, H, W], window by window; the padding adds nothing."""
    (kh, kw), (sh, sw), (ph, pw) = config["kernel_size"], config["stride"], config["padding"]
    H, W = (x.shape[2] + 2 * ph - kh) // sh + 1, (x.shape[3] + 2 * pw - kw) // sw + 1
    y = np.zeros((*x.shape[:2], H, W), np.int64)
    for i in range(H):
        for j in range(W):
            rows, columns = slice(max(i * sh - ph, 0), i * sh - ph + kh), slice(max(j * sw - pw, 0), j * sw - pw + kw)
            y[:, :, i, j] = x[:, :, rows, columns].sum((2, 3))
    return y


def pool_spikes(op, spikes, counts):
    """One step of max pooling: "or" is the maximum of the spikes; "gate" lets a new largest count of a window out.

    Of pairs, every second channel has its smallest count instead.
    """
    config = op["config"]
    if config["mode"] == "or":
        return in_windows(spikes, config)
    before, sent = counts.get(op["name"], (np.zeros_like(spikes), 0))
    now = before + spikes
    out = (in_windows(now, config) > sent).astype(np.int64)
    counts[op["name"]] = now, sent + out
    return out


def in_windows(x, config):
    """What a max pooling takes from windows of int64 [B, C, H, W]: of pairs, the minimum of every second channel."""
    y = extreme_in_windows(x, config, np.max)
    if config.get("pairs"):
        y[:, 1::2] = extreme_in_windows(x[:, 1::2], config, np.min)
    return y


def extreme_in_windows(x, config, extreme):
    """The maximum or minimum of every window of int64 [B, C, H, W]; windows reach over the edge with ceil_mode."""
    (kh, kw), (sh, sw), (ph, pw) = config["kernel_size"], config["stride"], config["padding"]
    dh, dw = config["dilation"]
    H, W = (
        count_windows(size, *rest, config["ceil_mode"])
        for size, *rest in ((x.shape[2], kh, sh, ph, dh), (x.shape[3], kw, sw, pw, dw))
    )
    y = np.zeros((*x.shape[:2], H, W), np.int64)
    for i in range(H):
        for j in range(W):
            rows = [r for r in range(i * sh - ph, i * sh - ph + dh * kh, dh) if 0 <= r < x.shape[2]]
            columns = [c for c in range(j * sw - pw, j * sw - pw + dw * kw, dw) if 0 <= c < x.shape[3]]
            y[:, :, i, j] = extreme(x[:, :, rows][..., columns], (2, 3))
    return y


def count_windows(size, kernel, stride, padding, dilation, ceil_mode):
    """Windows along one side; the last one starts inside the input or its left padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = -(-span // stride) + 1 if ceil_mode else span // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def fire(op, currents):
    """The spikes of the neurons of `op`, as many steps as of current; float32 behind the image, else int64.

    The current of `listen` steps is integrated first; then the neurons fire, with the rest of the current and, at the
    end, without any. Behind their window they are silent.
    """
    neuron = {k: v.numpy() if hasattr(v, "numpy") else v for k, v in op["neuron"].items()}
    kind = np.float32 if currents[0].dtype == np.float32 else np.int64
    Vthr, listen = neuron["Vthr"].astype(kind), min(neuron["listen"], len(currents))
    u, sent = np.zeros(currents[0].shape, kind) + neuron["initial_potential"].astype(kind), []
    for t in range(len(currents) + listen):
        u = u + currents[t] if t < len(currents) else u
        if t < listen:
            continue
        is_open = neuron["window"] is None or len(sent) < neuron["window"]
        spikes = (u >= Vthr).astype(np.int64) * is_open
        subtracts = neuron["reset_mode"] == "subtraction"
        u = u - Vthr * spikes.astype(kind) if subtracts else np.where(spikes, kind(0), u)
        sent.append(spikes)
    return sent
