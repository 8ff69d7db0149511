"""A float network of PyTorch as a Keras model that computes the same. Keras keeps images as [B, H, W, C]."""

import numpy as np

MAX_DIFFERENCE = 1e-4  # between the outputs of both


def as_keras(net, images):
    """The network, a graph of `peers.as_modules`, as a Keras model. images: some of its inputs [B, C, H, W].

    Raises ValueError for a layer that `keras_layer` does not know, and if the outputs for the images are not the same.
    """
    import tf_keras as keras
    import torch

    model = keras.Sequential([keras.layers.Input(channels_last(images).shape[1:])])
    for module in chain(net):
        layer, weights = keras_layer(module, model.layers[-1].input_shape if model.layers else None)
        model.add(layer)
        if weights:
            layer.set_weights([weight.detach().numpy() for weight in weights])
    with torch.no_grad():
        difference = abs(net(images).numpy() - model.predict_on_batch(channels_last(images))).max()
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"the network in Keras is not the same, its outputs differ by {difference:.2g}")
    return model


def chain(net):
    """The modules of a graph in their order. Raises ValueError for a function other than flattening."""
    import torch
    from torch import nn

    for node in net.graph.nodes:
        if node.op == "call_module":
            yield net.get_submodule(node.target)
        elif node.target in (torch.flatten, "flatten"):
            yield nn.Flatten()
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"'{node.name}' is no layer that this benchmark builds in Keras")


def keras_layer(module, shape):
    """A Keras layer for a module of PyTorch, and its weights as tensors in the order of Keras, if it has any.

    An average pooling becomes a depthwise convolution, because quantizeml does not quantize Keras' own.
    shape: that of the input of the layer before. If this flattened [B, H, W, C], a linear layer's weights, which are
    for [B, C, H, W], are brought into its order.
    """
    from tf_keras import initializers, layers
    from torch import nn

    bias = [] if getattr(module, "bias", None) is None else [module.bias]
    if isinstance(module, nn.ReLU):
        return layers.ReLU(), []
    if isinstance(module, nn.Flatten):
        return layers.Flatten(), []
    if isinstance(module, nn.AvgPool2d):
        rows, columns = np.broadcast_to(module.kernel_size, 2).tolist()
        mean = initializers.Constant(1 / (rows * columns))
        return layers.DepthwiseConv2D((rows, columns), module.stride, use_bias=False, depthwise_initializer=mean), []
    if isinstance(module, nn.Conv2d):
        padding = "same" if any(module.padding) else "valid"
        sizes = module.out_channels, module.kernel_size, module.stride, padding
        return layers.Conv2D(*sizes, use_bias=bool(bias)), [module.weight.permute(2, 3, 1, 0), *bias]
    if isinstance(module, nn.Linear):
        weight = module.weight
        if len(shape) == 4:
            _, H, W, C = shape
            weight = weight.unflatten(1, (C, H, W)).permute(0, 2, 3, 1).flatten(1)
        return layers.Dense(module.out_features, use_bias=bool(bias)), [weight.T, *bias]
    raise ValueError(f"{type(module).__name__} is no layer that this benchmark builds in Keras")


def channels_last(images):
    """Images [B, C, H, W] as an array [B, H, W, C], the order of Keras."""
    return images.permute(0, 2, 3, 1).numpy()
